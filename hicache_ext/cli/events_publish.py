"""`hicache-ext events publish`: a store's local tiers as a KV event stream of their own.

Belongs here: options, choosing the namespace, saying what is published. Does not belong here: following a store
(hicache_ext.events.follower), publishing (hicache_ext.events.publisher).
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from hicache_ext.config import Config, ConfigError
from hicache_ext.events.announcer import Announcer
from hicache_ext.events.follower import Follower
from hicache_ext.events.model import Dialect
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import OptionError
from storage_backends.local import LocalBackend
from storage_backends.local.survey import NamespaceSummary, NotATier, summarise, survey

_LOOK_SECONDS = 2.0


def publish_command(
    file: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="The engine's configuration: .yaml, .json, .toml.")
    ],
    endpoint: Annotated[
        str, typer.Option(help="Where to publish. `tcp://*:5557` is every address of this machine.")
    ] = ("tcp://127.0.0.1:5557"),
    replay: Annotated[str, typer.Option("--replay", help="Where readers ask for what they missed.")] = (
        "tcp://127.0.0.1:5558"
    ),
    namespace: Annotated[
        str, typer.Option(help="The namespace, as `hicache-ext inspect` shows it; needed among several.")
    ] = "",
    topic: Annotated[str, typer.Option(help="Of every message: `kv@POD@MODEL` for llm-d.")] = "",
    rank: Annotated[int, typer.Option(min=0, help="Data-parallel rank; ports are counted up by it.")] = 0,
    dialect: Annotated[Dialect, typer.Option(help="Whose bytes to write.")] = Dialect.SGLANG,
    newcomers: Annotated[
        bool,
        typer.Option("--resync-newcomers", help="Tell all everything when a reader comes: for readers that never ask."),
    ] = False,
    sequence_file: Annotated[
        Path | None, typer.Option(help="Keeps the sequence number, where the clock may go back between runs.")
    ] = None,
) -> None:
    """Publish what the local tiers of a configuration hold, beside the engines that write there.

    For engines whose own stream does not tell of these tiers. It reads logs and headers, and writes nothing. Remote
    tiers cannot be listed, and are left out. Pages that the engine stored without their tokens are not announced.

    SIGUSR1 makes it tell all readers everything again, after `AllBlocksCleared`: for a router that has lost its way.

    Nothing is encrypted, and events hold the prompts' tokens: mind who can reach an address beyond this machine.
    """
    try:
        config = Config.load(file)
        chosen = [tier for i, tier in enumerate(config.tiers) if issubclass(config.backend(i)[0], LocalBackend)]
        if not chosen:
            raise ConfigError(
                f"{file}: no local tier: only those can be listed. Fix: name the directory that engines share"
            )
        options = PublisherOptions(
            endpoint=endpoint, replay_endpoint=replay, topic=topic, dialect=dialect,
            resync_newcomers=newcomers, sequence_file=sequence_file,
        )  # fmt: skip
        stop = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        local = config.model_copy(update={"tiers": tuple(chosen)})
        found = _namespace(local, namespace, stop)
        if found is not None:
            _publish(local, options, rank, found, stop)
    except ValidationError as error:
        for problem in error.errors():
            typer.echo(f"--{'.'.join(map(str, problem['loc'])).replace('_endpoint', '')}: {problem['msg']}", err=True)
        raise typer.Exit(2) from error
    except (ConfigError, OptionError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def _publish(
    config: Config, options: PublisherOptions, rank: int, found: NamespaceSummary, stop: threading.Event
) -> None:
    announcer = Announcer()
    publisher = Publisher(options, announcer, rank)
    signal.signal(signal.SIGUSR1, lambda *_: publisher.resync())
    try:
        store = TieredStore.open(config)
        follower = Follower(store, announcer, found.digest, publisher.wake)
        layout = found.description.get("layout") or {}
        block = layout.get("page_size") if isinstance(layout, dict) else None
        typer.echo(
            f"namespace {found.digest.hex()}, blocks of {block or 'unknown'} tokens: "
            f"{publisher.endpoint}, replay {publisher.replay_endpoint}",
            err=True,
        )
        stop.wait()
        publisher.close()  # first: that we stop does not say that the pages go
        follower.close()
        store.close()
    finally:
        publisher.close()
    typer.echo(
        ", ".join(f"{count} {name}" for name, count in {**announcer.stats(), **publisher.stats()}.items()), err=True
    )


def _namespace(config: Config, wanted: str, stop: threading.Event) -> NamespaceSummary | None:
    """The namespace of that name, or the only one; waits for the first page. None: stopped meanwhile."""
    said = False
    while not stop.is_set():
        found: dict[str, NamespaceSummary] = {}
        for i in range(len(config.tiers)):
            for path, _ in config.backend(i)[1].places:  # type: ignore[attr-defined]
                try:
                    found.update({summary.digest.hex(): summary for summary in summarise(survey(path))})
                except NotATier:  # not yet
                    continue
        matching = [summary for name, summary in found.items() if name.startswith(wanted)]
        if len(matching) == 1:
            return matching[0]
        if len(matching) > 1:
            lines = [f"  {s.digest.hex()}: {s.pages} pages, {_about(s)}" for s in matching]
            raise ConfigError(
                "several namespaces; a stream tells of one. Fix: --namespace, one of\n" + "\n".join(lines)
            )
        if not said:
            typer.echo(f"waiting for the first page{f' of namespace {wanted}' if wanted else ''}", err=True)
            said = True
        stop.wait(_LOOK_SECONDS)
    return None


def _about(summary: NamespaceSummary) -> str:
    fields = {name: value for name, value in summary.description.items() if isinstance(value, str) and value}
    return ", ".join(f"{name} {value[:16]}" for name, value in sorted(fields.items()))

"""How long Dynamo's own indexer takes to know what storage holds, and what many workers on one store cost it.

Belongs here: workers without an engine, and measuring. Does not belong here: the indexer (bench.dynamo), options and
tables (cli.bench_indexer).

The delay is from a write's outcome, which says that the page is durable in a real tier, to the first query that finds
the whole prompt there; queries follow each other without a pause. It goes two ways: by a stream of our own
(`events publish`), and by SGLang's, whose scheduler moves events at the end of a step.

Many workers are simulated: each has an announcer and a publisher as a real one has, and is told of the same pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hicache_ext.bench.dynamo import Service, Unavailable
from hicache_ext.config import Config
from hicache_ext.events.announcer import Announcer
from hicache_ext.events.follower import Follower
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.page import KEY_BYTES, Namespace, PageLayout, chain_parents
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Notes, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory

PAGE, PAGES = 64, 8
_BUFFERS = (32768, 32768)
MODEL = "bench"
CHAIN = 100
_SECONDS = 120.0
Say = Callable[[str], None]


Told = tuple[TieredStore, int, "_Prompts"]
"""A store that the indexer hears of, its worker's number there, and what to store."""
_Way = contextlib.AbstractContextManager[Told]


class _Prompts:
    """Prompts of `pages` pages that share nothing, as batches of a store and as a query's tokens."""

    def __init__(self, pages: int) -> None:
        self.space = Namespace(
            model=hashlib.sha256(b"bench").hexdigest(), weights="bench",
            layout=PageLayout("mha", "page_first", "bfloat16", PAGE, _BUFFERS),
        )  # fmt: skip
        self._pages = pages
        self._memory = OwnedMemory(pages * sum(_BUFFERS))
        self._lengths = np.array(_BUFFERS * pages, np.uint64)
        starts = np.concatenate([[0], np.cumsum(self._lengths[:-1])]).astype(np.uint64)
        self._addresses = starts + np.uint64(self._memory.address)
        self._offsets = np.arange(pages + 1, dtype=np.int64) * len(_BUFFERS)

    def batch(self, number: int) -> PageBatch:
        keys, notes = chain(number, self._pages)
        return PageBatch(
            self.space, keys, chain_parents(keys, None), self._addresses, self._lengths, self._offsets, self._memory,
            tokens=notes.tokens, event_hashes=notes.hashes,
        )  # fmt: skip


def chain(number: int, pages: int) -> tuple[bytes, Notes]:
    """Keys and notes of a prompt, chained over the tokens as SGLang chains them."""
    at = np.arange(pages * PAGE, dtype=np.uint64) + np.uint64(number * 1_000_003)
    tokens = (at * np.uint64(2654435761) % np.uint64(128_000)).astype(np.uint32).reshape(pages, PAGE)
    digest, keys = b"", []
    for row in tokens:
        digest = hashlib.sha256(digest + row.tobytes()).digest()
        keys.append(digest)
    hashes = np.frombuffer(b"".join(keys), ">i8")[:: KEY_BYTES // 8].astype(np.int64)
    return b"".join(keys), Notes(tokens, np.stack([hashes, np.concatenate([[0], hashes[:-1]])], 1))


def delay(
    indexer: Service, folder: Path, config: Config | None, rounds: int, step_s: float, say: Say
) -> list[dict[str, Any]]:
    """Rows of {what, unit, value, spread}: milliseconds, p50 and p99 over all rounds, both ways.

    config: whose tiers; None: a local one in `folder`. What was stored is removed.
    """
    rows = []
    ways: dict[str, Callable[[Service, Path, Config], _Way]] = {
        "own stream": _own,
        "SGLang's stream": partial(_sglangs, step_s=step_s),
    }
    for name, way in ways.items():
        found = []
        try:
            with (
                tempfile.TemporaryDirectory(dir=folder, prefix="hicache-indexer-") as place,
                way(indexer, Path(place), config or _config(Path(place))) as (store, number, prompts),
            ):
                store.clear([prompts.space])
                for at in range(rounds):
                    if at % 20 == 0:
                        say(f"{name}: {at} of {rounds}")
                    found.append(_once(indexer, store, number, prompts.batch(at)))
                store.clear([prompts.space])
        except ImportError as error:
            say(f"without SGLang's stream: {error}")
            continue
        for which, value in (("p50", 0.5), ("p99", 0.99)):
            rows.append(
                {
                    "what": f"durable to answered, {name}, {which}",
                    "unit": "ms",
                    "value": _quantile(found, value),
                    "spread": [min(found), max(found)],
                }
            )
    return rows


def _once(indexer: Service, store: TieredStore, number: int, batch: PageBatch) -> float:
    assert batch.tokens is not None
    wanted = batch.tokens.size
    body = {"token_ids": batch.tokens.reshape(-1).tolist(), "model_name": MODEL}
    done = store.write(batch)
    outcomes = done.result(60)
    since = time.monotonic()
    if set(outcomes) != {Outcome.HIT}:
        said = ", ".join(sorted({outcome.name.lower() for outcome in outcomes}))
        raise Unavailable(
            f"pages were not stored ({said}). Fix: look at what `hicache-ext config check` says of the tier"
        )
    while time.monotonic() - since < _SECONDS:
        answer = indexer.ask("POST", "/query", body)["instances"]
        if answer.get(str(number), {}).get("disk", 0) == wanted:
            return (time.monotonic() - since) * 1e3
    raise Unavailable("the indexer does not follow the events. Fix: with --indexer, it must reach this machine's files")


def _config(place: Path) -> Config:
    return Config.load({"tiers": [{"type": "local", "path": str(place / "tier"), "capacity": "2GiB"}]})


@contextlib.contextmanager
def _own(indexer: Service, place: Path, config: Config) -> Iterator[Told]:
    prompts, number = _Prompts(PAGES), 1
    announcer = Announcer()
    options = PublisherOptions(endpoint=f"ipc://{place}/live", replay_endpoint=f"ipc://{place}/replay")
    publisher = Publisher(options, announcer)
    store = TieredStore.open(config)
    follower = Follower(store, announcer, prompts.space.digest, publisher.wake)
    try:
        with _registered(indexer, number, options):
            _wait(lambda: bool(publisher.stats()["subscribers"]))
            yield store, number, prompts
    finally:
        publisher.close()
        follower.close()
        store.close()


class _Adapter:
    """What SGLang's adapter is to its events."""

    def __init__(self, config: Config, store: TieredStore, namespace: bytes) -> None:
        self.config, self.store, self._namespace = config, store, namespace

    def served_namespace(self) -> bytes:
        return self._namespace


@contextlib.contextmanager
def _sglangs(indexer: Service, place: Path, config: Config, step_s: float) -> Iterator[Told]:
    """SGLang's own publisher, asked for events after every step, as its scheduler asks. ImportError: no SGLang."""
    theirs = importlib.import_module("sglang.srt.disaggregation.kv_events")
    from hicache_ext.sglang.announcing import TierEvents

    prompts, number = _Prompts(PAGES), 2
    events = TierEvents()
    publisher = SimpleNamespace(enable_kv_cache_events=True, tree_cache=SimpleNamespace(take_events=list))
    events.publishes(publisher)
    store = TieredStore.open(config)
    adapter = _Adapter(config, store, prompts.space.digest)
    events.attach(adapter)
    options = PublisherOptions(endpoint=f"ipc://{place}/live", replay_endpoint=f"ipc://{place}/replay")
    zmq = theirs.ZmqEventPublisher(0, options.endpoint, options.replay_endpoint)
    stop = threading.Event()

    def scheduler() -> None:
        while not stop.wait(step_s):
            taken = publisher.tree_cache.take_events()
            if taken:
                zmq.publish(theirs.KVEventBatch(ts=time.time(), events=taken))

    thread = threading.Thread(target=scheduler, daemon=True)
    try:
        with _registered(indexer, number, options):
            thread.start()
            yield store, number, prompts
    finally:
        stop.set()
        thread.join()
        zmq.shutdown()
        events.detach(adapter)
        store.close()


@contextlib.contextmanager
def _registered(indexer: Service, number: int, options: PublisherOptions) -> Iterator[None]:
    indexer.ask("POST", "/register", {
        "instance_id": number, "endpoint": options.endpoint, "replay_endpoint": options.replay_endpoint,
        "model_name": MODEL, "block_size": PAGE,
    })  # fmt: skip
    try:
        yield
    finally:
        indexer.ask("POST", "/unregister", {"instance_id": number, "model_name": MODEL})


def workers(indexer: Service, count: int, blocks: int, say: Say) -> list[dict[str, Any]]:
    """Rows for `count` workers on one store of `blocks` blocks: each says of every block that it can load it."""
    prompts = [chain(number, min(CHAIN, blocks - at)) for number, at in enumerate(range(0, blocks, CHAIN))]
    before = (indexer.memory(), indexer.cpu())
    with tempfile.TemporaryDirectory(prefix="hicache-workers-") as folder, contextlib.ExitStack() as stack:
        made = []
        for number in range(count):
            say(f"worker {number + 1} of {count}")
            announcer = Announcer()
            options = PublisherOptions(
                endpoint=f"ipc://{folder}/live{number}", replay_endpoint=f"ipc://{folder}/replay{number}"
            )
            publisher = stack.enter_context(contextlib.closing(Publisher(options, announcer)))
            stack.enter_context(_registered(indexer, 1000 + number, options))
            made.append((announcer, publisher, announcer.add("DISK")))
        _wait(lambda: all(publisher.stats()["subscribers"] for _, publisher, _ in made))
        say(f"{count} workers say what they can load")
        cpu, since = time.process_time(), time.monotonic()
        for keys, notes in prompts:
            for announcer, publisher, tier in made:
                announcer.stored(tier, bytes(16), keys, notes)
                publisher.wake()
        _wait(lambda: all(_known(indexer, notes, count) == count for _, notes in prompts))
        seconds, used = time.monotonic() - since, time.process_time() - cpu
        stats = [publisher.stats() for _, publisher, _ in made]
        after = (indexer.memory(), indexer.cpu())
        say(f"{count} workers take it back")
        since = time.monotonic()
        for keys, _ in prompts:
            for announcer, publisher, tier in made:
                announcer.removed(tier, bytes(16), keys)
                publisher.wake()
        _wait(lambda: all(_known(indexer, notes, count) == 0 for _, notes in prompts))
        back = time.monotonic() - since
    rows = [
        _row("blocks announced", "blocks", sum(one["blocks"] for one in stats)),
        _row("messages", "messages", sum(one["batches"] for one in stats)),
        _row("bytes sent", "MiB", sum(one["kept_bytes"] for one in stats) / 2**20),
        _row("until all are answered", "s", seconds),
        _row("until all are taken back", "s", back),
        _row("CPU of the workers, and of asking", "s", used),
    ]
    if before[0] is not None and after[0] is not None:
        rows.append(_row("the indexer's memory, more", "MiB", (after[0] - before[0]) / 2**20))
    if before[1] is not None and after[1] is not None:
        rows.append(_row("the indexer's CPU", "s", after[1] - before[1]))
    return rows


def _known(indexer: Service, notes: Notes, count: int) -> int:
    """How many of the workers have the whole prompt, 0 if any has some of it and none all."""
    body = {"token_ids": notes.tokens.reshape(-1).tolist(), "model_name": MODEL}
    answer = indexer.ask("POST", "/query", body)["instances"]
    found = [one.get("disk", 0) for name, one in answer.items() if 1000 <= int(name) < 1000 + count]
    whole = sum(tokens == notes.tokens.size for tokens in found)
    return whole if whole or not any(found) else -1


def _row(what: str, unit: str, value: float) -> dict[str, Any]:
    return {"what": what, "unit": unit, "value": value, "spread": None}


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > until:
            raise Unavailable("the indexer does not follow the workers' events. Fix: fewer --workers or --blocks")
        time.sleep(0.01)


def _quantile(values: list[float], which: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(which * len(ordered)))] if which != 0.5 else statistics.median(ordered)

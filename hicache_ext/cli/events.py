"""`hicache-ext events`: look at a KV event stream, and check it.

Belongs here: options, tables, JSON, exit codes. Does not belong here: publishing (events_publish), reading streams and
rules (hicache_ext.events).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hicache_ext.cli.events_publish import publish_command
from hicache_ext.events.check import RULES, Checker
from hicache_ext.events.model import AnyEvent, BlockRemoved, BlockStored, CostedBlockStored, Medium, name_of
from hicache_ext.events.subscriber import Received, Subscriber
from storage_backends.base import OptionError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
app.command("publish")(publish_command)

_ROWS = 20
_PIPED_WIDTH = 110

Endpoint = Annotated[str, typer.Argument(metavar="ENDPOINT", help="Where events are published: tcp://127.0.0.1:5557.")]
Replay = Annotated[str | None, typer.Option("--replay", help="Where to ask for what was missed: tcp://127.0.0.1:5558.")]
Topic = Annotated[str, typer.Option(help="Only messages whose topic begins so.")]
Seconds = Annotated[float | None, typer.Option(help="Stop after so many seconds; otherwise with Ctrl-C.")]
Batches = Annotated[int | None, typer.Option(help="Stop after so many batches.")]


@app.callback()
def _group() -> None:
    """KV events: what routers are told of where pages lie."""


@app.command()
def tail(
    endpoint: Endpoint,
    replay: Replay = None,
    topic: Topic = "",
    seconds: Seconds = None,
    batches: Batches = None,
    kind: Annotated[
        str, typer.Option("--type", help="Only these: stored, removed, cleared; several with commas.")
    ] = "",
    medium: Annotated[str, typer.Option(help="Only this medium: GPU, CPU, DISK, EXTERNAL.")] = "",
    block: Annotated[int | None, typer.Option(help="Only events that name this block hash.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object on stdout for each event, with all fields.")
    ] = False,
) -> None:
    """Show a stream's events as they come, of any engine: SGLang, vLLM, `events publish`.

    With `--replay` what was published before is shown first, as far as the publisher has kept it.
    """
    wanted = _wanted(kind, medium, block)
    with _subscriber(endpoint, replay, topic) as source:
        if as_json or not sys.stdout.isatty():
            for got in _until(source, seconds, batches):
                for event in filter(wanted, got.decoded.batch.events):
                    print(json.dumps(_row(got, event)) if as_json else _line(got, event), flush=True)
                for problem in got.decoded.problems:
                    print(f"batch {got.number}: {problem}", file=sys.stderr)
            return
        rows: deque[tuple[Received, AnyEvent]] = deque(maxlen=_ROWS)
        counts: Counter[str] = Counter()
        with Live(_page(endpoint, rows, counts), refresh_per_second=8) as live:
            for got in _until(source, seconds, batches):
                counts["batches"] += 1
                counts["missed batches"] += got.missed
                counts["problems"] += len(got.decoded.problems)
                for event in filter(wanted, got.decoded.batch.events):
                    counts["events"] += 1
                    rows.append((got, event))
                live.update(_page(endpoint, rows, counts))


@app.command()
def check(
    endpoint: Endpoint,
    replay: Replay = None,
    topic: Topic = "",
    seconds: Seconds = None,
    batches: Batches = None,
    block_size: Annotated[
        int, typer.Option(help="Tokens of a block, as registered with the router; 0: as the first has.")
    ] = 0,
    go_on: Annotated[bool, typer.Option("--all", help="Name every violation, not only the first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout at the end.")] = False,
) -> None:
    """Check that a stream keeps the ten rules that routers rely on, and name the first that it breaks.

    Ends with code 0 where none was broken, 1 where one was, 2 where the stream cannot be read.
    """
    checker = Checker(block_size)
    violations: list[dict[str, Any]] = []

    def note(rule: int, number: int | None, event: int | None, text: str) -> None:
        violations.append({"rule": rule, "batch": number, "event": event, "text": text, "means": RULES[rule]})  # type: ignore[index]
        if not as_json:
            where = "" if number is None else f", batch {number}" + ("" if event is None else f", event {event}")
            print(f"rule {rule}{where}: {text}\n  {RULES[rule]}", flush=True)  # type: ignore[index]

    with _subscriber(endpoint, replay, topic) as source:
        for got in _until(source, seconds, batches):
            for violation in checker.feed(got):
                note(violation.rule, violation.number, violation.event, violation.text)
                if not go_on:
                    break
            if source.malformed:
                note(6, None, None, f"{source.malformed} messages that are not topic, number, payload")
            if source.answered is False:
                note(10, got.number, None, f"{replay} does not answer")
            if violations and not go_on:
                break
    unreachable = sum(view.unreachable() for view in checker.views.values())
    held = {
        str(rank): {medium.value: len(blocks) for medium, blocks in view.held().items()}
        for rank, view in checker.views.items()
    }
    if as_json:
        found = {"batches": checker.batches, "events": checker.events, "blocks": checker.blocks, "resident": held,
                 "unreachable": unreachable, "replay": replay, "violations": violations}  # fmt: skip
        print(json.dumps(found))
    else:
        print(f"{checker.batches} batches, {checker.events} events, {checker.blocks} blocks: ", end="")
        print(f"{len(violations)} violations" if violations else "no rule was broken")
        if unreachable:
            print(f"{unreachable} copies that no query comes to: the blocks before them are lower down or gone")
        if replay is None:
            print("not checked: rule 10, and what was before; give --replay")
        if not checker.batches:
            print(f"nothing came from {endpoint}: is that the address, and the topic?")
    raise typer.Exit(1 if violations else 0)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _subscriber(endpoint: str, replay: str | None, topic: str) -> Subscriber:
    try:
        return Subscriber(endpoint, replay, topic)
    except OptionError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def _until(source: Subscriber, seconds: float | None, batches: int | None) -> Iterator[Received]:
    """Batches until the time is over, or there were so many, or somebody presses Ctrl-C."""
    until = None if seconds is None else time.monotonic() + seconds
    left = batches
    try:
        while (until is None or time.monotonic() < until) and left != 0:
            got = source.receive(0.2)
            if got is not None:
                left = None if left is None else left - 1
                yield got
    except KeyboardInterrupt:
        pass


def _wanted(kind: str, medium: str, block: int | None) -> Any:
    names = {"stored": "BlockStored", "removed": "BlockRemoved", "cleared": "AllBlocksCleared"}
    kinds = {names.get(name.strip(), name.strip()) for name in kind.split(",") if name.strip()}
    if unknown := kinds - set(names.values()):
        typer.echo(f"--type {', '.join(unknown)}: choose from {', '.join(names)}", err=True)
        raise typer.Exit(2)
    which = Medium.of(medium.upper()) if medium else None
    if medium and which is None:
        typer.echo(f"--medium {medium}: choose from GPU, CPU, DISK, EXTERNAL", err=True)
        raise typer.Exit(2)

    def wanted(event: AnyEvent) -> bool:
        if kinds and name_of(event) not in kinds:
            return False
        if not isinstance(event, BlockStored | BlockRemoved):
            return block is None and which is None
        return (which is None or Medium.of(event.medium) is which) and (block is None or block in event.block_hashes)

    return wanted


def _row(got: Received, event: AnyEvent) -> dict[str, Any]:
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    known = {name: msgspec.to_builtins(value) for name, value in fields.items() if value is not None}
    batch = got.decoded.batch
    return {"number": got.number, "ts": batch.ts, "dp_rank": batch.dp_rank, "type": name_of(event), **known}


def _cells(got: Received, event: AnyEvent) -> tuple[str, ...]:
    batch = got.decoded.batch
    at = time.strftime("%H:%M:%S", time.localtime(batch.ts))
    head = (at, str(got.number), "" if batch.dp_rank is None else str(batch.dp_rank), name_of(event))
    if isinstance(event, BlockStored):
        cost = event.load_cost if isinstance(event, CostedBlockStored) else None
        loads = cost and f"{cost.bytes_per_s / 1e9:.2g} GB/s, {cost.latency_s * 1e3:.2g} ms"
        more = [text for text in (event.lora_name, event.cache_salt and "salted", loads) if text]
        first, parent = str(event.block_hashes[0]) if event.block_hashes else "", event.parent_block_hash
        return (*head, event.medium or "", str(len(event.block_hashes)), first, str(parent or ""), ", ".join(more))
    if isinstance(event, BlockRemoved):
        first = str(event.block_hashes[0]) if event.block_hashes else ""
        return (*head, event.medium or "", str(len(event.block_hashes)), first, "", "")
    return (*head, "", "", "", "", "")


def _line(got: Received, event: AnyEvent) -> str:
    return "  ".join(cell for cell in _cells(got, event) if cell)


def _page(endpoint: str, rows: deque[tuple[Received, AnyEvent]], counts: Counter[str]) -> Group:
    table = Table(title=endpoint, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    for column in ("time", "number", "rank", "event", "medium"):
        table.add_column(column, no_wrap=True)
    table.add_column("blocks", justify="right", no_wrap=True)
    for column in ("first block", "parent", ""):
        table.add_column(column, no_wrap=True)
    for got, event in rows:
        table.add_row(*_cells(got, event))
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing yet"
    return Group(table, Text(said, style="dim"))

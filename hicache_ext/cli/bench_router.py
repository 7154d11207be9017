"""`hicache-ext bench router`: what storage-tier events change for a router, as a table and a file.

Belongs here: options, table, file. Does not belong here: the simulation (hicache_ext.bench.router).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.bench import dynamo, machine, router

_MODULE, _PORT = "dynamo.select_service", 8092
_HOW = ("round robin", "device events", "with tier events")


def router_command(
    trace: Annotated[
        Path, typer.Option(metavar="FILE", help="A Mooncake trace (JSON lines with hash_ids).", exists=True)
    ],
    url: Annotated[
        str, typer.Option("--router", help="One that runs: http://127.0.0.1:8092. Without it one is started apart.")
    ] = "",
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Simulated workers; 2 and 4 by default.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of the trace's beginning.")] = 3000,
    device: Annotated[int, typer.Option(min=1, help="Blocks of 512 tokens on each worker's device.")] = 1000,
    storage: Annotated[int, typer.Option(min=1, help="Blocks in each worker's storage tier.")] = 20_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
) -> None:
    """Replay a trace through Dynamo's own selection over simulated workers, with and without storage-tier events.

    Every worker has the same storage tier in each row; what changes is what the router is told.

    `python -m dynamo.select_service` listens on every address. So it is started in a network namespace of its own
    (root, or where users may make namespaces), unless `--router` names one that runs already.
    """
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 110)
    try:
        read = router.read(trace, requests)
        if not url:
            dynamo.apart(_MODULE, "--router")
        with console.status("starting") as status, dynamo.service(url, _MODULE, _PORT) as selection:
            rows = [
                router.run(selection, read, count, device, storage, how, status.update)
                for count in workers or [2, 4]
                for how in _HOW
            ]
    except (dynamo.Unavailable, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    about = machine.facts(Path(tempfile.gettempdir()))
    out.print(_table(rows, f"{trace.name}, {len(read)} requests, device {device} and storage {storage} blocks"))
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(json.dumps({"machine": about, "command": command, "rows": rows}, indent=1) + "\n")


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what the router is told", no_wrap=True)
    for column in ("workers", "prefix tokens reused", "requests of the busiest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["how"], str(row["workers"]), f"{row['reused']:.1%}", f"{row['busiest']:.1%}")
    return table

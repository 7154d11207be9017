"""`hicache-ext bench indexer`: how soon Dynamo's indexer knows, and what many workers cost it, as tables and a file.

Belongs here: options, tables, file. Does not belong here: measuring (hicache_ext.bench.indexer).
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

from hicache_ext.bench import dynamo, indexer, machine
from hicache_ext.config import Config, ConfigError

_MODULE, _PORT = "dynamo.indexer", 8090
_FOLDER = Path(tempfile.gettempdir())


def indexer_command(
    url: Annotated[
        str, typer.Option("--indexer", help="One that runs: http://127.0.0.1:8090. Without it one is started apart.")
    ] = "",
    rounds: Annotated[
        int, typer.Option(min=0, help=f"Writes of {indexer.PAGES} pages to measure the delay with.")
    ] = 200,
    step: Annotated[float, typer.Option(min=0.0, help="Milliseconds of SGLang's scheduler between two looks.")] = 5.0,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Whose tiers to write to, in place of a local one in --dir.")
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", help="Where the local tier lies.", exists=True)] = _FOLDER,
    workers: Annotated[int, typer.Option(min=0, help="Simulated workers on one store.")] = 100,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of that store.")] = 500,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
) -> None:
    """From a durable page to the answer of Dynamo's own indexer; and what many workers on one store cost.

    The delay is that of a page in a real tier, a local one or a configuration's first, by `events publish`'s stream and
    by SGLang's own publisher. The workers are simulated: each announces every block of the store and withdraws it, as
    each must that can load it.
    `--rounds 0` or `--workers 0` leaves one of the two out.

    Dynamo's indexer listens on every address. So it is started in a network namespace of its own (root, or where users
    may make namespaces), from which no server can be reached: with remote tiers in `--config`, start the indexer
    yourself and name it with `--indexer`. Its memory and CPU are then not known.
    """
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 110)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        tiers = None if config is None else Config.load(config)
        if not url:
            dynamo.apart(_MODULE, "--indexer")
        with console.status("starting") as status, dynamo.service(url, _MODULE, _PORT) as service:
            if rounds:
                found["delay"] = indexer.delay(service, folder, tiers, rounds, step / 1e3, status.update)
            if workers:
                found["workers"] = indexer.workers(service, workers, blocks, status.update)
    except (dynamo.Unavailable, ConfigError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    about = machine.facts(folder)
    if rounds:
        out.print(_table(found["delay"], f"delay, {rounds} writes of {indexer.PAGES} pages, a step every {step:g} ms"))
    if workers:
        out.print(
            _table(found["workers"], f"{workers} workers on one store of {blocks} blocks of {indexer.PAGE} tokens")
        )
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(json.dumps({"machine": about, "command": command, **found}, indent=1) + "\n")


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what", no_wrap=True)
    for column in ("value", "least", "most"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for row in rows:
        spread = ("", "") if row["spread"] is None else map(_short, row["spread"])
        table.add_row(row["what"], _short(row["value"]), *spread, row["unit"])
    return table


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""`hicache-ext bench events-scheduler`: what KV events cost the scheduler thread, as a table and a file.

Belongs here: options, table, file. Does not belong here: measuring (hicache_ext.bench.events_scheduler).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.bench import events_scheduler, machine


def events_scheduler_command(
    quick: Annotated[
        bool, typer.Option(help=f"{events_scheduler.QUICK_BLOCKS:,} blocks instead of {events_scheduler.BLOCKS:,}.")
    ] = False,
    page: Annotated[int, typer.Option(help="Tokens of a block.", min=1)] = events_scheduler.PAGE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
) -> None:
    """Microseconds of SGLang's scheduler thread for each block that the storage tiers announce."""
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 110)
    with console.status("starting") as status:
        blocks = events_scheduler.QUICK_BLOCKS if quick else events_scheduler.BLOCKS
        rows = events_scheduler.run(blocks, page, status.update)
    about = machine.facts(Path.cwd())
    table = Table(title=f"KV events: {blocks:,} blocks of {page} tokens", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("what", "median", "least", "most", "unit"):
        table.add_column(column, justify="left" if column in ("what", "unit") else "right", no_wrap=True)
    for row in rows:
        table.add_row(row["what"], *(f"{value:.3g}" for value in (row["value"], *row["spread"])), row["unit"])
    out.print(table)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(json.dumps({"machine": about, "command": command, "rows": rows}, indent=1) + "\n")

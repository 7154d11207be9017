"""`hicache-ext bench events`: publishing KV events, as a table for people and a file for scripts.

Belongs here: options, table, file. Does not belong here: measuring (hicache_ext.bench.events).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.bench import events, machine


def events_command(
    steps: Annotated[int, typer.Option(min=1, help="How often a scheduler hands over events, a round.")] = 20_000,
    each: Annotated[int, typer.Option(min=1, help="Events of one step, of one block each.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="In turns with SGLang's publisher.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
) -> None:
    """Events a second, CPU and delay of the publisher with a reader attached, beside SGLang's own."""
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 110)
    with console.status("starting") as status:
        rows = events.run(steps, each, rounds, status.update)
    about = machine.facts(events.place())
    out.print(_table(rows, each))
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(json.dumps({"machine": about, "command": command, "rows": rows}, indent=1) + "\n")


def _table(rows: list[dict[str, Any]], each: int) -> Table:
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    title = f"publishing, {each} events of {events.BLOCK_TOKENS} tokens a step"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what (spread)", no_wrap=True)
    for subject in subjects:
        table.add_column(subject, justify="right", no_wrap=True)
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = [row for row in rows if row["what"] == what]
        table.add_row(f"{what}, {cells[0]['unit']}", *map(_cell, cells))
    return table


def _cell(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    return f"{_short(row['value'])} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

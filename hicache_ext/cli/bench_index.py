"""`hicache-ext bench index`: the index of the local tier, as a table for people and a file for scripts.

Belongs here: options, table, file. Does not belong here: measuring (hicache_ext.bench.index).
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.bench import index, machine


def index_command(
    quick: Annotated[bool, typer.Option(help=f"{index.QUICK_PAGES:,} pages instead of {index.PAGES:,}.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where logs and pages are written. Here by default.")
    ] = None,
) -> None:
    """Lookups a second, memory a page, warm open from a residency log, and the scan without one."""
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 110)
    logging.getLogger("storage_backends").setLevel(logging.ERROR)
    place = folder or Path.cwd()
    place.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="hicache-bench-", dir=place))
    sizes = (index.QUICK_PAGES, index.QUICK_SCAN_PAGES) if quick else (index.PAGES, index.SCAN_PAGES)
    try:
        with console.status("starting") as status:
            rows = index.run(work, *sizes, status.update)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    about = machine.facts(place)
    out.print(_table(rows))
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(json.dumps({"machine": about, "command": command, "rows": rows}, indent=1) + "\n")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"index: {rows[0]['index']}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("what", no_wrap=True)
    for column in ("value (spread)", "unit", "goal"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spread = "" if row["spread"] is None else f" ({_short(row['spread'][0])}-{_short(row['spread'][1])})"
        goal = "" if row["goal"] is None else _short(row["goal"])
        table.add_row(row["what"], _short(row["value"]) + spread, row["unit"], goal)
    return table


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

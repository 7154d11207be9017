"""`hicache-ext bench`: measurements as a table for people and a file for scripts.

Belongs here: options, tables, files. Does not belong here: measuring (hicache_ext.bench).
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

from hicache_ext.cli.bench_index import index_command
from hicache_ext.cli.bench_policy import policy_command

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("policy")(policy_command)
app.command("index")(index_command)

ROUNDS, QUICK_ROUNDS = 5, 2
#: Columns of a log file or pipe, where rich would assume 80.
_PIPED_WIDTH = 110


@app.callback()
def _group() -> None:
    """Measure storage tiers."""


@app.command("io")
def io_command(
    quick: Annotated[bool, typer.Option(help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}: under a minute.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    folder: Annotated[
        list[Path] | None, typer.Option("--dir", help="Where to write (repeatable: several disks). Here by default.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="I/O engine of ours (repeatable): auto, native, liburing, threads.")
    ] = None,
) -> None:
    """Batches of 128 pages through the SGLang adapter, beside SGLang's own file backend on the same host pool."""
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    try:
        import sglang  # noqa: F401 - the pool and both backends are SGLang's

        from hicache_ext.bench import io, machine
        from storage_backends.base import OptionError
    except ImportError as error:
        console.print(
            f"bench io drives SGLang's own host pool: {error}. Fix: pip install 'hicache-ext[sglang]'", markup=False
        )
        raise typer.Exit(2) from error
    # Tiers open once per page size, each time without the plugin, which a benchmark does not need.
    logging.getLogger("hicache_ext").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for place in folder or [Path.cwd()]:
        place.mkdir(parents=True, exist_ok=True)
        about = about or machine.facts(place)
        work = Path(tempfile.mkdtemp(prefix="hicache-bench-", dir=place))
        try:
            with console.status("starting") as status:
                found, pool_pages = io.run(work, engine or ["auto"], io.BLOCKS, rounds, status.update)
        except (OptionError, RuntimeError, ValueError) as error:
            console.print(f"bench io failed: {error}", markup=False)
            raise typer.Exit(1) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        about["pool_pages"] = pool_pages
        for row in found:
            row["dir"] = str(place)
        rows += found
        out.print(_table(found, f"{place}: {machine.file_system(place)}"))
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    out.print(
        f"128 pages a batch, medians of {rounds} (spread in brackets), the order of the subjects rotated. The host "
        f"pool lies in {about['pool_pages']} pages. CPU: all threads of the process. Ours bypasses the page cache; "
        "stock's cold reads follow posix_fadvise(DONTNEED); stock's writes end in the page cache.",
        highlight=False,
    )
    if json_file is not None:
        text = json.dumps(
            {"machine": about, "command": " ".join(["hicache-ext", *sys.argv[1:]]), "rows": rows}, indent=1
        )
        json_file.write_text(text + "\n")


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("page", "what", "subject"):
        table.add_column(column, no_wrap=True)
    for column in ("GB/s (spread)", "CPU s/GB", "speed/stock", "CPU/stock"):
        table.add_column(column, justify="right", no_wrap=True)
    stock = {(row["block"], row["op"], row["case"]): row for row in rows if row["subject"] == "stock-file"}
    order = ("first fill", "overwrite", "cold", "warm")
    block = 0
    for row in sorted(rows, key=lambda row: (row["block"], order.index(row["case"]), row["subject"])):
        if row["block"] != block and block:
            table.add_section()
        block = row["block"]
        base = stock.get((row["block"], row["op"], row["case"]))
        ratios = ["", ""]
        if base is not None and base is not row:
            ratios = [f"{row[key] / base[key]:.2f}" if base[key] else "" for key in ("gb_per_s", "cpu_s_per_gb")]
        table.add_row(
            f"{block >> 20} MiB" if block >= 1 << 20 else f"{block >> 10} KiB",
            f"{row['case']} read" if row["op"] == "read" else row["case"],
            f"ours ({row['engine']})" if row["subject"] == "ours" else row["subject"],
            f"{row['gb_per_s']:.2f} ({row['spread'][0]:.2f}-{row['spread'][1]:.2f})",
            f"{row['cpu_s_per_gb']:.3f}",
            *ratios,
        )
    return table

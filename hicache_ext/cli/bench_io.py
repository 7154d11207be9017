"""`hicache-ext bench io`: pages to and from disk, as tables, verdicts and a file.

Belongs here: options, tables, files. Does not belong here: measuring (hicache_ext.bench.io and io_engine) or goals
(hicache_ext.bench.io_goals).
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.cli.needs import require
from hicache_ext.cli.sizes import size_of

if TYPE_CHECKING:
    from hicache_ext.bench.io_rounds import Setup

ROUNDS, QUICK_ROUNDS = 5, 2
_TICKER_SECONDS, _QUICK_TICKER_SECONDS = 0.5, 0.1
#: Columns of a log file or pipe, where rich would assume 80.
_PIPED_WIDTH = 120
#: What the adapter suite is made of.
_POOL = ("torch", "sglang", "sglang.srt.mem_cache.pool_host.mha", "sglang.srt.mem_cache.hicache_storage")
_SUBJECTS = ("ours", "fio", "nixl-posix", "stock-file", "stock-file-warm", "verified_pass")


class Suite(StrEnum):
    adapter = "adapter"
    engine = "engine"


class Pages(StrEnum):
    huge = "huge"
    fourk = "4k"
    both = "both"


def io_command(
    suite: Annotated[
        Suite,
        typer.Option(
            help="adapter: batches of 128 pages through the SGLang adapter. engine: blocks of 64 KiB to 8 MiB through "
            "each of our I/O engines."
        ),
    ] = Suite.adapter,
    quick: Annotated[bool, typer.Option(help="Fewer rounds and cases, huge pages only: under a minute.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    folder: Annotated[
        list[Path] | None, typer.Option("--dir", help="Where to write (repeatable: several disks). Here by default.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="I/O engine of ours (repeatable): native, liburing, threads; adapter: auto by default."),
    ] = None,
    pages: Annotated[
        Pages | None, typer.Option(help="Memory in huge pages, in 4 KiB pages, or both (with --quick: huge).")
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="Suite engine: block size, such as 256KiB (repeatable).")
    ] = None,
    depth: Annotated[
        list[int] | None, typer.Option(min=1, help="Suite engine: blocks under way at a time (repeatable).")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help=f"Rounds of each case: {ROUNDS}, with --quick {QUICK_ROUNDS}.")
    ] = None,
) -> None:
    """Pages to and from disk, beside fio, NIXL's POSIX plugin and SGLang's own file backend on the same memory."""
    from hicache_ext.bench import io_goals, machine
    from hicache_ext.bench.io_rounds import Setup
    from storage_backends.base import OptionError

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    if suite is Suite.adapter:
        require(
            console, "bench io --suite adapter drives SGLang's own host pool", _POOL,
            "pip install 'hicache-ext[sglang]', see `python -m pip check`; or --suite engine",
        )  # fmt: skip
    # Tiers open once per page size, each time without the plugin, which a benchmark does not need.
    logging.getLogger("hicache_ext").setLevel(logging.ERROR)
    pages = pages or (Pages.huge if quick else Pages.both)
    blocks = tuple(size_of(text, "--block", 4096) for text in block or ())
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    left_out: list[str] = []

    def say(line: str) -> None:
        if line not in left_out:
            left_out.append(line)
            console.print(line, markup=False, highlight=False)

    for place in folder or [Path.cwd()]:
        place.mkdir(parents=True, exist_ok=True)
        about = about or machine.facts(place)
        work = Path(tempfile.mkdtemp(prefix="hicache-bench-", dir=place))
        try:
            with console.status("starting") as status:
                setup = Setup(rounds, _QUICK_TICKER_SECONDS if quick else _TICKER_SECONDS, status.update)
                if suite is Suite.adapter:
                    found = _adapter(work, engine or ["auto"], pages, setup, say)
                else:
                    found = _engine(work, engine or [], quick, pages, blocks, tuple(depth or ()), setup, say)
        except (OptionError, RuntimeError, ValueError) as error:
            console.print(f"bench io failed: {error}", markup=False)
            raise typer.Exit(1) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for row in found:
            row["dir"] = str(place)
        rows += found
        for kind in dict.fromkeys(row["pages"] for row in found if row["subject"] == "ours"):
            title = f"{place}: {machine.file_system(place)}; memory in {'huge' if kind == 'huge' else '4 KiB'} pages"
            out.print(table([row for row in found if row["pages"] == kind], title))
    about |= _yardsticks()
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    out.print(
        f"Medians of {rounds} (spread in brackets), the order of the subjects rotated. CPU: all threads of the "
        "process, for fio its own count; verified_pass: one thread computes the checksums of cold memory. Ours, fio "
        "and NIXL bypass the page cache; stock's cold reads follow posix_fadvise(DONTNEED), its writes end in the "
        "page cache. late: by how much a thread that sleeps 1 ms wakes late, 99th percentile, under this load (idle).",
        highlight=False,
    )
    goals = io_goals.verdicts(rows, suite)
    for verdict in goals:
        out.print(verdict.line(), style="" if verdict.met else "bold", highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        written = {"machine": about, "command": command, "rows": rows}
        written |= {"goals": [verdict.row() for verdict in goals], "left_out": left_out}
        json_file.write_text(json.dumps(written, indent=1) + "\n")


def _adapter(
    work: Path, engines: list[str], pages: Pages, setup: Setup, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    from hicache_ext.bench import io

    memory = {Pages.huge: (True,), Pages.fourk: (False,), Pages.both: (True, False)}[pages]
    return io.run(work, engines, io.BLOCKS, memory, setup, say)


def _engine(
    work: Path, engines: list[str], quick: bool, pages: Pages, blocks: tuple[int, ...], depths: tuple[int, ...],
    setup: Setup, say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    from hicache_ext.bench import io_engine

    plan = io_engine.QUICK if quick else io_engine.FULL
    plan = replace(
        plan,
        blocks=blocks or plan.blocks,
        depths=depths or plan.depths,
        huge=pages is not Pages.fourk,
        fourk=pages is not Pages.huge,
    )
    return io_engine.run(work, engines, plan, setup, say)


def _yardsticks() -> dict[str, str]:
    from hicache_ext.bench import io_fio, io_nixl

    found = {"fio": io_fio.version() if io_fio.available() else "", "nixl": io_nixl.installed()}
    return {name: value for name, value in found.items() if value}


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows of one kind of memory; ratios where there is something like it in the same rows."""
    from hicache_ext.bench import io_goals

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("block", "depth", "what", "subject"):
        table.add_column(column, no_wrap=True)
    for column in ("GB/s (spread)", "CPU s/GB", "late ms", "/fio", "/nixl", "/stock", "CPU/stock"):
        table.add_column(column, justify="right", no_wrap=True)
    before = None
    for row in sorted(rows, key=_place):
        group = (row["block"], row["case"])
        if before not in (None, group):
            table.add_section()
        before = group
        ratios = [io_goals.ratio(row, rows, subject) for subject in ("fio", "nixl-posix", "stock-file")]
        ratios.append(io_goals.ratio(row, rows, "stock-file", "cpu_s_per_gb"))
        if row["subject"] != "ours":
            ratios = [None] * len(ratios)
        late = row["ticker_p99_ms"]
        table.add_row(
            io_goals.size_name(row["block"]),
            str(row["depth"]),
            f"{row['case']} read" if row["op"] == "read" else row["case"],
            f"ours ({row['engine']})" if row["subject"] == "ours" else row["subject"],
            f"{row['gb_per_s']:.2f} ({row['spread'][0]:.2f}-{row['spread'][1]:.2f})",
            f"{row['cpu_s_per_gb']:.3f}",
            f"{late['load']:.1f} ({late['idle']:.1f})",
            *(f"{value:.2f}" if value else "" for value in ratios),
        )
    return table


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    from hicache_ext.bench.io_rounds import CASES

    subject = _SUBJECTS.index(row["subject"]) if row["subject"] in _SUBJECTS else len(_SUBJECTS)
    return row["block"], CASES.index(row["case"]), row["depth"], subject, row["engine"]

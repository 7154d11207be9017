"""`hicache-ext bench copy`: block copies on a GPU, as a table for people and a file for scripts.

Belongs here: options, tables, files. Does not belong here: measuring (hicache_ext.bench.copy).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.cli.sizes import page_sizes

_PIPED_WIDTH = 130


def copy_command(
    quick: Annotated[bool, typer.Option(help="Fewer cells and rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Layout of the page buffers (repeatable); all.")] = None,
    page: Annotated[list[str] | None, typer.Option(help="Page size, such as 64KiB (repeatable); five.")] = None,
    pages: Annotated[list[int] | None, typer.Option(min=1, help="Pages at a time (repeatable); 1 to 512.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each cell.")] = None,
    decode: Annotated[bool, typer.Option(help="Also measure a decode step beside layer-wise loads.")] = True,
) -> None:
    """Pages between a GPU's paged pools and pinned page buffers, beside memcpy, torch and sgl-kernel."""
    from hicache_ext.bench import copy, copy_decode, machine
    from hicache_ext.bench.copy_sgl import left_out
    from hicache_ext.cuda import CopyError, CudaUnavailable

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    for name in layout or ():
        if name not in copy.LAYOUTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(copy.LAYOUTS)}", param_hint="--layout")
    tokens = tuple(size // copy.TOKEN_BYTES for size in page_sizes(page, copy.TOKEN_BYTES))
    try:
        about = machine.facts(Path.cwd()) | copy.facts()
    except CudaUnavailable as error:
        console.print(f"bench copy needs a GPU: {error}", markup=False, highlight=False)
        raise typer.Exit(2) from error
    plan = copy.QUICK if quick else copy.Plan()
    plan = replace(plan, layouts=tuple(layout or plan.layouts), rounds=rounds or plan.rounds)
    plan = replace(plan, tokens=tokens or plan.tokens, pages=tuple(pages or plan.pages))
    try:
        with console.status("starting") as status:
            rows = copy.run(plan, status.update)
            by_multiprocessors = copy.curve(status.update, plan.rounds)
            beside = copy_decode.run(status.update) if decode else []
    except (CopyError, RuntimeError) as error:
        console.print(f"bench copy failed: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from error
    for name in plan.layouts:
        out.print(_table([row for row in rows if row["layout"] == name], name))
    out.print(_curve(by_multiprocessors))
    if beside:
        out.print(_decode(beside))
    goals = copy.limits(rows)
    met = sum(goal["met"] for goal in goals)
    out.print(
        f"{met} of {len(goals)} cells with 64 pages or more reach 0.9 of memcpy (0.7 below 256 KiB) and the best of "
        "sgl-kernel"
    )
    for goal in goals:
        if not goal["met"]:
            out.print(f"MISSED: {goal}", markup=False, highlight=False, soft_wrap=True)
    for what, why in left_out.items():
        out.print(f"left out: {what}: {why}", markup=False, highlight=False, soft_wrap=True)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        written = {"machine": about, "command": command, "rows": rows, "by_multiprocessors": by_multiprocessors}
        written |= {"decode": beside, "goals": goals, "left_out": left_out}
        json_file.write_text(lines(written) + "\n")


def lines(written: dict[str, Any]) -> str:
    """JSON with a row a line: a file of a thousand rows is to be read, and compared, by people too."""
    parts = []
    for name, value in written.items():
        if isinstance(value, list) and value:
            value_text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        else:
            value_text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {value_text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    """A line for each cell; medians in GB/s."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    table = Table(title=f"{title}: GB/s", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("op", "page", "pages", "way", *subjects):
        table.add_column(column, justify="left" if column in ("op", "way") else "right", no_wrap=True)
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        cell = cells.setdefault((row["op"], row["page"], row["pages"]), {})
        if row["subject"] == "ours":
            cell["way"] = row["way"]
        cell[row["subject"]] = max(cell.get(row["subject"], 0.0), row["gb_per_s"])
    for (op, page, pages), cell in sorted(cells.items(), key=lambda item: (item[0][0] == "d2h", *item[0][1:])):
        speeds = (f"{cell[subject]:.1f}" if subject in cell else "" for subject in subjects)
        table.add_row(op, _size(page), str(pages), cell.get("way", ""), *speeds)
    return table


def _curve(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="ours by multiprocessors, 64 pages of 1 MiB, page_first: GB/s (spread)", box=box.SIMPLE_HEAD,
        title_justify="left",
    )  # fmt: skip
    for column in ("op", "subject", "multiprocessors", "GB/s (spread)"):
        table.add_column(column, justify="left" if column in ("op", "subject") else "right")
    for row in rows:
        low, high = row["spread"]
        speed = f"{row['gb_per_s']:.1f} ({low:.1f}-{high:.1f})"
        table.add_row(row["op"], row["subject"], str(row["multiprocessors"]), speed)
    return table


def _decode(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="a decode step beside a layer-wise load", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("layout", "way", "multiprocessors", "alone ms", "beside ms", "slower", "slowest tenth", "load GB/s"):
        table.add_column(column, justify="left" if column in ("layout", "way") else "right")
    for row in rows:
        table.add_row(
            row["layout"], row["way"], str(row["multiprocessors"]), f"{row['step_ms']:.3f}",
            f"{row['beside_ms']:.3f}", f"{row['slower']:.1%}", f"{row['worst_decile']:.1%}",
            f"{row['load_gb_per_s']:.1f}",
        )  # fmt: skip
    return table

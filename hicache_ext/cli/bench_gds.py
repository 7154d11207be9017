"""`hicache-ext bench gds`: GPU-direct storage, as a table for people and a file for scripts.

Belongs here: options, tables, files. Does not belong here: measuring (hicache_ext.bench.gds).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.cli.sizes import page_sizes, size_of

_PIPED_WIDTH = 130
_WAYS = ("auto", "batch", "stream", "calls")


def gds_command(
    path: Annotated[Path, typer.Option(help="Directory on the disk to measure; what is made there goes.")] = Path(),
    quick: Annotated[bool, typer.Option(help="Fewer page sizes, rounds and bytes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    page: Annotated[list[str] | None, typer.Option(help="Page size, such as 64KiB (repeatable); five.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each page size.")] = None,
    size: Annotated[str | None, typer.Option(help="Bytes of one turn of one subject, such as 256MiB.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Ways of asking cuFile (repeatable): auto, batch, ...")] = None,
) -> None:
    """Pages between a disk and GPU memory: by cuFile, through pinned memory, and what the disk gives at most."""
    from hicache_ext.bench import gds, machine
    from hicache_ext.bench.gds_subjects import NotHere
    from hicache_ext.cli.bench_copy import lines
    from hicache_ext.cuda import CopyError, CudaUnavailable, open_device
    from storage_backends.base import OptionError

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    for name in way or ():
        if name not in _WAYS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(_WAYS)}", param_hint="--way")
    plan = gds.QUICK if quick else gds.Plan()
    plan = replace(plan, rounds=rounds or plan.rounds, ways=tuple(way or plan.ways))
    plan = replace(
        plan, pages=page_sizes(page, 4096) or plan.pages, bytes=size_of(size, "--size") if size else plan.bytes
    )
    result = gds.Result()
    try:
        device = open_device()
        about = machine.facts(path) | {"gpu": device.name}
        with console.status("starting") as status, tempfile.TemporaryDirectory(dir=path, prefix=".bench-gds-") as made:
            gds.run(Path(made), plan, result, status.update)
    except KeyboardInterrupt:
        console.print("interrupted; measured until then:")
    except (CudaUnavailable, NotHere) as error:
        console.print(f"bench gds needs a GPU and cuFile: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (OptionError, OSError) as error:
        console.print(f"bench gds: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (CopyError, RuntimeError) as error:
        console.print(f"bench gds failed: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(
            lines({"machine": about, "command": command, "gds": result.decisions, "rows": result.rows}) + "\n"
        )
    for op in ("read", "write"):
        out.print(_table([row for row in result.rows if row["op"] == op], op))
    for name, decision in result.decisions.items():
        out.print(f"{name}: {decision}", markup=False, highlight=False, soft_wrap=True)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    failed = {(row["subject"], row["page"]): row["failed"] for row in result.rows if row["gb_per_s"] is None}
    for (subject, size_), why in failed.items():
        console.print(
            f"bench gds: {subject}, pages of {size_ >> 10} KiB: {why}", markup=False, highlight=False, soft_wrap=True
        )
    if failed:
        raise typer.Exit(1)


def _table(rows: list[dict[str, Any]], op: str) -> Table:
    """A line for each page size: medians in GB/s."""
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    spread = len(subjects) <= 4
    direction = "disk to device" if op == "read" else "device to disk"
    title = f"{op}, {direction}: GB/s" + (" (spread)" if spread else "")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("page", "pages", *subjects):
        table.add_column(column, justify="right", no_wrap=True)
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for row in rows:
        cell = cells.setdefault((row["page"], row["pages"]), {})
        if row["gb_per_s"] is None:
            cell[row["subject"]] = "failed"
            continue
        low, high = row["spread"]
        cell[row["subject"]] = f"{row['gb_per_s']:.2f}" + (f" ({low:.2f}-{high:.2f})" if spread else "")
    for (page, pages), cell in cells.items():
        size = f"{page >> 20} MiB" if page >= 1 << 20 else f"{page >> 10} KiB"
        table.add_row(size, str(pages), *(cell.get(subject, "") for subject in subjects))
    return table

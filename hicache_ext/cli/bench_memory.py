"""`hicache-ext bench memory`: the memory tier past the CPU, as a table for people and a file for scripts.

Belongs here: options, tables, files. Does not belong here: measuring (hicache_ext.bench.memory).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.cli.sizes import page_sizes, size_of

_PIPED_WIDTH = 130


def memory_command(
    quick: Annotated[bool, typer.Option(help="Fewer rounds and bytes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    page: Annotated[list[str] | None, typer.Option(help="Page size, such as 256KiB (repeatable); two.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each page size.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Bytes of one turn of one subject; three times that is pinned.")
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="The GPU's ordinal.")] = 0,
) -> None:
    """Pages between the memory tier's pinned region and a GPU, beside plain copies and the tier's own threads."""
    from hicache_ext.bench import machine, memory
    from hicache_ext.cli.bench_copy import lines
    from hicache_ext.cuda import CudaUnavailable, open_device
    from storage_backends.base import OptionError

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    plan = memory.QUICK if quick else memory.Plan()
    plan = replace(
        plan, rounds=rounds or plan.rounds, pages=page_sizes(page, 65536) or plan.pages, device=device,
        bytes=size_of(size, "--size", 65536) if size else plan.bytes,
    )  # fmt: skip
    result = memory.Result()
    try:
        about = machine.facts(Path()) | {"gpu": open_device(device).name}
        with console.status("starting") as status:
            memory.run(plan, result, status.update)
    except KeyboardInterrupt:
        console.print("interrupted; measured until then:")
    except (CudaUnavailable, OptionError) as error:
        console.print(f"bench memory needs a GPU: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        console.print(f"bench memory failed: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(
            lines({"machine": about, "command": command, "tier": result.tier, "rows": result.rows}) + "\n"
        )
    for op, direction in (("read", "region to device"), ("write", "device to region")):
        out.print(_table([row for row in result.rows if row["op"] == op], f"{op}, {direction}"))
    out.print(f"tier: {result.tier}", markup=False, highlight=False, soft_wrap=True)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    """A line for each subject and page size."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("page", "subject", "GB/s", "spread", "of memcpy", "CPU s/GB"):
        table.add_column(column, justify="left" if column == "subject" else "right", no_wrap=True)
    for row in rows:
        low, high = row["spread"]
        table.add_row(
            f"{row['page'] >> 10} KiB", row["subject"], f"{row['gb_per_s']:.2f}", f"{low:.2f}-{high:.2f}",
            f"{row['of_memcpy']:.2f}", f"{row['cpu_s_per_gb']:.3f}",
        )  # fmt: skip
    return table

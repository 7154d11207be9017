"""`hicache-ext bench policy`: a trace over the tier's orders of eviction, as a table, a file and a picture.

Belongs here: options, table, files. Does not belong here: replaying (hicache_ext.bench.policy).
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

_PIPED_WIDTH = 110


def policy_command(
    trace_file: Annotated[Path, typer.Option("--trace", help="Requests in Mooncake's format, one JSON object a line.")],
    capacity: Annotated[
        list[str] | None,
        typer.Option(help="Of the footprint: 0.1 or 10% (repeatable). 1, 5, 10, 25 and 50 % by default."),
    ] = None,
    admission: Annotated[str, typer.Option(help="always, second-hit or write-budget, for every order.")] = "always",
    budget: Annotated[float, typer.Option(help="Pages a day that write-budget lets through.")] = 0.0,
    front: Annotated[
        float, typer.Option(help="An LRU of this part of the footprint before the tier: the engine's own memory.")
    ] = 0.0,
    quick: Annotated[bool, typer.Option(help="1 and 10 % and the first 15,000 requests only.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves to this PNG.")] = None,
) -> None:
    """Token hit ratio of a trace under each order of eviction, beside Belady's bound for prefixes."""
    from hicache_ext.bench import machine, policy
    from hicache_ext.bench.trace import TraceError

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    fractions = tuple(_fraction(text) for text in capacity or ())
    if admission not in policy.ADMISSIONS:
        raise typer.BadParameter(f"{admission!r} is none of {', '.join(policy.ADMISSIONS)}", param_hint="--admission")
    if admission == "write-budget" and budget <= 0:
        raise typer.BadParameter("write-budget needs the pages that it lets through a day", param_hint="--budget")
    if not 0 <= front < 1:
        raise typer.BadParameter("a part of the footprint, from 0 to below 1", param_hint="--front")
    if plot_file is not None:
        try:
            import matplotlib  # noqa: F401 - asked for before the minutes of replay, not after
        except ImportError as error:
            console.print(f"--plot: {error}. Fix: pip install 'hicache-ext\\[bench]'")
            raise typer.Exit(2) from error
    setup = policy.Setup(
        fractions or (policy.QUICK_CAPACITIES if quick else policy.CAPACITIES), admission, budget, front
    )
    try:
        with (
            console.status("reading") as status,
            policy.opened(trace_file, policy.QUICK_REQUESTS if quick else None, status.update) as trace,
        ):
            rows = policy.run(trace, setup, status.update)
            about = {
                "requests": trace.requests,
                "prompt_tokens": trace.tokens,
                "pages": trace.pages,
                "footprint_pages": trace.distinct,
            }
    except TraceError as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(1) from error
    out.print(_table(rows, trace_file.name))
    out.print(
        f"{about['requests']:,} requests, {about['prompt_tokens']:,} prompt tokens; footprint "
        f"{about['footprint_pages']:,} full pages of 512 tokens. A hit is a page usable with all before it. Belady's "
        "row is the most that any policy of that capacity could have.",
        highlight=False,
    )
    if json_file is not None:
        report = {
            "machine": machine.facts(Path.cwd()),
            "command": " ".join(["hicache-ext", *sys.argv[1:]]),
            "trace": {"file": trace_file.name, **about},
            "admission": admission,
            "front_fraction": front,
            "rows": rows,
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_file is not None:
        policy.plot(rows, plot_file, f"{trace_file.name}: {about['requests']:,} requests")


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text!r}: a part of the footprint, such as 0.1 or 10%", param_hint="--capacity")
    return value


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("capacity", justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for column in ("token hit ratio", "of Belady", "of LRU", "written/read"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("rejected", justify="right")
    hits = {(row["capacity_fraction"], row["policy"]): row["token_hit_ratio"] for row in rows}
    last = rows[0]["capacity_fraction"]
    for row in rows:
        fraction, ratio = row["capacity_fraction"], row["token_hit_ratio"]
        if fraction != last:
            table.add_section()
            last = fraction
        per_read = row["bytes_written_per_byte_read"]
        table.add_row(
            f"{100 * fraction:g} %",
            row["policy"] + (" (default)" if row.get("default") else ""),
            f"{ratio:.4f}",
            _part(ratio, hits[fraction, "belady"]),
            _part(ratio, hits[fraction, "lru"]),
            "" if per_read is None else f"{per_read:.2f}",
            _reasons(row.get("rejected", {})),
            style="bold" if row.get("default") else None,
        )
    return table


def _part(value: float, base: float) -> str:
    return f"{value / base:.3f}" if base else ""


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())

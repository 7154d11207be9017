"""`hicache-ext bench tiers`: the tiers of a configuration as a table, verdicts and a file.

Belongs here: options, tables, files. Does not belong here: measuring (hicache_ext.bench.tiers) or goals (tiers_goals).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

#: Columns of a log file or pipe, where rich would assume 80.
_PIPED_WIDTH = 170
_LEAST, _MOST = 4096, 256 << 20


def tiers_command(
    file: Annotated[Path, typer.Option("--config", help="The tiers: .yaml, .json or .toml.", show_default=False)],
    quick: Annotated[bool, typer.Option(help="Fewer and smaller rounds: to see that it works.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    page: Annotated[
        list[str] | None, typer.Option(help="Page size (repeatable): 1MiB and 4MiB, with --quick 1MiB.")
    ] = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="Only this tier (repeatable); `cascade` for all of them together.")
    ] = None,
    dead: Annotated[
        list[str] | None,
        typer.Option(help="The tier that dies in the cascade (repeatable); each that has a server, if not given."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=1024, help="Pages handed over at once.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Bytes of a round, such as 256MiB.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each case.")] = None,
) -> None:
    """Each tier, and all of them together, beside the store's own tool and a plain client, in one run.

    Writes, reads and lookups: throughput, latency of a batch and of a single page, CPU seconds. Pages of nobody else
    are read, evicted or removed: a local tier gets a folder of its own on the same disk, and what was written is
    removed at the end. In the cascade all pages are in the first tier; then a further tier's server refuses, or hangs.
    """
    from hicache_ext.bench import machine, tiers, tiers_goals
    from hicache_ext.bench.tiers_rounds import QUICK, Plan
    from hicache_ext.config import Config, ConfigError

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    left_out: list[str] = []

    def say(line: str) -> None:
        if line not in left_out:
            left_out.append(line)
            console.print(line, markup=False, highlight=False)

    plan = QUICK if quick else Plan()
    sizes = tuple(_size(text, "--page") for text in page or ()) or (plan.pages[:1] if quick else plan.pages)
    plan = replace(
        plan, pages=sizes, batch=batch or plan.batch, rounds=rounds or plan.rounds,
        bytes=_size(size, "--bytes") if size else plan.bytes,
    )  # fmt: skip
    try:
        config = Config.load(file)
        with console.status("starting") as status, _silent():
            plan.progress = status.update
            rows, failed = tiers.run(config, plan, tier or [], dead or [], say)
    except ConfigError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    about = machine.facts(file.resolve().parent)
    tiers_goals.add_passes(rows)
    if rows:
        out.print(table(rows, str(file)))
        out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
        out.print(_words(plan.rounds, plan.batch, plan.singles), highlight=False)
    goals = list(tiers_goals.verdicts(rows))
    for verdict in goals:
        out.print(verdict.line(), style="" if verdict.met else "bold", markup=False, highlight=False)
    for line in failed:
        console.print(f"not measured: {line}", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        written: dict[str, Any] = {"machine": about, "command": " ".join(["hicache-ext", *sys.argv[1:]]), "rows": rows}
        written |= {"goals": [verdict.row() for verdict in goals], "left_out": left_out, "failed": failed}
        json_file.write_text(json.dumps(written, indent=1) + "\n")
    raise typer.Exit(1 if failed else 0)


@contextmanager
def _silent() -> Iterator[None]:
    """What tiers log meanwhile is left out: that one fails is in the answer, that one is dead is meant."""
    loggers = [logging.getLogger(name) for name in ("hicache_ext", "storage_backends")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """One line for each row, ours with its ratios to each of the others."""
    from hicache_ext.bench.io_goals import size_name

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("tier", "page", "what", "subject"):
        made.add_column(column, no_wrap=True)
    for column in ("GB/s (spread)", "CPU s/GB", "batch ms p50 p99", "page ms p50 p99"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("ours beside it: speed, CPU, CPU with a pass", justify="right", no_wrap=True)
    before = None
    for row in rows:
        group = (row["tier"], row["page"], row["case"])
        if before not in (None, group):
            made.add_section()
        before = group
        made.add_row(
            row["tier"], size_name(row["page"]), row["case"], row["subject"], _speed(row), _cpu(row),
            _latency(row["batch_ms"]), _latency(row["page_ms"]), _beside(row),
        )  # fmt: skip
    return made


def _speed(row: dict[str, Any]) -> str:
    if row["gb_per_s"] is None:
        return f"{row['pages_per_s']:,.0f} pages/s"
    return f"{row['gb_per_s']:.2f} ({row['spread'][0]:.2f}-{row['spread'][1]:.2f})"


def _cpu(row: dict[str, Any]) -> str:
    return f"{row['cpu_us_per_page']:.1f} us/page" if row["cpu_s_per_gb"] is None else f"{row['cpu_s_per_gb']:.3f}"


def _latency(found: dict[str, float] | None) -> str:
    return f"{found['p50']:.2f} {found['p99']:.2f}" if found else ""


def _beside(row: dict[str, Any]) -> str:
    lines = []
    for name, ratio in row["beside"].items():
        cpu = "" if ratio["cpu"] is None else f", {ratio['cpu']:.2f}"
        if ratio.get("cpu_with_pass") is not None:
            cpu += f", {ratio['cpu_with_pass']:.2f}"
        lines.append(
            f"{name} {ratio['speed']:.2f} ({ratio['speed_spread'][0]:.2f}-{ratio['speed_spread'][1]:.2f}){cpu}"
        )
    return "\n".join(lines)


def _words(rounds: int, batch: int, singles: int) -> str:
    return (
        f"Medians of {rounds} rounds (spread in brackets), the order of the subjects rotated; ratios are taken round "
        f"by round. Batches of {batch} pages, one after the other; page: one alone, {singles} a round. CPU: all "
        "threads of this process, or the tool's own; no server's. All but the tools move the same memory, and bring "
        "each page into its place; ours compute and check checksums, the others check nothing: the last figure is ours "
        "beside the other's CPU and one pass of checksums over the same bytes, below which nobody who checks can be. "
        "Writes to further tiers of a cascade: not in the time, but in the CPU seconds."
    )


def _size(text: str, hint: str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is no size such as 1MiB", param_hint=hint) from error
    if hint == "--page" and not (_LEAST <= size <= _MOST and size % _LEAST == 0):
        raise typer.BadParameter(f"{text!r} is not a multiple of 4 KiB, up to 256 MiB", param_hint=hint)
    return size

"""`hicache-ext bench vllm-scheduler`: what the connector costs vLLM's scheduler thread, as a table and a file.

Belongs here: options, table, file. Does not belong here: measuring (hicache_ext.bench.vllm_scheduler).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.bench import machine, vllm_scheduler
from hicache_ext.cli.needs import require


def vllm_scheduler_command(
    quick: Annotated[bool, typer.Option(help="Short prompts only.")] = False,
    page: Annotated[int, typer.Option(help="Tokens of a block.", min=1)] = vllm_scheduler.PAGE,
    requests: Annotated[
        int, typer.Option(help="Requests of each length in each of five rounds.", min=1)
    ] = vllm_scheduler.REQUESTS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
) -> None:
    """CPU microseconds of vLLM's scheduler thread for each request, beside the goal of 100 and 1 more for each page.

    Run it in vLLM's environment (`make vllm-env`; build/vllm/bin/hicache-ext).
    """
    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 110)
    require(console, "This plays vLLM's scheduler", ("vllm",), "run it in vLLM's environment (make vllm-env)")
    pages = [number for number in vllm_scheduler.PAGES if not quick or number <= 256]
    with console.status("starting") as status, tempfile.TemporaryDirectory() as folder:
        rows = vllm_scheduler.run(Path(folder), pages, page, requests, status.update)
    about = machine.facts(Path.cwd())
    title = f"vLLM's scheduler thread: 5 rounds of {requests} requests of each length, pages of {page} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("pages", "what", "median us", "least", "most", "goal us", "of goal"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for row in rows:
        values = (row["us"], *row["spread"], row["goal_us"])
        table.add_row(str(row["pages"]), row["what"], *(f"{value:,.0f}" for value in values),
                      f"{row['us'] / row['goal_us']:.2f}")  # fmt: skip
    out.print(table)
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), soft_wrap=True, highlight=False)
    if json_file is not None:
        command = " ".join(["hicache-ext", *sys.argv[1:]])
        json_file.write_text(json.dumps({"machine": about, "command": command, "rows": rows}, indent=1) + "\n")

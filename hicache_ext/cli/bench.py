"""`hicache-ext bench`: measurements as a table for people and a file for scripts.

Belongs here: which benchmarks there are. Does not belong here: their options and tables (bench_io, bench_policy) or
measuring (hicache_ext.bench).
"""

from __future__ import annotations

import typer

from hicache_ext.cli.bench_copy import copy_command
from hicache_ext.cli.bench_events import events_command
from hicache_ext.cli.bench_events_scheduler import events_scheduler_command
from hicache_ext.cli.bench_gds import gds_command
from hicache_ext.cli.bench_index import index_command
from hicache_ext.cli.bench_indexer import indexer_command
from hicache_ext.cli.bench_io import io_command
from hicache_ext.cli.bench_memory import memory_command
from hicache_ext.cli.bench_policy import policy_command
from hicache_ext.cli.bench_router import router_command
from hicache_ext.cli.bench_serve import serve_command
from hicache_ext.cli.bench_tiers import tiers_command
from hicache_ext.cli.bench_vllm_scheduler import vllm_scheduler_command

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("io")(io_command)
app.command("policy")(policy_command)
app.command("index")(index_command)
app.command("copy")(copy_command)
app.command("gds")(gds_command)
app.command("memory")(memory_command)
app.command("serve")(serve_command)
app.command("tiers")(tiers_command)
app.command("events-scheduler")(events_scheduler_command)
app.command("events")(events_command)
app.command("indexer")(indexer_command)
app.command("router")(router_command)
app.command("vllm-scheduler")(vllm_scheduler_command)


@app.callback()
def _group() -> None:
    """Measure storage tiers."""

"""`hicache-ext bench serve`: time to first token by prompt length and tier, of an engine over HTTP.

Belongs here: options, tables, files. Does not belong here: the runs (hicache_ext.cli.serve_run).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.bench.serve_matrix import Tier
from hicache_ext.cli.sizes import size_of

_PIPED_WIDTH = 140
_LENGTHS = (512, 1024, 2048)
_TIERS = (Tier.NONE, Tier.DEVICE, Tier.HOST, Tier.LOCAL)
_VOCABULARY = 30_000


class Phase(StrEnum):
    fill = "fill"
    read = "read"


def serve_command(
    url: Annotated[str, typer.Option(help="An engine that runs: http://HOST:PORT. Else --subject starts some.")] = "",
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help="Start SGLang for it (repeatable): ours, ours-NAME=CONFIG, stock-file, stock-nixl, recompute. With "
            "--url: its name in the rows."
        ),
    ] = None,
    launch: Annotated[
        str, typer.Option(help="SGLang's flags for every subject, in one string. Without: a tiny model on the CPU.")
    ] = "",
    length: Annotated[
        list[int] | None, typer.Option(min=2, help="Prompt tokens (repeatable). 512, 1024 and 2048 by default.")
    ] = None,
    tier: Annotated[
        list[Tier] | None, typer.Option(help="Where the prefix lies (repeatable). All but remote by default.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests under way at a time (repeatable). 1 by default.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Prompts of each length and concurrency; of a trace.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of all subjects, the first one rotated.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each request.")] = 8,
    phase: Annotated[
        Phase | None, typer.Option(help="With --url: fill, then restart the engine, then read. Needs --state.")
    ] = None,
    state_file: Annotated[Path | None, typer.Option("--state", help="What the phases hand each other.")] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="Replay requests in Mooncake's format, twice, instead of the matrix.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0, help="Of the trace's clock: 2 is twice as fast; 0: closed loop of --concurrency.")
    ] = 0.0,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens for each block of 512 of the trace.")] = 512,
    longest: Annotated[int, typer.Option(min=1, help="The trace's prompts are cut to so many tokens.")] = 131_072,
    folder: Annotated[
        Path, typer.Option("--dir", help="Where subjects store and log; on the disk to be measured.")
    ] = Path("build/bench-serve"),
    capacity: Annotated[str, typer.Option(help="Of our local tier where no configuration is given.")] = "8GiB",
    disk: Annotated[
        str, typer.Option(help="Hold the local tier against plain O_DIRECT reads of a file of this size, such as 4GiB.")
    ] = "",
    kv_bytes: Annotated[
        int, typer.Option(min=0, help="Bytes of KV cache for one token, for what --disk compares.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the prompts. By default another one each time.")] = None,
    vocabulary: Annotated[int, typer.Option(min=100, help="Token ids are drawn below it.")] = _VOCABULARY,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of silence after which a request has failed.")] = 300,
    time_limit: Annotated[float, typer.Option(min=0, help="Seconds after which nothing new is begun; 0: none.")] = 0,
    api_key: Annotated[str, typer.Option(envvar="HICACHE_EXT_API_KEY", help="Of the engine at --url.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the times to this PNG.")] = None,
) -> None:
    """Time to first token of an engine over HTTP, with the prompts' prefixes in each of its tiers."""
    from hicache_ext.bench import machine, serve_plot
    from hicache_ext.bench.serve import Plan
    from hicache_ext.bench.serve_client import Client, EngineError
    from hicache_ext.bench.serve_engines import SGLang
    from hicache_ext.bench.serve_matrix import Draw, from_trace, groups
    from hicache_ext.bench.serve_state import State, StateError
    from hicache_ext.bench.trace import TraceError
    from hicache_ext.cli import serve_run, tiny_model
    from hicache_ext.cli.serve_subjects import Launched, SubjectError, parse_subject, split_flags

    console, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    if not console.is_terminal:
        console = Console(stderr=True, width=_PIPED_WIDTH, soft_wrap=True)
    _check(url, subject, launch, phase, state_file, trace_file, speed, plot_file)
    # A stop from outside must stop the servers too: they run in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    report = serve_run.Report(kv_bytes=kv_bytes)
    drawn = Draw(
        int.from_bytes(os.urandom(4), "little") if seed is None else seed,
        vocabulary if url or launch else tiny_model.VOCABULARY,
    )
    about_machine = machine.facts(folder if folder.exists() else Path.cwd())

    def save() -> None:
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            command = " ".join(["hicache-ext", *sys.argv[1:]])
            values = {"machine": about_machine, "command": command, "seed": drawn.seed, **report.values()}
            new = json_file.with_name(f".{json_file.name}.new")
            new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            new.replace(json_file)  # a run may be killed at any time, and what it had is to be whole

    try:
        state = State.load(state_file) if phase is Phase.read and state_file else None
        wanted = groups(length or _LENGTHS, concurrency or (1,), requests)
        if state is not None:
            drawn, new_tokens, wanted = state.draw, state.new_tokens, list(state.expected)
        until = time.monotonic() + time_limit if time_limit else None
        plan = Plan(tuple(wanted), frozenset(tier or _TIERS), drawn, new_tokens, until)
        trace = None
        if trace_file is not None:
            plan = Plan((), plan.tiers, drawn, new_tokens, until)
            found = from_trace(trace_file, drawn, requests, block_tokens, longest)
            trace = serve_run.Trace(found, 0 if speed else (concurrency or [1])[0], speed or 1.0)
        with console.status("starting") as status:
            # Without a terminal the status is silent, and a log should tell where the run is.
            progress = status.update if console.is_terminal else line
            talk = serve_run.Talk(report, line, progress, save)
            if url:
                engine = SGLang(Client(url, timeout, api_key))
                name = (subject or [state.subject if state else ""])[0]
                fill_to = state_file if phase is Phase.fill else None
                serve_run.of_url(engine, name, plan, trace, talk, fill_to, state)
            else:
                flags = split_flags(launch) if launch else []
                each = [
                    Launched(parse_subject(text), folder.absolute(), flags, capacity, timeout) for text in subject or ()
                ]
                serve_run.of_subjects(each, plan, rounds, trace, talk, size_of(disk, "--disk") if disk else 0)
    except (EngineError, StateError, SubjectError, TraceError) as error:
        line(f"bench serve: {error}")
        if report.samples:
            save()
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, SystemExit) as error:
        line("stopped; servers that were started are down")
        save()
        if report.samples:
            _show(report.values(), out)
        raise typer.Exit(error.code if isinstance(error, SystemExit) else 130) from error  # type: ignore[arg-type]
    save()
    values = report.values()
    _show(values, out)
    if json_file is not None:
        line(f"written: {json_file}")
    if plot_file is not None and values["rows"]:
        plot_file.parent.mkdir(parents=True, exist_ok=True)
        serve_plot.plot(values["rows"], plot_file, serve_plot.title_of(values["subjects"]))
        line(f"drawn: {plot_file}")
    if phase is Phase.fill:
        line(f"filled. Now restart the engine, drop the page cache, and run --phase read --state {state_file}")
    if any(row["identical"] is False and row["tier"] != "none" for row in values["rows"]):
        raise typer.Exit(1)
    if not values["rows"]:
        line("nothing was measured")
        raise typer.Exit(1)


def _check(
    url: str,
    subject: list[str] | None,
    launch: str,
    phase: Phase | None,
    state_file: Path | None,
    trace_file: Path | None,
    speed: float,
    plot_file: Path | None,
) -> None:
    """What cannot go together, before anything is started."""
    if not url and not subject:
        raise typer.BadParameter("an engine that runs, or --subject to start some", param_hint="--url")
    if url and (launch or len(subject or ()) > 1):
        raise typer.BadParameter("an engine that runs is one subject and has its flags", param_hint="--url")
    if phase and (not url or state_file is None or trace_file):
        raise typer.BadParameter("goes with --url and --state, and without --trace", param_hint="--phase")
    if speed and not trace_file:
        raise typer.BadParameter("is a trace's. Fix: give --trace", param_hint="--speed")
    if not url and not launch and (missing := [name for name in ("sglang", "safetensors") if find_spec(name) is None]):
        raise typer.BadParameter(f"{missing[0]} is not installed here. Fix: pip install 'hicache-ext[sglang]'")
    if plot_file is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("needs matplotlib. Fix: pip install 'hicache-ext[bench]'", param_hint="--plot")


def _show(values: dict[str, Any], out: Console) -> None:
    from hicache_ext.bench.serve_summary import verdict_line

    out.print(table(values["rows"]))
    passes = {name: about["passes"] for name, about in values["subjects"].items() if "passes" in about}
    for name, found in passes.items():
        for one in found:
            out.print(
                f"{name}, {one['pass']}: {one['requests']} requests ({one['errors']} failed) in {one['seconds']} s, "
                f"{one['prompt_tokens_per_s']:,} prompt tokens/s",
                highlight=False,
            )
    for verdict in values["crossover"]:
        out.print(verdict_line(verdict), highlight=False)
    for bound in values["against_disk"]:
        out.print(
            f"{bound['subject']}, {bound['prompt_tokens']:,} tokens from local: {bound['ratio']:.2f} times what the "
            f"disk ({bound['disk_ms']:,.0f} ms) and a host hit take together",
            highlight=False,
        )
    for cold in values["against_cold"]:
        out.print(
            f"{cold['subject']}: {cold['different']} of {cold['requests']} cold outputs differ from a device hit's",
            highlight=False,
        )
    for goal in values["goals"]:
        out.print(goal["goal"], highlight=False)
    for name, about in values["subjects"].items():
        if about.get("ram_backed"):
            out.print(f"{name}: its storage lies in memory ({about['file_system']}), standing in for a fast disk.")
    out.print(
        "TTFT: from sending to the first token's arrival. Computed and cached: prompt tokens of the row, as the engine "
        "counts them; a row in brackets did not come from its tier. Same: outputs equal to those after a device hit.",
        highlight=False,
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """Rows by concurrency, length and tier, so that subjects stand beside each other."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("prompt", "at a time", "from", "subject"):
        shown.add_column(column, no_wrap=True, justify="right" if column in ("prompt", "at a time") else "left")
    for column in (
        "TTFT ms",
        "p90",
        "p99",
        "TPOT ms",
        "tok/s",
        "computed",
        "device",
        "host",
        "storage",
        "same",
        "failed",
    ):
        shown.add_column(column, justify="right", no_wrap=True)
    order = [str(tier) for tier in Tier]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row.get("pass", ""), row["concurrency"], row["prompt_tokens"], order.index(row["tier"])

    before = None
    for row in sorted(rows, key=place):
        here = place(row)[:3]
        if before not in (None, here) and "pass" not in row:
            shown.add_section()
        before = here
        tokens = row["tokens_from"]
        missed = not row.get("reached", True)
        same = "" if row["identical"] is None else f"{row['requests'] - row['different']}/{row['requests']}"
        shown.add_row(
            f"{row['prompt_tokens']:,}",
            str(row["concurrency"] or "trace"),
            f"({row['tier']})" if missed else row["tier"],
            row["subject"] + (f", {row['pass']}" if "pass" in row else ""),
            *(_number(row[key]) for key in ("ttft_ms", "ttft_p90_ms", "ttft_p99_ms", "tpot_ms", "prompt_tokens_per_s")),
            *(f"{tokens.get(key, 0):,}" for key in ("computed", "device", "host")),
            f"{tokens.get('local', 0) + tokens.get('remote', 0):,}",
            same,
            str(row["errors"] or ""),
            style="dim" if missed else None,
        )
    return shown


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

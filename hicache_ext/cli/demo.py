"""`hicache-ext demo`: the real SGLang server on this machine's CPU, restarted, and what it got back.

What belongs here: the course of the demo, its table and its JSON file. The server process, the prompts and the
model have modules of their own.

Course: a server with an empty local tier answers the requests one at a time ("cold"); it is stopped; a second one
with the same folder answers them again ("replay"). Device and host memory are empty then, so what is not
computed came from the local tier.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import hicache_ext
from hicache_ext.cli import cpu_server, tiny_model
from hicache_ext.cli.cpu_server import DEVICE_TOKENS, HOST_RATIO, PAGE_SIZE
from hicache_ext.cli.serving import Answer, Server, ServerFailed, free_port
from hicache_ext.cli.workload import LONGEST_PROMPT, TOKENS_PER_BLOCK, block_tokens, load_trace, prompt_tokens

app = typer.Typer(add_completion=False)

# Device and host together hold 24,576 tokens, less than the 34,560 different ones of the requests.
NEW_TOKENS = 16
START_LIMIT_S = 600  # imports from a cold disk on a small machine take minutes
SETTLE_LIMIT_S = 10
WARM_UP_BLOCK = 1 << 40  # no block of the trace
TRACE = Path(hicache_ext.__file__).parents[1] / "examples" / "trace" / "mooncake_conversation_24.jsonl"


class Backend(StrEnum):
    """Whose storage tier the server uses: ours, or SGLang's own files to compare with."""

    HICACHE_EXT = "hicache_ext"
    FILE = "file"


@dataclass(frozen=True)
class Settings:
    """folder: everything that the demo writes; its `cache` is emptied at the start. flags: more for the server."""

    folder: Path
    backend: Backend
    prompts: list[list[int]]
    flags: tuple[str, ...] = ()

    @property
    def store(self) -> Path:
        return self.folder / "cache"


@app.command()
def demo(
    backend: Annotated[Backend, typer.Option(help="`file` is SGLang's own, to compare.")] = Backend.HICACHE_EXT,
    requests: Annotated[int, typer.Option(min=1, help="How many requests of the trace.")] = 24,
    folder: Annotated[Path, typer.Option("--dir", help="Model, logs, configuration and cache.")] = Path("build/demo"),
    json_file: Annotated[Path, typer.Option("--json", help="Where the result goes.")] = Path("build/demo.json"),
    trace: Annotated[Path, typer.Option(help="Trace in Mooncake's format, JSON lines.")] = TRACE,
    flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- SGLANG FLAGS]", help="Added to the launch line; the last one wins."),
    ] = None,
) -> None:
    """Run the real SGLang server, restart it, and show what the local tier gave back.

    Ends with code 1 if an output of the replay differs or if nothing came from the local tier.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width, and 80 columns would fold the table
    # A stop from outside must stop the server too: it runs in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        prompts = [prompt_tokens(request, tiny_model.VOCABULARY) for request in load_trace(trace, requests)]
        if not prompts:
            raise ValueError(f"{trace}: holds no requests")
        result = run(Settings(folder.absolute(), backend, prompts, tuple(flags or ())), console)
    except FileNotFoundError as error:
        console.print(
            f"[red]missing:[/] {escape(str(error))}. The demo runs in a source checkout, in what `make venv` made."
        )
        raise typer.Exit(1) from error
    except (ServerFailed, ValueError) as error:
        console.print(f"[red]failed:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        console.print("stopped; the server is down")
        raise typer.Exit(130) from error
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {json_file}")
    if problem := verdict(result):
        console.print(f"[red]{problem}[/]")
        raise typer.Exit(1)


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """The whole course; prints its table and returns what the JSON file holds."""
    _empty(settings)
    model = tiny_model.make(settings.folder / "model")
    config = _write_config(settings)
    console.print(f"model: {model} (random Llama, 4 layers, float32)   tier: {settings.backend}, {settings.store}")
    runs = {}
    for name in ("cold", "replay"):
        port = free_port()
        server = Server(
            command=launch_line(settings, model, config, port),
            log=settings.folder / f"server-{name}.log",
            port=port,
            environment=_environment(settings),
        )
        runs[name] = _one_run(server, name, settings.prompts, console)
    result = summarize(settings.backend, runs["cold"], runs["replay"])
    console.print(table(result))
    return result


def launch_line(settings: Settings, model: Path, config: Path, port: int) -> list[str]:
    """The command that starts the server: SGLang's own, on the CPU."""
    return [
        *(sys.executable, "-m", "sglang.launch_server", *cpu_server.flags(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--skip-server-warmup", "--enable-metrics"),
        *("--enable-hierarchical-cache", "--hicache-storage-backend", str(settings.backend)),
        *("--hicache-storage-prefetch-policy", "wait_complete"),
        *("--hicache-storage-backend-extra-config", f"@{config}"),
        *settings.flags,
    ]


def _environment(settings: Settings) -> dict[str, str]:
    return {**cpu_server.environment(), "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(settings.store)}


def _empty(settings: Settings) -> None:
    """Empties the cache folder, but only one that a demo made."""
    mark = settings.folder / ".made-by-hicache-ext-demo"
    if settings.store.exists() and not mark.exists():
        raise ValueError(f"{settings.store} was not made by this command. Fix: choose another --dir")
    settings.folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    shutil.rmtree(settings.store, ignore_errors=True)
    settings.store.mkdir()


def _write_config(settings: Settings) -> Path:
    # SGLang's key, for both backends: short prefixes are worth asking for here, so that short requests count too.
    values: dict[str, Any] = {"prefetch_threshold": PAGE_SIZE}
    if settings.backend is Backend.HICACHE_EXT:
        values["tiers"] = [{"type": "local", "path": str(settings.store), "capacity": "1GiB"}]
    path = settings.folder / "hicache.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _one_run(server: Server, name: str, prompts: list[list[int]], console: Console) -> list[Answer]:
    """Starts the server, sends every prompt, stops it. The tier has everything when this returns."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console.print(f"{name}: starting SGLang, which takes about a minute; its log is {server.log}")
    # Without a terminal a progress bar is noise in a log; the printed lines say where it is.
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress, server:
        starting = progress.add_task(f"{name}: starting SGLang", total=None)
        took = server.wait_until_up(START_LIMIT_S, lambda seconds: None)
        progress.remove_task(starting)
        console.print(f"{name}: server up after {took:.0f} s")
        warming = progress.add_task(f"{name}: warming up", total=None)
        _warm_up(server)
        progress.remove_task(warming)
        sending = progress.add_task(f"{name}: requests", total=len(prompts))
        answers = []
        for prompt in prompts:
            answers.append(_ask(server, prompt))
            progress.advance(sending)
        stopping = progress.add_task(f"{name}: stopping", total=None)
        begin = time.monotonic()
        server.stop()
        took = time.monotonic() - begin
        progress.remove_task(stopping)
    spent = sum(answer.total_s for answer in answers)
    console.print(f"{name}: {len(answers)} requests in {spent:.1f} s, server stopped in {took:.1f} s")
    return answers


def _warm_up(server: Server) -> None:
    """Compiles and loads what a first request does; its tokens are none of the trace's."""
    prompt = [token for block in range(8) for token in block_tokens(WARM_UP_BLOCK + block, tiny_model.VOCABULARY)]
    _ask(server, prompt)
    server.generate(prompt, NEW_TOKENS)


def _ask(server: Server, prompt: list[int]) -> Answer:
    """One request, and the wait until the tier has its pages.

    The wait keeps the next request's time to first token free of this one's writes, which would flatter the replay
    (it writes nothing), and lets the server be stopped without losing pages.
    """
    before = server.metric("sglang:backuped_tokens_total")
    answer = server.generate(prompt, NEW_TOKENS)
    # The last token generated has no KV yet, and only whole pages are stored.
    whole = (answer.prompt_tokens + len(answer.tokens) - 1) // PAGE_SIZE * PAGE_SIZE
    expected = before + whole - (answer.device + answer.host + answer.storage)
    _wait_for(lambda: server.metric("sglang:backuped_tokens_total") >= expected)
    return answer


def _wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + SETTLE_LIMIT_S
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def summarize(backend: str, cold: list[Answer], replay: list[Answer]) -> dict[str, Any]:
    """The JSON file's content. Tokens are the replay's; times are medians over the requests that the tier served."""
    served = [i for i, answer in enumerate(replay) if answer.storage > 0]
    return {
        "identical": [answer.tokens for answer in cold] == [answer.tokens for answer in replay],
        "requests": len(replay),
        "prompt_tokens": sum(answer.prompt_tokens for answer in replay),
        "tokens": {
            "device": sum(answer.device for answer in replay),
            "host": sum(answer.host for answer in replay),
            "local": sum(answer.storage for answer in replay),
        },
        "ttft_ms": {
            "cold": _median_ms([cold[i].first_token_s for i in served]),
            "local": _median_ms([replay[i].first_token_s for i in served]),
        },
        "backend": str(backend),
        "each": [
            {
                "prompt_tokens": second.prompt_tokens,
                "device": second.device,
                "host": second.host,
                "local": second.storage,
                "cold_cached": first.device + first.host + first.storage,
                "cold_ttft_ms": round(first.first_token_s * 1e3, 1),
                "ttft_ms": round(second.first_token_s * 1e3, 1),
                "identical": first.tokens == second.tokens,
            }
            for first, second in zip(cold, replay, strict=True)
        ],
    }


def _median_ms(seconds: list[float]) -> float | None:
    return round(statistics.median(seconds) * 1e3, 1) if seconds else None


def verdict(result: dict[str, Any]) -> str:
    """Why the demo failed, or an empty string."""
    if not result["identical"]:
        different = [i for i, each in enumerate(result["each"]) if not each["identical"]]
        return f"the outputs of requests {different} differ between the two runs"
    if result["tokens"]["local"] == 0:
        return "nothing was served from the local tier"
    return ""


# Prompts are grouped by length, since the time to first token hangs on it.
GROUPS = ((0, 1024), (1024, 2048), (2048, LONGEST_PROMPT + 1))


def table(result: dict[str, Any]) -> Table:
    """Rows by prompt length and in total, from `summarize`'s result."""
    host = DEVICE_TOKENS * HOST_RATIO
    # Broken by hand: a caption that wraps at the table's width is hard to read.
    shown = Table(
        title=f"Replay after a restart, tier: {result['backend']}",
        caption=(
            f"Requests of a conversation trace, one at a time; each 512-token block is {TOKENS_PER_BLOCK} random\n"
            f"tokens, prompts are cut to {LONGEST_PROMPT:,} tokens, {NEW_TOKENS} greedy tokens each. A tiny random\n"
            f"Llama in float32; device {DEVICE_TOKENS:,} tokens, host {host:,}, pages of {PAGE_SIZE}. Times to first\n"
            "token are medians over the requests that the tier served. Cold: the first run, whose tier was\n"
            "empty; only blocks shared with earlier requests were in memory. Local: after the restart, from\n"
            "the tier. A run on a CPU shows that it works and says nothing of a GPU's speed."
        ),
        caption_justify="left",
    )
    shown.add_column("prompts of", no_wrap=True)
    for column in ("requests", "tokens", "device", "host", "local", "computed", "TTFT cold", "local", "same output"):
        shown.add_column(column, justify="right", no_wrap=True)
    for low, high in GROUPS:
        group = [each for each in result["each"] if low <= each["prompt_tokens"] < high]
        if group:
            shown.add_row(f"{low:,} to {high - 1:,} tokens", *_cells(group))
    shown.add_section()
    shown.add_row("all", *_cells(result["each"]), style="bold")
    return shown


def _cells(group: list[dict[str, Any]]) -> list[str]:
    served = [each for each in group if each["local"] > 0]
    sums = {key: sum(each[key] for each in group) for key in ("prompt_tokens", "device", "host", "local")}

    def median(key: str) -> str:
        return f"{statistics.median(each[key] for each in served):.0f} ms" if served else "-"

    return [
        str(len(group)),
        *(f"{sums[key]:,}" for key in ("prompt_tokens", "device", "host", "local")),
        f"{sums['prompt_tokens'] - sums['device'] - sums['host'] - sums['local']:,}",
        median("cold_ttft_ms"),
        median("ttft_ms"),
        f"{sum(each['identical'] for each in group)}/{len(group)}",
    ]

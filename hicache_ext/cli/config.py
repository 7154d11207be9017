"""`hicache-ext config`: what a configuration file means, and whether its tiers answer.

Belongs here: the words for it, tables and JSON. Does not belong here: the schema (hicache_ext.config), the state of
this machine and its disks (hicache_ext.doctor), or how fast tiers are (`hicache-ext bench`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hicache_ext.config import Config, ConfigError, TierConfig
from hicache_ext.doctor import server
from hicache_ext.doctor.isolation import Call, ask

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")

_SECONDS = 10.0
_WRITES = {
    "through": "every page that is written, in the background",
    "evicted": "pages that the tier before is about to evict, in the background",
    "hits": "pages read {hits} times, in the background",
}
_PROMOTES = {
    "always": "what is read here goes up to the first tier",
    "second_hit": "what is read here twice goes up to the first tier",
    "never": "what is read here stays here",
}


@app.callback()
def _group() -> None:
    """Configuration files."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".yaml, .json or .toml", show_default=False)],
    write: Annotated[
        bool, typer.Option("--write", help="Also store, read back, compare and remove one page of 64 KiB in each tier.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Open and ask nobody: only explain the file. Servers need not be there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Explain a configuration, open each of its tiers and ask it for a page.

    Says what would run: which tiers in which order, which pages reach each of them, what each can do, with which
    libraries and servers, and how long it takes to answer. A lookup
    changes nothing; `--write` stores a page in a namespace of its own and removes it again. A local tier takes a
    writer's part of the directory for that moment, so leave `--write` out beside a busy server.

    Ends with code 0; 1 where a tier does not answer; 2 where the file is wrong.
    """
    try:
        config = Config.load(file)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    if offline and write:
        raise typer.BadParameter("asks the tiers, which --offline does not", param_hint="--write")
    if offline:
        # Some backends know what they can do only once they are open.
        known = [getattr(config.backend(i)[0], "capabilities", None) for i in range(len(config.tiers))]
        pings = [server.Ping() if told is None else server.told(told) for told in known]
        pings = [replace(ping, asked=False) for ping in pings]
    else:
        calls = [partial(server.ping, config, i, write) for i in range(len(config.tiers))]
        answers = ask([Call(call, _SECONDS, server.Ping) for call in calls])
        pings = [
            answer.value if not answer.problem
            else server.Ping(problem=answer.problem, fix="look whether its server or disk answers")
            for answer in answers
        ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(_as_dict(file, config, pings), indent=1))
    else:
        _print(file, config, pings)
    raise typer.Exit(1 if any(ping.problem for ping in pings) else 0)


def reaches(config: Config, tier: int) -> str:
    """Which pages get to a tier, in words."""
    chosen = config.tiers[tier]
    return "every page that is written" if tier == 0 else _WRITES[chosen.write].format(hits=chosen.write_hits)


def _options(config: Config, tier: int) -> dict[str, str]:
    """The backend's options as they will be used; secrets show as stars."""
    _, options = config.backend(tier)
    shown = {name: str(value) for name, value in options if value is not None}
    given = config.tiers[tier].options
    return {name: value if name in given else f"{value} (default)" for name, value in shown.items()}


def _print(file: Path, config: Config, pings: list[server.Ping]) -> None:
    out = Console(soft_wrap=True, highlight=False)
    out.print(f"{file}: valid, {len(pings)} tier{'s' if len(pings) > 1 else ''}, fast to slow", markup=False)
    for i, (tier, ping) in enumerate(zip(config.tiers, pings, strict=True)):
        table = Table(box=box.SIMPLE, show_header=False, title=f"{i}: {_named(tier)}", title_justify="left")
        table.add_row("gets", reaches(config, i))
        if i:
            table.add_row("gives", _PROMOTES[tier.promote])
        for name, value in _options(config, i).items():
            table.add_row(name, value)
        if ping.problem:
            table.add_row("[red]does not answer[/red]", ping.problem)
            table.add_row("fix", ping.fix)
        else:
            kept = "kept over restarts" if ping.persistent else "gone with the process"
            whose = "shared with other processes" if ping.shared else "this process's own"
            what = f"{ping.medium}, {kept}, {whose}" if ping.medium else ""
            table.add_row("[green]answers[/green]" if ping.asked else "not asked", what)
        if ping.versions:
            table.add_row("by", ", ".join(f"{name} {version}" for name, version in ping.versions.items()))
        if ping.lookup_ms is not None and not ping.problem:
            table.add_row("lookup", f"{ping.lookup_ms} ms")
            if ping.write_ms is not None:
                table.add_row("write, read", f"{ping.write_ms} ms, {ping.read_ms} ms, bytes equal")
        out.print(table)
    out.print(f"salt: {'set' if config.salt else 'none'}", markup=False)
    if len(pings) > 1:
        out.print(f"background copies: up to {config.background_bytes.human_readable()} of memory a tier")


def _named(tier: TierConfig) -> str:
    return tier.label if tier.label == tier.type else f"{tier.label} ({tier.type})"


def _as_dict(file: Path, config: Config, pings: list[server.Ping]) -> dict[str, Any]:
    return {
        "file": str(file),
        "ok": not any(ping.problem for ping in pings),
        "tiers": [
            {
                "name": tier.label, "type": tier.type, "gets": reaches(config, i), "write": tier.write,
                "promote": tier.promote, "options": _options(config, i), **asdict(ping),
            }
            for i, (tier, ping) in enumerate(zip(config.tiers, pings, strict=True))
        ],
    }  # fmt: skip

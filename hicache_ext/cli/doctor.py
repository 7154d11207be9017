"""`hicache-ext doctor`: the check-up as lines for people or JSON for scripts, and its exit code.

Belongs here: options and output. Does not belong here: what is looked at (hicache_ext.doctor).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hicache_ext.doctor import Finding, Level, checkup

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, readable=True,
            help="Configuration whose tiers to check as well (.yaml, .json, .toml).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:  # fmt: skip
    """Check this machine, this install and a configuration; say what to do about what is wrong.

    Looks at the I/O engines and why each works or not, checksums, versions, the SGLang plugin, memory limits, huge
    pages, and, with `--config`, at each tier's disk, direct I/O, room, file descriptors and contents. Run it with the
    Python, as the user and in the container that will serve: the answers belong to them. It changes nothing, needs
    no root, and ends within half a minute even if a disk hangs.

    A **warning** works, but slower or less than it could; an **error** does not work. Each comes with its fix.

    Ends with code 0 without errors, 1 with errors, 2 for a wrong call.
    """
    findings = checkup(config)
    counts = Counter(finding.level for finding in findings)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "ok": not counts[Level.ERROR],
                    "errors": counts[Level.ERROR],
                    "warnings": counts[Level.WARNING],
                    "findings": [asdict(finding) for finding in findings],
                },
                indent=1,
            )
        )
    else:
        _print(findings, counts)
    raise typer.Exit(1 if counts[Level.ERROR] else 0)


def _print(findings: list[Finding], counts: Counter[Level]) -> None:
    out = Console(soft_wrap=True, highlight=False)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        out.print(f"{finding.level:<8}", style=_COLOURS[finding.level], end="")
        out.print(f"{finding.name:<{width}}  {finding.text}", markup=False)
        if finding.fix:
            out.print(f"{'':<{8 + width}}  fix: {finding.fix}", markup=False)
    errors, warnings = counts[Level.ERROR], counts[Level.WARNING]
    plural = "" if errors == 1 else "s", "" if warnings == 1 else "s"
    out.print(f"{errors} error{plural[0]}, {warnings} warning{plural[1]}, {counts[Level.OK]} in order")

"""`hicache-ext verify`: the checksum scrub of a local tier's directory, with progress and a bandwidth limit.

Belongs here: options, progress, the list of damage, the exit code. Does not belong here: reading slots and judging
them (storage_backends.local.scrub).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hicache_ext.cli.inspect import print_problems, problem_rows, size
from storage_backends.local import scrub
from storage_backends.local.scrub import Scrub, ScrubReport, SlotVerdict
from storage_backends.local.survey import NotATier

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_PIPED_WIDTH = 110
_DAMAGE_SHOWN = 50
_INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended


def _rate(text: str) -> float | None:
    """Bytes a second from "200MB/s"; None for no limit."""
    if text.strip().lower() in ("none", "0"):
        return None
    try:
        rate = TypeAdapter(ByteSize).validate_python(text.strip().removesuffix("/s"))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is not a rate. Write 200MB/s, 1GiB/s, or none") from error
    if rate <= 0:
        raise typer.BadParameter("must be more than 0 bytes a second, or none")
    return float(rate)


@app.command()
def verify(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="The `path` of a local tier, all of several.")
    ],
    limit: Annotated[str, typer.Option(metavar="RATE", help="Read no faster: 200MB/s, 1GiB/s, none.")] = "200MB/s",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, with every damaged slot.")
    ] = False,
) -> None:
    """Read every page in the directory of a local tier and check it against its checksums.

    Nothing is changed, no lock is taken and the page cache is left alone, so it may run beside a server; the limit
    leaves the disk to the server. What a running writer changes meanwhile is looked at twice before it is called
    damaged. Damage costs a recomputation, never a wrong answer: the server checks every page as it reads it.

    Slots are valid, damaged, empty, foreign (whole, but not a page of this place: left by an earlier use), or changing
    (being written now).

    Ends with code 0; 1 where a slot is damaged or a file could not be checked; 2 where DIR is no local tier of this
    version.
    """
    rate = _rate(limit)
    notes = Console(stderr=True)
    columns = (
        TextColumn("verify"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[said]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
            task = bar.add_task("verify", said="")

            def advance(now: scrub.Progress) -> None:
                said = f"{size(now.bytes_read)}, {now.damaged} damaged"
                bar.update(task, completed=now.slots, total=max(1, now.total), said=said)

            reports = [Scrub(directory, rate, advance).run() for directory in directories]
    except NotATier as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("interrupted: not everything was checked", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    told = list(zip(directories, reports, strict=True))
    if as_json:
        found = [_as_dict(directory, report) for directory, report in told]
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        for directory, report in told:
            _print(directory, report)
    raise typer.Exit(0 if all(report.clean for report in reports) else 1)


def _print(directory: Path, report: ScrubReport) -> None:
    out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    counts = ", ".join(
        f"{report.counts[verdict]} {verdict}"
        for verdict in SlotVerdict
        if report.counts[verdict] or verdict is not SlotVerdict.CHANGING
    )
    out.print(f"{directory}: {sum(report.counts.values())} slots, {report.named} of them named by a log: {counts}")
    out.print(f"{size(report.bytes_read)} read in {report.seconds:.1f} s")
    for damage in report.damaged[:_DAMAGE_SHOWN]:
        out.print("[red]damaged[/red] ", end="")
        key = damage.key.hex() or "unknown"
        out.print(
            f"{damage.path} offset {damage.offset} key {key}: {damage.reason}"
            + ("" if damage.named else " (no log names it)"),
            markup=False,
            soft_wrap=True,
        )
    if len(report.damaged) > _DAMAGE_SHOWN:
        out.print(f"and {len(report.damaged) - _DAMAGE_SHOWN} more (--json lists all)")
    print_problems(out, report.problems)
    if report.damaged:
        out.print("Nothing to do: a damaged page is a miss, and the next write of it heals it. Many: look at the disk.")


def _as_dict(directory: Path, report: ScrubReport) -> dict[str, Any]:
    return {
        "path": str(directory),
        "clean": report.clean,
        "slots": {str(verdict): report.counts[verdict] for verdict in SlotVerdict},
        "named": report.named,
        "damaged": [
            {
                "file": str(damage.path),
                "offset": damage.offset,
                "slot": damage.slot,
                "namespace": damage.namespace.hex(),
                "key": damage.key.hex() or None,
                "named": damage.named,
                "reason": damage.reason,
            }
            for damage in report.damaged
        ],
        "bytes_read": report.bytes_read,
        "seconds": round(report.seconds, 3),
        "problems": problem_rows(report.problems),
    }

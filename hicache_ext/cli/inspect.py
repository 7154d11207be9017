"""`hicache-ext inspect`: what a local tier's directory holds, as tables for people and JSON for scripts.

Belongs here: options, tables, JSON. Does not belong here: reading the directory (storage_backends.local.survey).
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

from storage_backends.format import VERSION
from storage_backends.local.survey import FolderSurvey, NamespaceSummary, NotATier, Problem, Survey, summarise, survey

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

#: Columns of a log file or pipe, where rich would assume 80.
_PIPED_WIDTH = 110
_PROBLEMS_SHOWN = 20

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@app.command()
def inspect(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="The `path` of a local tier, all of several.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what the directory of a local tier holds: namespaces, writers, pages, bytes, ages, chains.

    A namespace is everything that must match for pages to be reused: model, weights, layout, shard. Two servers that
    should share pages and show as two namespaces differ in one of those fields.

    Reads extent headers and logs only, so it is quick, and safe beside a running server: no lock is taken, nothing
    is written. Pages that no log names (after a crash) are not counted; `hicache-ext verify` finds them.

    Ends with code 0, or 2 where DIR is no local tier of this version.
    """
    try:
        found = together([survey(directory) for directory in directories])
    except NotATier as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    namespaces = summarise(found)
    if as_json:
        typer.echo(json.dumps(_as_dict(directories, found, namespaces), indent=1))
        return
    out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    out.print(_folders(directories, found))
    for namespace in namespaces:
        out.print(_namespace(namespace))
    if not namespaces:
        out.print("No extents yet: nothing has been stored here.")
    print_problems(out, found.problems)


def together(disks: list[Survey]) -> Survey:
    """What the disks of one tier hold: a chain may span them."""
    found = Survey(disks[0].path)
    for disk in disks:
        found.folders += disk.folders
        found.problems += disk.problems
    return found


def _name(directories: list[Path], folder: FolderSurvey) -> str:
    """Of a folder: where there are several disks, with its path."""
    return folder.path.name if len(directories) == 1 else str(folder.path)


def print_problems(out: Console, problems: list[Problem]) -> None:
    """What was met that should not be there, a line each."""
    for problem in problems[:_PROBLEMS_SHOWN]:
        out.print(f"[yellow]{problem.kind}[/yellow] ", end="")
        out.print(f"{problem.path}: {problem.text}", markup=False, soft_wrap=True)
    if len(problems) > _PROBLEMS_SHOWN:
        out.print(f"and {len(problems) - _PROBLEMS_SHOWN} more (--json lists all)")


def problem_rows(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"path": str(problem.path), "kind": problem.kind, "text": problem.text} for problem in problems]


def size(value: float) -> str:
    """Bytes for people: "1.5 MiB"."""
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _folders(directories: list[Path], found: Survey) -> Table:
    names = ", ".join(map(str, directories))
    table = Table(
        title=f"{names}: local tier, format {VERSION}", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1)
    )
    for column in ("folder", "writer"):
        table.add_column(column, no_wrap=True)
    for column in ("extents", "bytes", "slots", "pages", "pages lost", "hit lately", "stored lately"):
        table.add_column(column, justify="right", no_wrap=True)
    for folder in found.folders:
        table.add_row(
            _name(directories, folder),
            "alive" if folder.live else "none",
            str(len(folder.extents)),
            size(folder.file_bytes),
            str(folder.slots),
            str(sum(map(len, folder.pages.values()))),
            str(folder.lost),
            *((size(folder.use.hit), size(folder.use.stored)) if folder.use else ("", "")),
        )
    return table


def _namespace(namespace: NamespaceSummary) -> Table:
    table = Table(
        title=f"namespace {namespace.digest.hex()}", box=None, show_header=False, title_justify="left", padding=(0, 1)
    )
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in _facts(namespace):
        table.add_row(name, text)
    table.add_section()
    return table


def _facts(namespace: NamespaceSummary) -> list[tuple[str, str]]:
    fields = dict(namespace.description)
    layout, shard = fields.pop("layout", {}), fields.pop("shard", {})
    facts = [(name, str(value)) for name, value in sorted(fields.items()) if value not in ("", None)]
    if isinstance(layout, dict):
        facts.append(("layout", ", ".join(f"{name} {_short(value)}" for name, value in sorted(layout.items()))))
    if isinstance(shard, dict):
        groups = [name[:-5] for name in sorted(shard) if name.endswith("_size")]
        facts.append(
            ("shard", ", ".join(f"{g} {shard.get(g + '_rank')} of {shard[g + '_size']}" for g in groups) or "unknown")
        )
    if not namespace.description:
        facts = [("description", "its extents do not say what it is")]
    chains = namespace.chains
    page = f"{size(namespace.slot_bytes)} on the disk"
    if namespace.payload_bytes and namespace.overhead is not None:
        page = f"{size(namespace.payload_bytes)}, {page} ({namespace.overhead:.1%} header and padding)"
    facts += [
        ("page", page),
        ("extents", f"{namespace.extents} in {namespace.folders} folder(s), {size(namespace.file_bytes)}"),
        ("pages", f"{namespace.pages} in {namespace.slots} slots" + f", {namespace.copies} stored twice"),
    ]
    if namespace.pages:
        facts += [
            ("age", f"oldest {age(namespace.oldest)}, median {age(namespace.median)}, newest {age(namespace.newest)}"),
            ("chains", f"{chains.chains}, longest {chains.longest} pages, median {chains.median:g}"),
            ("usable", f"{chains.usable} pages with all their ancestors here, {chains.orphaned} without"),
        ]
    return facts


def _short(value: Any) -> str:
    """A list of many equal numbers as "64 x 8192"."""
    if isinstance(value, list) and len(value) > 2 and all(item == value[0] for item in value):
        return f"{len(value)} x {value[0]}"
    return str(value)


def _as_dict(directories: list[Path], found: Survey, namespaces: list[NamespaceSummary]) -> dict[str, Any]:
    """`path` is a list where several were named."""
    return {
        "path": str(found.path) if len(directories) == 1 else list(map(str, directories)),
        "format": VERSION,
        "folders": [
            {
                "name": _name(directories, folder),
                "live": folder.live,
                "extents": len(folder.extents),
                "bytes": folder.file_bytes,
                "slots": folder.slots,
                "pages": sum(map(len, folder.pages.values())),
                "pages_lost": folder.lost,
                "retired_bytes": folder.retired_bytes,
                "use": folder.use._asdict() if folder.use else None,
            }
            for folder in found.folders
        ],
        "namespaces": [
            {
                "namespace": namespace.digest.hex(),
                "description": namespace.description,
                "slot_bytes": namespace.slot_bytes,
                "payload_bytes": namespace.payload_bytes,
                "overhead": namespace.overhead,
                "folders": namespace.folders,
                "extents": namespace.extents,
                "slots": namespace.slots,
                "bytes": namespace.file_bytes,
                "pages": namespace.pages,
                "copies": namespace.copies,
                "age_s": {"oldest": namespace.oldest, "median": namespace.median, "newest": namespace.newest}
                if namespace.pages
                else None,
                "chains": {
                    "chains": namespace.chains.chains,
                    "longest": namespace.chains.longest,
                    "median": namespace.chains.median,
                    "usable_pages": namespace.chains.usable,
                    "orphaned_pages": namespace.chains.orphaned,
                },
            }
            for namespace in namespaces
        ],
        "problems": problem_rows(found.problems),
    }

"""What a probe says.

Does not belong here: how it found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, slower or less than it could
    ERROR = "error"  # does not work


@dataclass(frozen=True)
class Finding:
    """One fact. name: what was looked at, stable for scripts. text: what is so. fix: what to do, best a command."""

    name: str
    level: Level
    text: str
    fix: str = ""


def ok(name: str, text: str) -> Finding:
    return Finding(name, Level.OK, text)


def warning(name: str, text: str, fix: str) -> Finding:
    return Finding(name, Level.WARNING, text, fix)


def error(name: str, text: str, fix: str) -> Finding:
    return Finding(name, Level.ERROR, text, fix)

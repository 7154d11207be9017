"""Measuring GPU-direct storage: pages between a disk and device memory, beside the other ways there.

Belongs here: cells, rounds, checks and rows of `bench gds`. Does not belong here: the ways (gds_subjects), tables and
files (hicache_ext.cli.bench_gds).

A page is one buffer. Every subject writes and reads as many bytes, in turns that are drawn anew each round, on the same
file system; slots were written before they are measured, so that no file grows. Nothing comes from the page cache.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hicache_ext.bench.gds_subjects import Cell, CuFile, NotHere, Ours, PlainDisk, Staging, Subject


@dataclass(frozen=True)
class Plan:
    """pages: page sizes (bytes). bytes: of one turn of one subject. ways: of asking cuFile; "auto": as it decides."""

    pages: tuple[int, ...] = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20)
    bytes: int = 128 << 20
    rounds: int = 5
    ways: tuple[str, ...] = ("auto",)


QUICK = Plan((256 << 10, 8 << 20), 64 << 20, 3)
#: Bytes of each subject that are compared before anything is measured.
_CHECKED_BYTES = 32 << 20


@dataclass
class Result:
    """rows: of every cell. decisions: about cuFile, by way."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    decisions: dict[str, str] = field(default_factory=dict)


def run(folder: Path, plan: Plan, result: Result, say: Callable[[str], None]) -> None:
    """Cell by cell into `result`. NotHere: not one of these ways. RuntimeError when a page is wrong."""
    ways = list(plan.ways)
    modes: tuple[str, ...] = ("auto", "compatibility")  # what "auto" would not take is measured all the same
    for page in plan.pages:
        for way in list(ways):
            try:
                made = Cell(folder / f"{page}-{way}", page, max(1, plan.bytes // page), way, modes)
            except NotHere as error:
                result.decisions[way] = str(error)
                ways.remove(way)
                if not ways:
                    raise
                continue
            with made as cell:
                result.decisions[way] = str(cell.backend.decision)
                modes = (cell.backend.options.mode,)  # a trial takes a second or two
                subjects: list[Subject] = [Ours(cell), CuFile(cell)]
                if way == ways[0]:  # these are the same for every way
                    subjects += [Staging(cell), PlainDisk(cell)]
                say(f"{page >> 10} KiB, {way}: checking")
                with cell.only(max(1, _CHECKED_BYTES // page)):
                    check(cell, subjects)
                say(f"{page >> 10} KiB, {way}: filling")
                cell.fill()
                say(f"{page >> 10} KiB, {way}: measuring")
                result.rows += _measure(cell, subjects, plan.rounds)
                for subject in subjects:
                    subject.close()


def check(cell: Cell, subjects: Sequence[Subject]) -> None:
    """What a subject writes is what it reads; and ours and staging read what the other one wrote."""
    for subject in subjects:
        cell.draw(subject.memory)
        subject.write()
        for reader in [other for other in subjects if other is subject or (subject.shares and other.shares)]:
            wanted = cell.bytes_in(subject.memory)
            cell.poison(reader.memory)
            reader.keys = subject.keys
            reader.read()
            if cell.bytes_in(reader.memory) != wanted:
                raise RuntimeError(f"{reader.name} read other bytes than {subject.name} had written: {cell}")


def _measure(cell: Cell, subjects: Sequence[Subject], rounds: int) -> list[dict[str, Any]]:
    samples: dict[tuple[str, str], list[float]] = {}
    draw = random.Random(1)
    for round_ in range(rounds + 1):
        for subject in draw.sample(list(subjects), len(subjects)):
            taken = {"write": subject.write(), "read": subject.read()}
            if round_:  # the first warms up
                for op, seconds in taken.items():
                    samples.setdefault((subject.name, op), []).append(seconds)
    return [_row(cell, subject, op, samples[subject.name, op]) for subject in subjects for op in ("read", "write")]


def _row(cell: Cell, subject: Subject, op: str, seconds: list[float]) -> dict[str, Any]:
    speeds = sorted(cell.bytes / 1e9 / each for each in seconds)
    return {
        "subject": subject.name,
        "op": op,
        "page": cell.page,
        "pages": cell.pages,
        "gb_per_s": round(statistics.median(speeds), 3),
        "spread": [round(speeds[0], 3), round(speeds[-1], 3)],
        "way": subject.way,
        "mode": str(cell.backend.decision.mode) if subject.way else "",
        "rounds": len(speeds),
    }

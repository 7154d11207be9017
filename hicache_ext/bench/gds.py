"""Measuring GPU-direct storage: pages between a disk and device memory, beside the other ways there.

Belongs here: cells, rounds, checks and rows of `bench gds`. Does not belong here: the ways (gds_subjects), tables and
files (hicache_ext.cli.bench_gds).

A page is one buffer. Every subject writes and reads as many bytes, in turns that are drawn anew each round, on the same
file system; slots were written before they are measured, so that no file grows. Nothing comes from the page cache.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hicache_ext.bench.gds_subjects import TURNS, Cell, CuFile, NotHere, Ours, PlainDisk, Staging, Subject


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
    """rows: of every cell; of a subject that failed there, "gb_per_s" is None and "failed" says why. decisions: about
    cuFile, by way."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    decisions: dict[str, str] = field(default_factory=dict)


def run(folder: Path, plan: Plan, result: Result, say: Callable[[str], None]) -> None:
    """Cell by cell into `result`. NotHere: not one of these ways."""
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
                kinds: list[type[Subject]] = [Ours, CuFile]
                if way == ways[0]:  # these are the same for every way
                    kinds += [Staging, PlainDisk]
                of_cell = _OfCell(cell, result)
                of_cell.make(kinds)
                say(f"{page >> 10} KiB, {way}: checking")
                with cell.only(max(1, _CHECKED_BYTES // page)):
                    of_cell.check()
                say(f"{page >> 10} KiB, {way}: filling")
                of_cell.fill()
                say(f"{page >> 10} KiB, {way}: measuring")
                of_cell.measure(plan.rounds)
                of_cell.close()


class _OfCell:
    """A cell's subjects. One that fails is a row that says so, and the others go on without it."""

    def __init__(self, cell: Cell, result: Result) -> None:
        self.cell, self.result = cell, result
        self.made: list[Subject] = []
        self.running: list[Subject] = []

    def make(self, kinds: Sequence[type[Subject]]) -> None:
        for kind in kinds:
            with self._failing(kind):
                self.made.append(kind(self.cell))
        self.running = list(self.made)

    def check(self) -> None:
        """What a subject writes is what it reads; and ours and staging read what the other one wrote."""
        for writer in list(self.running):
            with self._failing(writer):
                self.cell.draw(writer.memory)
                writer.write()
                self._read_back(writer, writer)
            for reader in [other for other in self.running if other is not writer and other.shares and writer.shares]:
                with self._failing(reader):
                    self._read_back(writer, reader)

    def _read_back(self, writer: Subject, reader: Subject) -> None:
        cell = self.cell
        wanted = cell.bytes_in(writer.memory)
        cell.poison(reader.memory)
        reader.keys = writer.keys
        reader.read()
        if cell.bytes_in(reader.memory) != wanted:
            raise RuntimeError(f"{reader.name} read other bytes than {writer.name} had written: {cell}")

    def fill(self) -> None:
        """Until every slot has been written once."""
        for subject in [one for one in self.running if one.shares][-1:]:
            with self._failing(subject):
                for _ in range(TURNS + 2):
                    subject.write()

    def measure(self, rounds: int) -> None:
        samples: dict[tuple[str, str], list[float]] = {}
        draw = random.Random(1)
        for round_ in range(rounds + 1):
            for subject in draw.sample(self.running, len(self.running)):
                with self._failing(subject):
                    taken = {"write": subject.write(), "read": subject.read()}
                    if round_:  # the first warms up
                        for op, seconds in taken.items():
                            samples.setdefault((subject.name, op), []).append(seconds)
        self.result.rows += [
            _row(self.cell, subject, op, samples[subject.name, op])
            for subject in self.running
            for op in ("read", "write")
        ]

    def close(self) -> None:
        for subject in self.made:
            subject.close()

    @contextmanager
    def _failing(self, subject: Subject | type[Subject]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.running = [one for one in self.running if one is not subject]
            self.result.rows += [_failed(self.cell, subject, op, str(error) or repr(error)) for op in ("read", "write")]


def _failed(cell: Cell, subject: Subject | type[Subject], op: str, why: str) -> dict[str, Any]:
    facts = {"subject": subject.name, "op": op, "page": cell.page, "pages": cell.pages, "gb_per_s": None, "failed": why}
    return facts | {"way": subject.way, "mode": str(cell.backend.decision.mode) if subject.way else ""}


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

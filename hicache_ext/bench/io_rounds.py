"""Rounds: what a subject is, in which order subjects take their turns, and the rows that come of it.

Belongs here: subjects and cases as such, time and CPU of a round, medians. Does not belong here: any particular
subject (io, io_engine, io_fio, io_nixl), or what is compared with what (io_goals).

Cases, in this order:

    first fill   the pages are new and so is the disk space
    overwrite    the space has been written before: pages take the place of older ones
    cold         reads; nothing comes from the page cache
    warm         reads of files that are in the page cache (stock only)
    mixed        half of the pages read, half overwrite, taking turns
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hicache_ext.bench import io_ticker

CASES = ("first fill", "overwrite", "cold", "warm", "mixed")
_OPS = {"first fill": "write", "overwrite": "write", "cold": "read", "warm": "read", "mixed": "mixed"}


@dataclass(frozen=True)
class Timing:
    """One round. seconds: wall clock. cpu: user and system seconds of every thread that took part."""

    seconds: float
    cpu: float
    bytes: int


class Subject(ABC):
    """One way between memory and disk. pages: "huge" or "4k", what its memory lies in.

    A round of a case is `before` (not timed), `go` (timed), `after` (not timed).
    """

    name: str
    engine: str
    depth: int
    pages: str
    cases: tuple[str, ...] = ("first fill", "overwrite", "cold")
    bytes: int  # of one round

    def before(self, case: str) -> None:
        """Lay out what the round needs; after this nothing of a read may come from the page cache."""

    @abstractmethod
    def go(self, case: str) -> None: ...

    def after(self, case: str) -> None:
        """RuntimeError when the round did not do what it should have."""

    def fill_up(self) -> None:
        """Between first fill and overwrite: use up what space has never been written."""

    def timed(self, case: str) -> Timing:
        before, since = process_cpu(), time.perf_counter()
        self.go(case)
        return Timing(time.perf_counter() - since, process_cpu() - before, self.bytes)

    def close(self) -> None: ...


@dataclass
class Samples:
    """Rounds of one case. late_ms: the ticker's delays, from rounds of their own."""

    rounds: list[Timing] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    subject: str
    engine: str
    case: str
    block: int
    depth: int
    pages: str


@dataclass
class Setup:
    """rounds: of each case. ticker_seconds: at least so long under each kind of load, and idle."""

    rounds: int
    ticker_seconds: float
    progress: Callable[[str], None]


def measure(subjects: Sequence[Subject], block: int, setup: Setup) -> list[dict[str, Any]]:
    """Rows of these subjects, which take turns, in another order each round."""
    samples: dict[Case, Samples] = {}
    what = f"{block >> 10} KiB, depth {max(subject.depth for subject in subjects)}, {subjects[0].pages} pages"
    setup.progress(f"{what}: idle")
    idle = io_ticker.p99(io_ticker.idle(setup.ticker_seconds))
    for case in CASES:
        taking_part = [subject for subject in subjects if case in subject.cases]
        if case == "overwrite":
            for subject in taking_part:
                subject.fill_up()
        for round_ in range(setup.rounds):
            setup.progress(f"{what}: {case} {round_ + 1}/{setup.rounds}")
            for subject in _rotated(taking_part, round_):
                taken = samples.setdefault(_case(subject, case, block), Samples())
                taken.rounds.append(_round(subject, case))
        if case == "first fill":
            continue  # its ticker is overwrite's: new space cannot be had for as long as one likes
        for subject in taking_part:
            setup.progress(f"{what}: {case}, ticker")
            samples[_case(subject, case, block)].late_ms = _under_load(subject, case, setup.ticker_seconds)
    rows = []
    for key, taken in samples.items():
        loaded = taken
        if key.case == "first fill":
            loaded = samples.get(Case(**{**vars(key), "case": "overwrite"}), taken)
        rows.append(row(key, taken, idle, io_ticker.p99(loaded.late_ms)))
    return rows


def row(case: Case, taken: Samples, idle_ms: float, load_ms: float) -> dict[str, Any]:
    speeds = sorted(each.bytes / 1e9 / each.seconds for each in taken.rounds)
    return {
        "subject": case.subject,
        "engine": case.engine,
        "op": _OPS[case.case],
        "case": case.case,
        "block": case.block,
        "depth": case.depth,
        "pages": case.pages,
        "gb_per_s": round(statistics.median(speeds), 4),
        "spread": [round(speeds[0], 4), round(speeds[-1], 4)],
        "cpu_s_per_gb": round(statistics.median(each.cpu / (each.bytes / 1e9) for each in taken.rounds), 4),
        "ticker_p99_ms": {"idle": round(idle_ms, 3), "load": round(load_ms, 3)},
        "rounds": len(speeds),
    }


def process_cpu() -> float:
    """User and system seconds of all threads of this process, ended ones and the kernel's I/O workers included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_of(pid: int) -> float:
    """The same of another process, ended threads included; 0 where it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _case(subject: Subject, case: str, block: int) -> Case:
    name = f"{subject.name}-warm" if case == "warm" else subject.name  # not to be taken for a read from the disk
    return Case(name, subject.engine, case, block, subject.depth, subject.pages)


def _rotated(subjects: list[Subject], round_: int) -> list[Subject]:
    turn = round_ % len(subjects) if subjects else 0
    return subjects[turn:] + subjects[:turn]


def _round(subject: Subject, case: str, ticker: io_ticker.Ticker | None = None) -> Timing:
    subject.before(case)
    if ticker is None:
        timing = subject.timed(case)
    else:
        with ticker:
            timing = subject.timed(case)
    subject.after(case)
    return timing


def _under_load(subject: Subject, case: str, seconds: float) -> list[float]:
    """The ticker's delays over rounds that are not counted: the ticker itself costs CPU."""
    ticker, spent = io_ticker.Ticker(), 0.0
    while spent < seconds:
        spent += _round(subject, case, ticker).seconds
    return ticker.late_ms

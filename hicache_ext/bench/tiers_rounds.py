"""Rounds of `bench tiers`: what a subject is, batches of pages, whose turn it is, and the rows that come of it.

Belongs here: subjects and cases as such, time and CPU of a round, medians, ratios. Does not belong here: any particular
subject (tiers_ours, tiers_<type of tier>), or which ratios are wanted (tiers_goals).

Cases, in this order:

    write       pages that are new to the store; ours have looked them up before, as an engine does before it computes
    overwrite   the same, where the store makes room by evicting older ones (a store of a fixed size only)
    read        each page into its place in memory
    lookup      whether the pages are there; all of them are
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.io_rounds import cpu_of, process_cpu
from hicache_ext.page import Namespace, PageLayout, chain_parents
from storage_backends.base import PageBatch

CASES = ("write", "overwrite", "read", "lookup")
_WRITES = ("write", "overwrite")


class Role(StrEnum):
    """ours: what is measured. plain: does the same by hand, unchecked. tool: the store's own, which times itself."""

    OURS = "ours"
    PLAIN = "plain"
    TOOL = "tool"


@dataclass(frozen=True)
class Batch:
    """Pages that go together: as a tier takes them, and as a plain client does. Each page is one buffer.

    pages.addresses: uint64[n], for clients that take addresses.
    """

    pages: PageBatch
    names: list[str]
    buffers: list[memoryview]

    def __len__(self) -> int:
        return len(self.names)

    def parts(self, number: int) -> Iterator[Batch]:
        """Up to `number` batches of about as many pages each."""
        step = -(-len(self) // number)
        for at in range(0, len(self), step):
            numbers = list(range(at, min(at + step, len(self))))
            chosen = slice(at, at + step)
            yield Batch(self.pages.select(numbers), self.names[chosen], self.buffers[chosen])


@dataclass(frozen=True)
class Work:
    """One round: batches that are timed together, and single pages whose latency is taken one by one."""

    batches: list[Batch]
    singles: list[Batch]

    def all(self) -> list[Batch]:
        return [*self.batches, *self.singles]


@dataclass(frozen=True)
class Taken:
    """One round. seconds: wall clock. cpu: user and system seconds of all threads. *_ms: latencies; none for tools."""

    seconds: float
    cpu: float
    pages: int
    bytes: int
    batch_ms: list[float] = field(default_factory=list)
    page_ms: list[float] = field(default_factory=list)


class Subject(ABC):
    """One way between memory and a store. Calls return when the pages have arrived, and raise when they have not.

    way: how it does that, in a few words. keeps: nothing needs to be removed between rounds.
    """

    name: str
    way: str = ""
    role: ClassVar[Role] = Role.PLAIN
    cases: tuple[str, ...] = ("write", "read", "lookup")
    keeps = False

    @abstractmethod
    def write(self, batch: Batch) -> None: ...

    @abstractmethod
    def read(self, batch: Batch) -> None: ...

    @abstractmethod
    def lookup(self, batch: Batch) -> int:
        """How many of the pages are there."""

    @abstractmethod
    def remove(self, batch: Batch) -> None: ...

    def miss(self, batch: Batch) -> None:
        """Not timed: the lookup of pages that are about to be computed and written."""

    def settle(self) -> None:
        """Wait for what a write left to do in the background: not in its time, but in its CPU seconds."""

    def processes(self) -> list[int]:
        """Other processes that work for it."""
        return []

    def cpu(self) -> float:
        """Seconds, of this process and those."""
        return process_cpu() + sum(map(cpu_of, self.processes()))

    def round(self, case: str, work: Work) -> Taken:
        before, since = self.cpu(), time.perf_counter()
        batch_ms = [self._timed(case, batch) for batch in work.batches]
        seconds = time.perf_counter() - since
        if case in _WRITES:
            self.settle()
        cpu, pages = self.cpu() - before, sum(map(len, work.batches))
        page_ms = [self._timed(case, single) for single in work.singles]
        if case in _WRITES:
            self.settle()
        size = sum(int(batch.pages.lengths.sum()) for batch in work.batches)
        return Taken(seconds, cpu, pages, size, batch_ms, page_ms)

    def close(self) -> None: ...

    def _timed(self, case: str, batch: Batch) -> float:
        since = time.perf_counter()
        if case == "read":
            self.read(batch)
        elif case in _WRITES:
            self.write(batch)
        elif (there := self.lookup(batch)) != len(batch):
            raise RuntimeError(f"only {there} of {len(batch)} pages are there")
        return (time.perf_counter() - since) * 1e3


@dataclass
class Plan:
    """batch: pages that are handed over at once. bytes: of one round, at least. singles: pages timed one by one."""

    pages: tuple[int, ...] = (1 << 20, 4 << 20)
    batch: int = 32
    bytes: int = 256 << 20
    singles: int = 16
    rounds: int = 7
    progress: Callable[[str], None] = lambda _: None

    def count(self, page: int) -> int:
        """Pages of a round, without the single ones."""
        return max(self.batch, self.bytes // page // self.batch * self.batch)


QUICK = Plan(batch=16, bytes=32 << 20, singles=8, rounds=3)


class Course:
    """The rounds of some subjects at one page size, over the same memory."""

    def __init__(self, plan: Plan, memory: Memory, space: Namespace) -> None:
        self._plan, self._memory, self._space = plan, memory, space
        self._written: dict[str, int] = {}

    def run(self, what: str, subjects: Sequence[Subject]) -> dict[tuple[str, str], list[Taken]]:
        """What each subject took in each case, round by round: by (subject's name, case).

        RuntimeError names the subject that failed. The last pages that were written are removed at the end.
        """
        taken: dict[tuple[str, str], list[Taken]] = {}
        for case in CASES:
            taking_part = [subject for subject in subjects if case in subject.cases]
            if case == "overwrite":
                for subject in taking_part:
                    self._round(subject, case)  # uses up the space that was never written
            for round_ in range(self._plan.rounds):
                self._plan.progress(f"{what}: {case} {round_ + 1}/{self._plan.rounds}")
                turn = round_ % max(1, len(taking_part))
                for subject in taking_part[turn:] + taking_part[:turn]:
                    taken.setdefault((subject.name, case), []).append(self._round(subject, case))
        for subject in subjects:
            self._forget(subject)
        return taken

    def _round(self, subject: Subject, case: str) -> Taken:
        try:
            if case in _WRITES:
                self._forget(subject)
                self._written[subject.name] = self._written.get(subject.name, 0) + 1
            elif case == "read":
                self._memory.target[:] = 0
            work = self._work(subject, target=case == "read")
            if case in _WRITES:
                for batch in work.all():
                    subject.miss(batch)
            taken = subject.round(case, work)
        except Exception as error:
            raise RuntimeError(f"{subject.name}: {case}: {str(error) or type(error).__name__}") from error
        if case == "read" and subject.role is not Role.TOOL and not self._memory.arrived():
            raise RuntimeError(f"{subject.name}: a read brought other bytes")
        return taken

    def _forget(self, subject: Subject) -> None:
        if subject.name in self._written and not subject.keeps:
            for batch in self._work(subject, target=False).all():
                subject.remove(batch)

    def _work(self, subject: Subject, target: bool) -> Work:
        """The pages that this subject wrote last, or is to write now."""
        name, count, step = f"{subject.name}/{self._written[subject.name]}", self._memory.count, self._plan.batch
        batches = [self._batch(name, range(at, min(at + step, count)), target) for at in range(0, count, step)]
        singles = [self._batch(name, range(count + n, count + n + 1), target) for n in range(self._plan.singles)]
        return Work(batches, singles)

    def _batch(self, name: str, numbers: range, target: bool) -> Batch:
        keys = [hashlib.sha256(f"{name}/{number}".encode()).digest() for number in numbers]
        memory, packed = self._memory, b"".join(keys)
        addresses = np.array([memory.address_of(number, target) for number in numbers], np.uint64)
        pages = PageBatch(
            self._space, packed, chain_parents(packed, None),
            addresses, np.full(len(keys), memory.block, np.uint64), np.arange(len(keys) + 1, dtype=np.int64), memory,
        )  # fmt: skip
        starts = [int(address) - memory.address for address in addresses]
        buffers = [memory.view[start : start + memory.block] for start in starts]
        return Batch(pages, [key.hex() for key in keys], buffers)


def space_of(page: int, token: str) -> Namespace:
    """The namespace of a run's pages of this size: no engine's, and no other run's."""
    return Namespace("hicache-ext bench tiers", token, PageLayout("bench", "flat", "uint8", 1, (page,)))


def rows(
    tier: str, page: int, batch: int, kind: str, subjects: Sequence[Subject], taken: dict[tuple[str, str], list[Taken]]
) -> list[dict[str, Any]]:
    """One row for each subject and case. Ours have ratios to each of the others in `beside`.

    Ratios are taken round by round, so that what slows the machine for a while is in both: their median, and spread.
    """
    found = []
    for (name, case), rounds in taken.items():
        subject = next(one for one in subjects if one.name == name)
        beside = {}
        if subject.role is Role.OURS:
            others = [one.name for one in subjects if one.role is not Role.OURS and (one.name, case) in taken]
            beside = {other: _beside(rounds, taken[other, case]) for other in others}
        moves = case != "lookup"
        found.append(
            {
                "tier": tier,
                "subject": name,
                "role": subject.role.value,
                "way": subject.way,
                "case": case,
                "page": page,
                "batch": batch,
                "memory": kind,
                "gb_per_s": _median([one.bytes / 1e9 / one.seconds for one in rounds]) if moves else None,
                "spread": _spread([one.bytes / 1e9 / one.seconds for one in rounds]) if moves else None,
                "pages_per_s": _median([one.pages / one.seconds for one in rounds]),
                "cpu_s_per_gb": _median([one.cpu / (one.bytes / 1e9) for one in rounds]) if moves else None,
                "cpu_us_per_page": _median([one.cpu * 1e6 / one.pages for one in rounds]),
                "batch_ms": _latency([ms for one in rounds for ms in one.batch_ms]),
                "page_ms": _latency([ms for one in rounds for ms in one.page_ms]),
                "rounds": len(rounds),
                "beside": beside,
            }
        )
    return found


def _beside(ours: list[Taken], other: list[Taken]) -> dict[str, Any]:
    """speed: ours over the other's, pages a second. cpu: ours over the other's, seconds a page."""
    pairs = list(zip(ours, other, strict=True))
    speeds = [one.pages / one.seconds * two.seconds / two.pages for one, two in pairs]
    costs = [one.cpu / one.pages * two.pages / two.cpu for one, two in pairs if two.cpu]
    return {
        "speed": _median(speeds),
        "speed_spread": _spread(speeds),
        "cpu": _median(costs) if costs else None,
        "cpu_spread": _spread(costs) if costs else None,
    }


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of all do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _latency(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {"p50": _short(percentile(values, 0.5)), "p99": _short(percentile(values, 0.99)), "count": len(values)}


def _median(values: Sequence[float]) -> float:
    return _short(statistics.median(values))


def _spread(values: Sequence[float]) -> list[float]:
    return [_short(min(values)), _short(max(values))]


def _short(value: float) -> float:
    return float(f"{value:.5g}")

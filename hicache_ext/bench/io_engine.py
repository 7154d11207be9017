"""The engine suite: blocks through the local tier by each of our engines, beside fio, NIXL and SGLang's file backend.

Belongs here: which cells are measured, and our and stock's subjects in them. Does not belong here: rounds (io_rounds),
the other yardsticks (io_fio, io_nixl), SGLang's host pool (io).

Depth is how many blocks a caller has under way: ours and NIXL's in four groups, each followed by the next as soon as
it is done, fio's one by one. Ours writes and verifies headers and checksums meanwhile; the others do not.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.bench import io_fio, io_nixl, io_stock
from hicache_ext.bench.io_memory import Memory, VerifiedPass
from hicache_ext.bench.io_rounds import Setup, Subject, measure
from hicache_ext.page import Namespace, PageLayout, chain_parents
from storage_backends.base import Completion, Dispatcher, OptionError, Outcome, PageBatch
from storage_backends.local import LocalBackend, LocalOptions
from storage_backends.local.engine import PREFERENCE

_GROUPS = 4
_LATER = ("overwrite", "cold", "mixed")


@dataclass(frozen=True)
class Plan:
    """bytes: of one round. fourk: also in 4 KiB pages, at the greatest depth."""

    blocks: tuple[int, ...]
    depths: tuple[int, ...]
    bytes: int
    huge: bool = True
    fourk: bool = True

    def cells(self) -> list[tuple[int, int, bool]]:
        """(block, depth, huge pages)."""
        huge = [(block, depth, True) for block in self.blocks for depth in self.depths if self.huge]
        return huge + [(block, max(self.depths), False) for block in self.blocks if self.fourk]


FULL = Plan((64 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20), (1, 8, 32), 256 << 20)
QUICK = Plan((256 << 10, 2 << 20), (32,), 64 << 20, fourk=False)


class OurEngine(Subject):
    """The local tier on one engine."""

    name = "ours"
    cases = ("first fill", *_LATER)

    def __init__(self, folder: Path, engine: str, memory: Memory, depth: int, size: int, rounds: int) -> None:
        count = size // memory.block
        # Room for all rounds of the first fill and a little more, so that these evict nothing.
        capacity = max(rounds * count * (memory.block + 4096) * 17 // 16, 64 << 20)
        self._dispatcher = Dispatcher()
        options = LocalOptions(path=folder, capacity=capacity, engine=engine)  # type: ignore[arg-type]
        LocalBackend.check(options)
        self._backend = LocalBackend(options, self._dispatcher)
        self._backend.register_memory(memory.address, memory.size)
        if (why := self._backend.stats()["direct_io"]) != "yes":
            raise RuntimeError(f"the local tier cannot bypass the page cache here: {why}")
        layout = PageLayout("mha", "page_first", "bfloat16", 16, (memory.block,))
        self._space = Namespace(model=hashlib.sha256(b"bench").hexdigest(), weights="bench", layout=layout)
        self._memory, self.depth, self.bytes, self._count = memory, depth, size, count
        self._group = max(1, depth // _GROUPS)
        self.engine, self.pages = engine, memory.pages
        self._written, self._whole = 0, 0  # rounds written so far, and the last one that was written whole
        self._plan: list[tuple[Callable[[PageBatch], Completion], PageBatch]] = []

    def before(self, case: str) -> None:
        if case == "cold":
            self._memory.target[:] = 0
        else:
            self._written += 1
            self._whole = self._whole if case == "mixed" else self._written
        self._plan = []
        for group, at in enumerate(range(0, self._count, self._group)):
            reads = case == "cold" or (case == "mixed" and group % 2 == 0)
            call = self._backend.read if reads else self._backend.write
            self._plan.append((call, self._batch(self._whole if reads else self._written, at, reads)))

    def go(self, case: str) -> None:
        flying = deque[Completion]()
        for call, batch in self._plan:
            if len(flying) * self._group >= self.depth:
                self._finish(flying.popleft(), case)
            flying.append(call(batch))
        while flying:
            self._finish(flying.popleft(), case)

    def after(self, case: str) -> None:
        if case == "cold" and not self._memory.arrived():
            raise RuntimeError(f"ours ({self.engine}): a read brought other bytes")

    def fill_up(self) -> None:
        self.before("overwrite")
        self.go("overwrite")

    def close(self) -> None:
        self._backend.close()
        self._dispatcher.close()

    def _finish(self, completion: Completion, case: str) -> None:
        completion.wait()
        if completion.outcomes.count(Outcome.HIT) != len(completion.outcomes):
            raise RuntimeError(f"ours ({self.engine}): {case}: {completion.result()}: {self._backend.stats()}")

    def _batch(self, round_: int, at: int, target: bool) -> PageBatch:
        numbers = range(at, min(at + self._group, self._count))
        packed = b"".join(_key(round_, number) for number in numbers)
        addresses = np.array([self._memory.address_of(number, target) for number in numbers], np.uint64)
        return PageBatch(
            self._space, packed, chain_parents(packed, None),
            addresses, np.full(len(numbers), self._memory.block, np.uint64),
            np.arange(len(numbers) + 1, dtype=np.int64), self._memory,
        )  # fmt: skip


class StockEngine(Subject):
    """SGLang's file backend on the same memory, one page after another as it works."""

    name, engine, depth = "stock-file", "file", 1

    def __init__(self, folder: Path, memory: Memory, size: int, rounds: int) -> None:
        import torch

        self._store = io_stock.StockStore(folder, rounds * size * 17 // 16)
        self._memory, self.bytes, self.pages = memory, size, memory.pages
        self._written = 0
        source, target = (torch.frombuffer(half, dtype=torch.uint8) for half in (memory.source, memory.target))
        self._source, self._target = source.split(memory.block), target.split(memory.block)

    def before(self, case: str) -> None:
        if case == "cold":
            self._memory.target[:] = 0
            self._store.forget_cache(self._keys())
        else:
            self._written += 1

    def go(self, case: str) -> None:
        storage, keys = self._store.storage, self._keys()
        good = (
            all(page is not None for page in storage.batch_get(keys, self._target))
            if case == "cold"
            else storage.batch_set(keys, self._source)
        )
        if not good:
            raise RuntimeError(f"stock-file: {case} went wrong")

    def after(self, case: str) -> None:
        if case != "cold":
            self._store.settle(self._keys())
        elif not self._memory.arrived():
            raise RuntimeError("stock-file: a read brought other bytes")

    def fill_up(self) -> None:
        self.before("overwrite")
        self.go("overwrite")
        self.after("overwrite")

    def close(self) -> None:
        self._store.close()

    def _keys(self) -> list[str]:
        return [_key(self._written, number).hex() for number in range(len(self._source))]


def run(
    folder: Path, engines: Sequence[str], plan: Plan, setup: Setup, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of every cell. say: told once of each subject that takes no part, and why."""
    yardsticks = _yardsticks(say)
    fio_pages = (
        {huge: io_fio.pages_of(folder, huge) for huge in {cell[2] for cell in plan.cells()}} if yardsticks[0] else {}
    )
    refused: set[str] = set()
    rows: list[dict[str, Any]] = []
    for block, depth, huge in plan.cells():
        size = max(plan.bytes // block, depth) * block
        memory = Memory(block, size // block, huge)
        place = folder / f"{block}-{depth}-{memory.pages}"
        subjects: list[Subject] = []
        try:
            for engine in engines or PREFERENCE:
                try:
                    subjects.append(OurEngine(place / engine, engine, memory, depth, size, setup.rounds))
                except OptionError as error:
                    if engine not in refused:
                        say(f"engine {engine} takes no part: {error}")
                    refused.add(engine)
            with_fio, with_nixl, with_stock = yardsticks
            if with_fio:
                subjects.append(io_fio.Fio(place / "fio", block, depth, size, huge, fio_pages[huge], mixed=True))
            if with_nixl:
                subjects.append(io_nixl.Nixl(place / "nixl", memory, depth, size, max(1, depth // _GROUPS)))
            if with_stock and (depth == min(plan.depths) or not huge):  # it knows no depth: once is enough
                subjects.append(StockEngine(place / "stock", memory, size, setup.rounds))
            if depth == max(plan.depths):
                subjects.append(VerifiedPass(block, huge))
            rows += measure(subjects, block, setup)
        finally:
            for subject in subjects:
                subject.close()
    return rows


def _yardsticks(say: Callable[[str], None]) -> tuple[bool, bool, bool]:
    """Whether fio, NIXL and stock's backend take part."""
    if not io_fio.available():
        say(io_fio.INSTALL)
    if why := io_nixl.unavailable():
        say(why)
    try:
        import sglang.srt.mem_cache.hicache_storage  # noqa: F401

        stock = True
    except ImportError:
        say(io_stock.INSTALL)
        stock = False
    return io_fio.available(), not why, stock


def _key(round_: int, number: int) -> bytes:
    return hashlib.sha256(f"{round_}/{number}".encode()).digest()

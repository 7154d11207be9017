"""Measuring the memory tier past the CPU: pages between its pinned region and device memory, beside plain copies.

Belongs here: cells, subjects, rounds and rows of `bench memory`. Does not belong here: tables and files
(hicache_ext.cli.bench_memory).

    ours        the tier, all parts of a turn under way at once, as an engine's adapter asks for them
    ours-single the same, one part after the other: what a part takes from its begin to its outcome
    cpu         the same pages to and from host memory, by the tier's threads: how far they come without a device's help
    memcpy      one pinned copy of as many bytes, in one piece, nothing checked: what PCIe gives
    crc-N       the checksum kernel alone, on N multiprocessors at most: must be faster than PCIe

A page is one buffer. Pages that are written are new each time, so that room is made for them as in a region that is
full. Subjects take turns that are drawn anew each round.
"""

from __future__ import annotations

import hashlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from hicache_ext.cuda import CudaUnavailable, open_device
from hicache_ext.cuda.pinning import pin, unpinning
from hicache_ext.device.slots import PART_BYTES
from hicache_ext.page import Namespace, PageLayout, chain_parents
from storage_backends.base import Completion, Dispatcher, MemoryKind, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory
from storage_backends.format import CHUNK
from storage_backends.memory import MemoryBackend, MemoryOptions

READ, WRITE = "read", "write"
_TURNS = 3
_CRC_BLOCKS = (8, 16, 32, 64)
_NONE = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Plan:
    """pages: page sizes (bytes). bytes: of one turn of one subject. device: its ordinal."""

    pages: tuple[int, ...] = (256 << 10, 2 << 20)
    bytes: int = 1 << 30
    rounds: int = 7
    device: int = 0


QUICK = Plan(bytes=256 << 20, rounds=3)


@dataclass
class Result:
    """rows: of every cell. tier: how the tier reaches the device, in its own words."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tier: str = ""


def run(plan: Plan, result: Result, say: Callable[[str], None]) -> None:
    """Cell by cell into `result`. CudaUnavailable: no device is reached. RuntimeError when a page is wrong."""
    for page in plan.pages:
        say(f"{page >> 10} KiB: taking and pinning memory")
        with _opened(page, plan) as cell:
            result.tier = str(cell.backend.stats()["device"])
            say(f"{page >> 10} KiB: checking")
            cell.check()
            say(f"{page >> 10} KiB: measuring")
            result.rows += _measure(cell, plan.rounds)


class Cell:
    """A tier, and pages of one size on the device and in host memory."""

    def __init__(self, backend: MemoryBackend, page: int, plan: Plan) -> None:
        from hicache_ext import _cuda

        self.backend, self.page, self.pages = backend, page, max(1, plan.bytes // page)
        self.bytes = page * self.pages
        self.device = open_device(plan.device)
        self._memory = _cuda.memory(self.device, self.bytes)
        self.address, self.host = self._memory.address, OwnedMemory(self.bytes)
        layout = PageLayout("mha", "page_first", "bfloat16", 16, (page,))
        self.space = Namespace(model=hashlib.sha256(b"bench memory").hexdigest(), weights="bench", layout=layout)
        self._lanes = {blocks: _cuda.copy_lane(self.device, blocks) for blocks in _CRC_BLOCKS}
        self.device.make_current()  # memory is pinned for it
        if why := pin(self.host.address, self.bytes):
            raise CudaUnavailable(why)
        unpinning(self.host, self.host.map, self.host.address)
        chunks = np.arange(0, self.bytes, CHUNK, dtype=np.uint64)
        self._chunks = chunks + np.uint64(self.address), np.full(len(chunks), CHUNK, np.uint32)
        self._turn = 0
        self._keys = b""

    def new_keys(self) -> None:
        self._turn += 1
        self._keys = b"".join(hashlib.sha256(f"{self._turn}/{page}".encode()).digest() for page in range(self.pages))

    def batches(self, memory: MemoryKind) -> list[PageBatch]:
        """All pages, in parts as adapters ask for them."""
        step, found = max(1, PART_BYTES // self.page), []
        start = self.address if memory == "device" else self.host.address
        for first in range(0, self.pages, step):
            count = min(step, self.pages - first)
            keys = self._keys[32 * first : 32 * (first + count)]
            addresses = np.arange(first, first + count, dtype=np.uint64) * np.uint64(self.page) + np.uint64(start)
            parent = self._keys[32 * first - 32 : 32 * first] if first else None
            found.append(
                PageBatch(
                    self.space, keys, chain_parents(keys, parent), addresses, np.full(count, self.page, np.uint64),
                    np.arange(count + 1, dtype=np.int64), self, memory=memory, used=False,
                )
            )  # fmt: skip
        return found

    def ours(self, op: str, memory: MemoryKind, at_once: bool) -> None:
        move: Callable[[PageBatch], Completion] = self.backend.read if op == READ else self.backend.write
        running = []
        for batch in self.batches(memory):
            running.append(move(batch))
            if not at_once:
                running[-1].wait()
        for done in running:
            done.wait()
            if done.outcomes.count(Outcome.HIT) != len(done.outcomes):
                raise RuntimeError(f"{op}: not every page arrived: {[Outcome(one).name for one in done.outcomes]}")

    def memcpy(self, op: str) -> None:
        here, there = np.array([self.host.address], np.uint64), np.array([self.address], np.uint64)
        to, source = (there, here) if op == READ else (here, there)
        lane = self._lanes[_CRC_BLOCKS[0]]
        lane.move(
            to, source, np.array([self.bytes], np.uint64), _NONE, _NONE.astype(np.uint32), _NONE.astype(np.uint32)
        )

    def checksums(self, blocks: int) -> None:
        addresses, lengths = self._chunks
        self._lanes[blocks].move(_NONE, _NONE, _NONE, addresses, lengths, np.zeros(len(lengths), np.uint32))

    def subjects(self) -> dict[tuple[str, str], Callable[[], None]]:
        """By subject and op. What is read was written last."""
        found: dict[tuple[str, str], Callable[[], None]] = {}
        for op in (WRITE, READ):
            found["ours", op] = partial(self.ours, op, "device", True)
            found["ours-single", op] = partial(self.ours, op, "device", False)
            found["cpu", op] = partial(self.ours, op, "host", True)
            found["memcpy", op] = partial(self.memcpy, op)
        for blocks in _CRC_BLOCKS:
            found[f"crc-{blocks}", READ] = partial(self.checksums, blocks)
        return found

    def check(self) -> None:
        """What the device wrote is what it and the CPU read. The region is full after it."""
        wanted = np.frombuffer(self.host.view, np.uint8)
        wanted[:] = np.random.default_rng(1).integers(0, 256, self.bytes, np.uint8)
        before = wanted.copy()
        self.device.copy(self.address, self.host.address, self.bytes)
        for _ in range(_TURNS + 1):
            self.new_keys()
            self.ours(WRITE, "device", True)
        kinds: tuple[MemoryKind, ...] = ("host", "device")
        for memory in kinds:
            wanted[:] = 0xEE
            if memory == "device":
                self.device.copy(self.address, self.host.address, self.bytes)
            self.ours(READ, memory, True)
            if memory == "device":
                self.device.copy(self.host.address, self.address, self.bytes)
            if not np.array_equal(wanted, before):
                raise RuntimeError(f"pages read into {memory} memory are not those that were written")


@contextmanager
def _opened(page: int, plan: Plan) -> Iterator[Cell]:
    dispatcher = Dispatcher()
    capacity = max(_TURNS * plan.bytes * (page + 4096) // page, 64 << 20, 20 * page)
    backend = MemoryBackend(MemoryOptions.model_validate({"capacity": capacity}), dispatcher)
    try:
        backend.reach_device(plan.device)
        if "device" not in backend.capabilities.memory:
            raise CudaUnavailable(str(backend.stats()["device"]))
        yield Cell(backend, page, plan)
    finally:
        backend.close()
        dispatcher.close()


def _measure(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    subjects = cell.subjects()
    speeds: dict[tuple[str, str], list[float]] = {one: [] for one in subjects}
    cpu: dict[tuple[str, str], list[float]] = {one: [] for one in subjects}
    draw = random.Random(1)
    names = list(dict.fromkeys(name for name, _ in subjects))
    for round_ in range(rounds + 1):
        for name in draw.sample(names, len(names)):
            for op in (WRITE, READ):
                if (name, op) not in subjects:
                    continue
                if op == WRITE:
                    cell.new_keys()
                since, busy = time.perf_counter(), time.process_time()
                subjects[name, op]()
                seconds = time.perf_counter() - since
                if round_:  # the first warms up
                    speeds[name, op].append(cell.bytes / 1e9 / seconds)
                    cpu[name, op].append((time.process_time() - busy) / (cell.bytes / 1e9))
    rows = []
    for (name, op), found in speeds.items():
        ratios = [ours / plain for ours, plain in zip(found, speeds["memcpy", op], strict=True)]
        rows.append(
            {
                "subject": name, "op": op, "page": cell.page, "pages": cell.pages,
                "gb_per_s": round(statistics.median(found), 2), "spread": [round(min(found), 2), round(max(found), 2)],
                "of_memcpy": round(statistics.median(ratios), 3),
                "cpu_s_per_gb": round(statistics.median(cpu[name, op]), 4), "rounds": rounds,
            }
        )  # fmt: skip
    return rows

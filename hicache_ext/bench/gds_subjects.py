"""The ways between a disk and device memory that `bench gds` holds against each other.

Belongs here: memory, and each way's calls as an adapter would make them. Does not belong here: rounds and rows (gds).

    ours        the gds tier: cuFile, checksums on the device
    staging     the same tier without: pages through pinned host memory, checksums on the CPU, then block copies
    cufile      cuFile alone on one plain file: no headers, no checksums
    o_direct    the disk into host memory, by the tier's I/O engine on one plain file: what the others cannot exceed
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.cuda import BlockShape, Copier, layouts
from hicache_ext.device import slots
from hicache_ext.page import Namespace, PageLayout, chain_parents
from storage_backends.base import Completion, Dispatcher, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory
from storage_backends.gds import GdsBackend
from storage_backends.gds.decision import Mode
from storage_backends.gds.options import GdsOptions
from storage_backends.gds.route import Route
from storage_backends.gds.slots import PIECE_BYTES
from storage_backends.local.engine import Transfer, open_engine

#: What every subject wrote in so many turns, and once more, has room in the tier.
TURNS = 2
_STAGING_BYTES = 256 << 20
_TOKENS = 16


class NotHere(Exception):
    """There is nothing to measure on this machine; the text says why."""


class Cell:
    """A tier, and `pages` pages of `page` bytes on the device and in host memory. memory: "device" or "host"."""

    def __init__(self, folder: Path, page: int, pages: int, way: str, modes: Sequence[str]) -> None:
        """modes: of the tier, the first in which it uses cuFile is taken. CudaUnavailable, OptionError, NotHere."""
        self.folder, self.page, self.pages, self.bytes = folder, page, pages, page * pages
        slot = page + 8192
        capacity = max((TURNS + 1) * pages * slot, 128 << 20)
        for mode in modes:
            options = GdsOptions(path=folder / "tier", capacity=capacity, way=way, mode=mode)  # type: ignore[arg-type]
            GdsBackend.check(options)
            self._dispatcher = Dispatcher()
            self.backend = GdsBackend(options, self._dispatcher)
            decision = self.backend.decision
            if decision.mode is not Mode.STAGING:
                break
            self.__exit__()
        else:
            raise NotHere(decision.why)
        from hicache_ext import _cuda
        from hicache_ext.cuda import open_device

        self.device = open_device(self.backend.decision.device)
        self.device.make_current()  # memory is pinned for it
        self._memory = _cuda.memory(self.device, self.bytes)
        self.address = self._memory.address
        self.backend.register_memory(self.address, self.bytes)
        self.host = OwnedMemory(self.bytes)
        self.stream = _cuda.stream(self.device)
        layout = PageLayout("mha", "page_first", "bfloat16", _TOKENS, (page,))
        self.space = Namespace(model=hashlib.sha256(b"bench gds").hexdigest(), weights="bench", layout=layout)
        self._turn = 0
        self._random = np.random.default_rng(1)

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()
        self._dispatcher.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __str__(self) -> str:
        return f"{self.pages} pages of {self.page} bytes"

    @contextmanager
    def only(self, pages: int) -> Iterator[None]:
        """The first `pages` pages are all that there is."""
        all_of_them = self.pages
        self.pages = min(pages, all_of_them)
        self.bytes = self.page * self.pages
        try:
            yield
        finally:
            self.pages, self.bytes = all_of_them, self.page * all_of_them

    def new_keys(self) -> bytes:
        self._turn += 1
        return b"".join(hashlib.sha256(f"{self._turn}/{page}".encode()).digest() for page in range(self.pages))

    def batch(self, keys: bytes) -> PageBatch:
        """The device's pages."""
        count = len(keys) // 32
        addresses = np.arange(count, dtype=np.uint64) * np.uint64(self.page) + np.uint64(self.address)
        return PageBatch(
            self.space, keys, chain_parents(keys, None), addresses, np.full(count, self.page, np.uint64),
            np.arange(count + 1, dtype=np.int64), self, memory="device",
        )  # fmt: skip

    def draw(self, memory: str) -> None:
        """Random bytes."""
        self._put(memory, self._random.integers(0, 256, self.bytes, np.uint8))

    def poison(self, memory: str) -> None:
        self._put(memory, np.full(self.bytes, 0xEE, np.uint8))

    def bytes_in(self, memory: str) -> bytes:
        if memory == "host":
            return bytes(self.host.view[: self.bytes])
        out = np.empty(self.bytes, np.uint8)
        self.device.copy(out.ctypes.data, self.address, self.bytes)
        return out.tobytes()

    def _put(self, memory: str, data: np.ndarray) -> None:
        self.device.copy(self.host.address if memory == "host" else self.address, data.ctypes.data, self.bytes)


def finish(completion: Completion, what: str) -> None:
    completion.wait()
    if completion.outcomes.count(Outcome.HIT) != len(completion.outcomes):
        met = {outcome.name: completion.outcomes.count(outcome) for outcome in Outcome}
        raise RuntimeError(f"{what}: not every page arrived: { {name: count for name, count in met.items() if count} }")


class Subject(ABC):
    """shares: its pages are in the tier, where others find them by these keys. way: of cuFile, where it is used."""

    name: str
    memory = "device"
    shares = False
    way = ""
    keys = b""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def write(self) -> float:
        """All pages of the cell, from memory; seconds."""
        self.keys = self.cell.new_keys()
        return self._timed(True)

    def read(self) -> float:
        """What was written last, into memory; seconds."""
        return self._timed(False)

    def _timed(self, write: bool) -> float:
        since = time.perf_counter()
        self.move(write)
        return time.perf_counter() - since

    @abstractmethod
    def move(self, write: bool) -> None: ...

    def close(self) -> None: ...


class Ours(Subject):
    name = "ours"
    shares = True

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.way = str(cell.backend.decision.way)
        asked = cell.backend.options.way
        self.name = "ours" if asked == "auto" else f"ours-{asked}"

    def move(self, write: bool) -> None:
        backend, batch = self.cell.backend, self.cell.batch(self.keys)
        finish((backend.write if write else backend.read)(batch), self.name)


class Staging(Subject):
    """Parts are copied while others are on their way, as an adapter does."""

    name = "staging"
    shares = True

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        count = max(2, min(cell.pages, _STAGING_BYTES // cell.page))
        self._slots = slots.Staging(cell.space.layout, count, True)
        if self._slots.not_pinned:
            raise RuntimeError(f"host memory cannot be pinned: {self._slots.not_pinned}")
        cell.backend.register_memory(self._slots.address, self._slots.size)
        shape = BlockShape(1, 1, 1, 1, cell.page)
        on_device = layouts.canonical(cell.address, shape, cell.pages)
        in_slots = layouts.Side((self._slots.address,), count, self._slots.stride, cell.page, cell.page)
        self._copier = Copier(shape, on_device, in_slots, cell.device.ordinal)

    def move(self, write: bool) -> None:
        part = self._slots.part
        flying: deque[tuple[list[int], range, Completion]] = deque()
        for first in range(0, self.cell.pages, part):
            pages = range(first, min(first + part, self.cell.pages))
            while (taken := self._slots.take(len(pages))) is None:
                self._land(write, *flying.popleft())
            if write:
                self._copy(True, taken, pages)
            backend = self.cell.backend
            flying.append((taken, pages, (backend.write if write else backend.read)(self._batch(taken, pages))))
        while flying:
            self._land(write, *flying.popleft())

    def _land(self, write: bool, taken: list[int], pages: range, done: Completion) -> None:
        finish(done, self.name)
        if not write:
            self._copy(False, taken, pages)
        self._slots.give(taken)

    def _copy(self, store: bool, taken: list[int], pages: range) -> None:
        there, here = np.array(pages, np.int64), np.array(taken, np.int64)
        if store:
            self._copier.store(there, here, self.cell.stream.handle)
        else:
            self._copier.load(here, there, self.cell.stream.handle)
        self.cell.stream.synchronize()

    def _batch(self, taken: list[int], pages: range) -> PageBatch:
        keys = self.keys[pages.start * 32 : pages.stop * 32]
        parent = self.keys[pages.start * 32 - 32 : pages.start * 32] if pages.start else None
        return self._slots.batch(self.cell.space, keys, chain_parents(keys, parent), taken)

    def close(self) -> None:
        self._slots.close()


class _PlainFile(Subject):
    """The cell's pages one behind the other in a file."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self._path = cell.folder / f"plain-{self.name}"
        self.fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self.fd, 0, cell.bytes)

    def close(self) -> None:
        os.close(self.fd)
        self._path.unlink()


class CuFile(_PlainFile):
    name = "cufile"

    def __init__(self, cell: Cell) -> None:
        decision, asked = cell.backend.decision, cell.backend.options.way
        self.way, self.name = str(decision.way), "cufile" if asked == "auto" else f"cufile-{asked}"
        super().__init__(cell)
        self._route = Route(replace(decision), lambda _: None)
        self._file = self._route.file(self.fd)
        self._registered = not cell.backend.stats()["gds_unregistered"]  # by the tier, for all of this process
        self._lanes = [self._route.lane() for _ in range(self._route.threads)]
        self._pool = ThreadPoolExecutor(len(self._lanes), "bench-cufile")

    def move(self, write: bool) -> None:
        cell, piece = self.cell, min(self.cell.page, PIECE_BYTES)
        at = np.arange(0, cell.bytes, piece, dtype=np.uint64)
        parts = [part for part in np.array_split(at, 4 * len(self._lanes)) if len(part)]
        free = deque(self._lanes)
        wrong: list[Any] = []

        def one(part: np.ndarray) -> None:
            lane = free.pop()
            lengths = np.minimum(np.uint64(piece), np.uint64(cell.bytes) - part)
            which, moved = np.zeros(len(part), np.uint32), np.zeros(len(part), np.int64)
            addresses = part + np.uint64(cell.address)
            bases = np.full(len(part), cell.address, np.uint64) if self._registered else addresses
            lane.issue(self._route.way, write, [self._file], which, bases, addresses, lengths, part)
            lane.results(moved)
            free.append(lane)
            if not np.array_equal(moved, lengths.astype(np.int64)):
                wrong.append(moved[moved != lengths.astype(np.int64)][0])

        for done in [self._pool.submit(one, part) for part in parts]:
            done.result()
        if wrong:
            raise RuntimeError(f"{self.name}: a transfer gave {wrong[0]}")

    def close(self) -> None:
        self._pool.shutdown()
        del self._file, self._lanes
        self._route.close()
        super().close()


class PlainDisk(_PlainFile):
    name = "o_direct"
    memory = "host"

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self._engine = open_engine("auto")
        self._engine.register_memory(cell.host.address, cell.bytes)

    def move(self, write: bool) -> None:
        cell, open_, ended = self.cell, [self.cell.pages], threading.Event()
        wrong: list[int] = []
        lock = threading.Lock()

        def done(moved: int) -> None:
            with lock:
                open_[0] -= 1
                if moved != cell.page:
                    wrong.append(moved)
                if not open_[0]:
                    ended.set()

        at = np.arange(cell.pages, dtype=np.uint64) * np.uint64(cell.page)
        iovs = np.empty((cell.pages, 1, 2), np.uint64)
        iovs[:, 0, 0], iovs[:, 0, 1] = at + np.uint64(cell.host.address), cell.page
        self._engine.submit(
            [Transfer(self.fd, offset, iov, write, done) for offset, iov in zip(at.tolist(), iovs, strict=True)]
        )
        ended.wait()
        if wrong:
            raise RuntimeError(f"{self.name}: a transfer gave {wrong[0]}")

    def close(self) -> None:
        self._engine.close(5.0)
        super().close()

"""The way between a region and a GPU: its memory pinned, once and whole, and lanes that copy pages past the CPU.

    read    csrc/memory finds the pages, a lane has the device copy them out of the region and compute the checksums of
            what arrived, csrc/memory compares and looks whether the pages are still where they were
    write   places in the region are prepared, the device copies into them and computes the checksums, the pages are
            committed

A part of a batch is one call of compiled code without the GIL. Each lane has a thread and streams of its own, so that
while the device computes one part's checksums it copies another's bytes; those of a part that is written are computed
while it is copied. Reads and writes have lanes of their own:
they go different ways over PCIe, and nobody who loads a prefix waits behind what is saved.

Belongs here: what is pinned, the lanes, whether the device still serves. Does not belong here: pages (backend.py, and
csrc/memory/past.cpp: why what is read this way is true), pinning itself (hicache_ext.cuda).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize

from hicache_ext.cuda import CudaUnavailable, open_device
from hicache_ext.cuda.pinning import pin, unpinning
from storage_backends.memory.region import Memory, Pages, left

if TYPE_CHECKING:
    from hicache_ext import _cuda

logger = logging.getLogger(__name__)

Work = Callable[["_cuda.CopyLane"], None]

#: What a lane moves and verifies at once: what adapters ask for at once. Two thirds of a millisecond over PCIe 5.
PART_BYTES = 32 << 20
#: Half of a part's time is not copying: finding or making room, checksums, being woken. With three lanes reads reached
#: 0.92 of a plain copy on an H200, with four, writes 0.91 (with two 0.61 to 0.70). Checksums of what is saved may wait
#: for kernels of the forward, so of those there is one more.
READ_LANES, WRITE_LANES = 3, 4
#: Thread blocks, so multiprocessors at most, of one lane's checksum kernel: few, since an engine computes meanwhile. On
#: an H200 a block checks 6.5 GB/s, and so many 198: a part is checked in a quarter of the time that its copy takes.
CHECKSUM_BLOCKS = 32
#: Parts in a row that failed on the device's side, after which it is not asked any more.
FAILURES = 4
_TAKERS = 8


class Unreachable(Exception):
    """The device is not reached from here; the text says why, and what to do."""


class Lanes:
    """Threads that do work in its order, each with a lane of the device's."""

    def __init__(self, name: str, lanes: list[_cuda.CopyLane]) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False
        self._threads = [
            threading.Thread(target=_work, args=(self._queue, lane), name=f"hicache-{name}-{number}", daemon=True)
            for number, lane in enumerate(lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work) -> bool:
        """False: these have stopped, and nobody will do it."""
        with self._lock:
            if not self._stopped:
                self._queue.put(work)
            return not self._stopped

    def stop(self, until: float) -> bool:
        """What was submitted is done first. Whether all of it was, at time.monotonic() `until`."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def _work(queue: SimpleQueue[Work | None], lane: _cuda.CopyLane) -> None:
    while (work := queue.get()) is not None:
        work(lane)
        del work  # with it the pages that it held


class Reach:
    """One device, reached from one region. Thread-safe.

    out: why it is not asked any more, "" while it is. part_bytes: what a lane is given at once.
    """

    def __init__(self, region: Any, memory: Memory, data_at: int, ordinal: int, on_out: Callable[[], None]) -> None:
        """data_at: where in the memory pages lie. on_out: called once, when the device goes out of use. Unreachable."""
        since = time.monotonic()
        self._on_out = on_out
        self.out = ""
        self._failures, self._said = 0, False
        self._lock = threading.Lock()
        try:
            self.device = open_device(ordinal)
        except CudaUnavailable as error:
            raise Unreachable(str(error)) from error
        if self.device.no_kernels:
            raise Unreachable(
                f"nothing verifies pages on the device: {self.device.no_kernels}. "
                "Fix: install hicache-ext where nvcc is"
            )
        from hicache_ext import _cuda

        self.bytes: int = region.capacity
        self.part_bytes = min(PART_BYTES, self.bytes // 16)
        _take(region, memory)
        taken = time.monotonic()
        self._unpin = self._pinned(memory, memory.address + data_at)
        try:
            made = [_cuda.copy_lane(self.device, CHECKSUM_BLOCKS) for _ in range(READ_LANES + WRITE_LANES)]
        except (_cuda.Unavailable, _cuda.Failed) as error:
            self._unpin()
            raise Unreachable(f"no lanes to the device: {error}") from error
        self._reads, self._writes = Lanes("to-device", made[:READ_LANES]), Lanes("from-device", made[READ_LANES:])
        logger.info(
            "memory: device: %s, in %.1f s (memory taken in %.1f s, pinned in %.1f s): pages go past the CPU",
            self, time.monotonic() - since, taken - since, time.monotonic() - taken,
        )  # fmt: skip

    def __str__(self) -> str:
        pinned = f"pinned {ByteSize(self.bytes).human_readable()}, device {self.device.ordinal} {self.device.name}"
        return f"out of use ({self.out}), {pinned}" if self.out else pinned

    def _pinned(self, memory: Memory, address: int) -> Callable[[], object]:
        """Pin the pages' memory; what undoes that. On a thread of its own, which the context may stay current in."""
        made: list[Callable[[], object]] = []
        why = ["it ended early"]

        memory.keep_from_children()

        def run() -> None:
            self.device.make_current()
            why[0] = pin(address, self.bytes)
            if not why[0]:
                made.append(unpinning(memory, memory.map, address))

        thread = threading.Thread(target=run, name="hicache-memory-pin", daemon=True)
        thread.start()
        thread.join()
        if not made:
            raise Unreachable(
                f"{ByteSize(self.bytes).human_readable()} cannot be pinned ({why[0]}). Fix: lower `capacity`, or raise "
                "the limit of locked memory (ulimit -l)"
            )
        return made[0]

    def submit(self, write: bool, work: Work) -> bool:
        """False: it has been closed."""
        return (self._writes if write else self._reads).submit(work)

    def ended(self, why: str) -> None:
        """A part has ended. why: what was wrong with the device, "" for nothing."""
        with self._lock:
            self._failures = self._failures + 1 if why else 0
            if why and not self._said:
                self._said = True
                logger.warning("memory: pages to or from the device failed: %s (said once)", why)
            if self.out or self._failures < FAILURES:
                return
            self.out = why
        logger.error("memory: the device is out of use, pages go through host memory: %s", why)
        self._on_out()

    def close(self, until: float) -> None:
        """Returns when nothing is under way, or at `until`; then what is still under way keeps the memory, pinned."""
        read, written = self._reads.stop(until), self._writes.stop(until)
        if read and written:
            self._unpin()
        else:
            logger.error("memory: the device does not end its copies: %s bytes stay pinned", self.bytes)


def _take(region: Any, memory: Memory) -> None:
    """All of the region's memory from the kernel, by several threads: it clears what it gives. Unreachable: too little.

    Pinning would do it too, by one thread, and where there is too little it would be the end of a process.
    """
    if memory.pages is not Pages.HUGETLB:  # that was reserved when it was mapped
        taken = max(memory.taken, region.opened() * region.capacity // region.extents)
        lacking, room = memory.size - taken, left()
        if lacking > room.bytes:
            raise Unreachable(
                f"pinning takes all of `capacity` at once, and {room.of} has {ByteSize(room.bytes).human_readable()} "
                f"left for {ByteSize(lacking).human_readable()}. Fix: lower `capacity`"
            )
    extents = range(region.extents)
    with ThreadPoolExecutor(min(_TAKERS, os.cpu_count() or 1), "hicache-memory-take") as takers:
        if not all(takers.map(region.take, extents)):
            raise Unreachable("there is too little memory to take all of `capacity` at once. Fix: lower `capacity`")

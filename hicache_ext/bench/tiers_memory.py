"""The yardstick of memory tiers: a loop of memory copies."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject
from storage_backends.buffers import HUGE_PAGE

#: Room for a few pages of any size in each extent.
_LEAST = 64 << 20


class Memmove(Subject):
    """One thread, one `memmove` a page, into and out of memory in huge pages: as much of it as the tier has, and none
    of that taken before, so that the first pages meet memory that nobody has touched, as the tier's do."""

    name, way = "memmove", "one thread, huge pages where there are any"
    cases = ("write", "overwrite", "read")
    keeps = True

    def __init__(self, page: int, size: int) -> None:
        self._most, self._page = size // page, page
        self._map = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._address = -(-start // HUGE_PAGE) * HUGE_PAGE
        self._next = 0
        self._places: dict[str, int] = {}

    def write(self, batch: Batch) -> None:
        for name, address in zip(batch.names, batch.pages.addresses.tolist(), strict=True):
            place = self._places[name] = self._next % self._most
            self._next += 1
            ctypes.memmove(self._address + place * self._page, address, self._page)

    def read(self, batch: Batch) -> None:
        for name, address in zip(batch.names, batch.pages.addresses.tolist(), strict=True):
            ctypes.memmove(address, self._address + self._places[name] * self._page, self._page)

    def lookup(self, batch: Batch) -> int:
        return sum(name in self._places for name in batch.names)

    def remove(self, batch: Batch) -> None:
        raise NotImplementedError("the oldest pages make room")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_DONTNEED)


class MemoryYardstick(Yardstick):
    """A first fill meets memory that nobody has touched; an overwrite takes the place of older pages, as all writes do
    for the rest of a region's life."""

    cases = ("write", "overwrite", "read", "lookup")
    keeps = True

    def apart(self, options: Options, token: str, size: int) -> Options:
        region = f"bench-{token}"[:32] if options.get("region") else ""  # never one that servers are in
        return {**options, "region": region, "capacity": max(size, _LEAST)}

    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        return [Memmove(memory.block, int(options.capacity))]


YARDSTICK = MemoryYardstick()

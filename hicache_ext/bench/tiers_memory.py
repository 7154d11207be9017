"""The yardstick of memory tiers: a loop of memory copies."""

from __future__ import annotations

import ctypes
from typing import Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject
from storage_backends.buffers import OwnedMemory

#: An extent for each process and one kept free, and what pages leave of each.
_ROOM = 256 << 20


class Memmove(Subject):
    """One thread, one `memmove` a page, into and out of memory in huge pages."""

    name, way = "memmove", "one thread, huge pages"
    cases = ("write", "read")

    def __init__(self, page: int, most: int) -> None:
        self._memory, self._page = OwnedMemory(page * most), page
        self._free = list(range(most))
        self._places: dict[str, int] = {}

    def write(self, batch: Batch) -> None:
        for name, address in zip(batch.names, batch.pages.addresses.tolist(), strict=True):
            place = self._places[name] = self._free.pop()
            ctypes.memmove(self._memory.address + place * self._page, address, self._page)

    def read(self, batch: Batch) -> None:
        for name, address in zip(batch.names, batch.pages.addresses.tolist(), strict=True):
            ctypes.memmove(address, self._memory.address + self._places[name] * self._page, self._page)

    def lookup(self, batch: Batch) -> int:
        return sum(name in self._places for name in batch.names)

    def remove(self, batch: Batch) -> None:
        self._free += [self._places.pop(name) for name in batch.names]

    def close(self) -> None:
        self._memory.close()


class MemoryYardstick(Yardstick):
    def apart(self, options: Options, token: str, size: int) -> Options:
        region = f"bench-{token}"[:32] if options.get("region") else ""  # never one that servers are in
        return {**options, "region": region, "capacity": 2 * size + _ROOM}

    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        return [Memmove(memory.block, memory.count + plan.singles)]


YARDSTICK = MemoryYardstick()

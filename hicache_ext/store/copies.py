"""Copies of pages in memory of our own, within a budget: what may be used after the engine has its pages back.

Belongs here: owned memory for pages, and copying from page to page. Does not belong here: why a copy is made
(staging.py: a read that may not wait; behind.py: a write that comes later).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_backends.base import PageBatch
from storage_backends.buffers import OwnedMemory

_native: Any = None
try:
    from hicache_ext import _native as _compiled

    _native = _compiled
except ImportError:  # a build without it: a copy at a time
    pass

ALIGNMENT = 4096
#: Blocks of memory are taken in these sizes and doubles of it, so that one that was given back fits the next batch.
_SMALLEST = 2 << 20


class CopyBudget:
    """Bytes and pages that may be held in copies at once. What is beyond it is refused, never waited for.

    Memory that comes back is kept for the next batch, within the same limit: making it anew costs a page fault for
    every page of it.

    told: called with address and length of memory when it is new, by `take`, so it must not wait. Such memory is never
    given back before `close`: who was told may have registered it. shared: other processes can map it.
    """

    def __init__(
        self, most_bytes: int, most_pages: int | None = None, told: Callable[[int, int], None] | None = None,
        shared: bool = False,
    ) -> None:  # fmt: skip
        self.most_bytes, self.most_pages = most_bytes, most_pages
        self.bytes = self.pages = 0
        self._told, self._shared = told, shared
        self._kept: dict[int, list[OwnedMemory]] = {}
        self._kept_bytes = self._made_bytes = 0
        self._lock = threading.Lock()

    def take(self, batch: PageBatch) -> PageBatch | None:
        """A batch of the same pages with buffers of ours, not filled yet; None beyond the budget. `give` it back."""
        starts = np.zeros(len(batch.lengths) + 1, np.uint64)
        np.cumsum((batch.lengths + np.uint64(ALIGNMENT - 1)) & ~np.uint64(ALIGNMENT - 1), out=starts[1:])
        size = max(ALIGNMENT, int(starts[-1]))
        room = _SMALLEST
        while room < size:
            room *= 2
        with self._lock:
            if self.bytes + size > self.most_bytes:
                return None
            if self.most_pages is not None and self.pages + len(batch) > self.most_pages:
                return None
            memory = self._from_kept(room)
            if memory is None:
                if self._told is not None and self._made_bytes + room > self.most_bytes:
                    return None  # the rest of it is in pieces that are too small
                self._made_bytes += room
            self.bytes += size
            self.pages += len(batch)
        if memory is None:
            try:
                memory = OwnedMemory(room, shared=self._shared)
            except (OSError, MemoryError):
                with self._lock:
                    self.bytes -= size
                    self.pages -= len(batch)
                    self._made_bytes -= room
                return None
            if self._told is not None:
                self._told(memory.address, memory.size)
        return replace(batch, addresses=starts[:-1] + np.uint64(memory.address), owner=_Held(memory, size))

    def give(self, batch: PageBatch) -> None:
        """A batch that `take` gave, which nothing uses any more."""
        held = batch.owner
        assert isinstance(held, _Held)
        with self._lock:
            self.bytes -= held.size
            self.pages -= len(batch)
            keep = self._told is not None or self._kept_bytes + held.memory.size <= self.most_bytes // 4
            if keep:
                self._kept_bytes += held.memory.size
                self._kept.setdefault(held.memory.size, []).append(held.memory)
            else:
                self._made_bytes -= held.memory.size
        if not keep:
            held.memory.close()

    def close(self) -> None:
        """Give the kept memory back to the machine. Who was told of it is closed by then."""
        with self._lock:
            kept, self._kept = self._kept, {}
            self._made_bytes -= self._kept_bytes
            self._kept_bytes = 0
        for memories in kept.values():
            for memory in memories:
                memory.close()

    def _from_kept(self, room: int) -> OwnedMemory | None:
        """Kept memory of this size, or of a larger one where it is kept for good."""
        larger = [size for size, kept in self._kept.items() if kept and (size == room or (self._told and size > room))]
        if not larger:
            return None
        memory = self._kept[min(larger)].pop()
        self._kept_bytes -= memory.size
        return memory


class _Held:
    def __init__(self, memory: OwnedMemory, size: int) -> None:
        self.memory, self.size = memory, size


def copy_pages(source: PageBatch, pages: Sequence[int], target: PageBatch, their_pages: Sequence[int]) -> bool:
    """Copy pages' bytes between batches' buffers; False (nothing copied) when sizes differ. Other threads run on."""
    ours, counts = _buffers(source, pages)
    theirs, their_counts = _buffers(target, their_pages)
    lengths = source.lengths[ours]
    if not np.array_equal(counts, their_counts) or not np.array_equal(lengths, target.lengths[theirs]):
        return False
    origins, goals = source.addresses[ours], target.addresses[theirs]
    if _native is not None:
        _native.memcpy_many(goals, origins, lengths)
        return True
    for origin, goal, length in zip(origins.tolist(), goals.tolist(), lengths.tolist(), strict=True):
        np.copyto(_view(goal, length), _view(origin, length))  # releases the GIL, as ctypes.memmove does not
    return True


def _buffers(batch: PageBatch, pages: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of these pages' buffers, one page after the other, and how many each has."""
    chosen = np.asarray(pages, np.int64)
    first = batch.offsets[chosen]
    counts = batch.offsets[chosen + 1] - first
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(int(ends[-1]) if len(ends) else 0), counts


def _view(address: int, length: int) -> np.ndarray:
    return np.frombuffer(memoryview((ctypes.c_char * length).from_address(address)), np.uint8)

"""Page slots in memory of ours, pinned or on the device, between a device pool and the tiers.

Belongs here: the memory, lending slots. Does not belong here: pinning (hicache_ext.cuda), who copies into them
(copies), or when (engines' adapters).

A slot holds one page as it is stored. Whoever took a slot gives it back once nothing can touch it any more: a tier that
is late keeps its slots, and nothing but them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hicache_ext.cuda import CudaUnavailable, open_device
from hicache_ext.cuda.pinning import pin, unpinning
from hicache_ext.page import Namespace, PageLayout
from storage_backends.base import MemoryKind, PageBatch
from storage_backends.buffers import OwnedMemory

ALIGNMENT = 4096
#: What is read or written, and copied, at once: small enough that tiers and copies work at the same time.
PART_BYTES = 32 << 20


class PageSlots:
    """Slots for pages of one layout, by number, in memory that a subclass brings.

    slots: how many. stride: bytes from slot to slot. address, size: of all of them. memory: where that is.
    """

    def __init__(self, layout: PageLayout, slots: int, stride: int, address: int, memory: MemoryKind) -> None:
        self.layout, self.slots, self.stride = layout, slots, stride
        self.address, self.size, self.memory = address, stride * slots, memory
        lengths = np.array(layout.buffer_lengths, np.uint64)
        self._lengths, self._starts = lengths, np.cumsum(lengths) - lengths
        self._free = list(range(slots))
        self._cond = threading.Condition()

    @staticmethod
    def stride_of(layout: PageLayout, unit: int = 1) -> int:
        """Bytes from slot to slot."""
        step = math.lcm(ALIGNMENT, unit)
        return -(-layout.payload_bytes // step) * step

    @property
    def part(self) -> int:
        """Pages that are moved at once; two parts always have room."""
        return max(1, min(PART_BYTES // self.stride, self.slots // 2))

    def take(self, count: int, timeout: float = 0.0, most: int = 0) -> list[int] | None:
        """So many slots, or up to `most` where more are free; None when `count` did not become free within `timeout`
        seconds."""
        until = time.monotonic() + timeout
        with self._cond:
            if not self._cond.wait_for(lambda: len(self._free) >= count, max(0.0, until - time.monotonic())):
                return None
            count = max(count, min(most, len(self._free)))
            taken = self._free[-count:]
            del self._free[-count:]
            return taken

    def give(self, slots: Sequence[int]) -> None:
        with self._cond:
            self._free.extend(slots)
            self._cond.notify_all()

    @property
    def lent(self) -> int:
        with self._cond:
            return self.slots - len(self._free)

    def batch(self, space: Namespace, keys: bytes, parents: bytes | None, slots: Sequence[int]) -> PageBatch:
        """These slots as the pages of these packed keys."""
        first = np.array(slots, np.uint64) * np.uint64(self.stride) + np.uint64(self.address)
        per_page = len(self._lengths)
        return PageBatch(
            space,
            keys,
            parents,
            (first[:, None] + self._starts).ravel(),
            np.tile(self._lengths, len(slots)),
            np.arange(0, per_page * len(slots) + 1, per_page, dtype=np.int64),
            self,
            memory=self.memory,
        )

    def close(self) -> None:
        """Give the memory back. Slots that are still lent keep it: somebody may yet write there."""
        raise NotImplementedError


class Staging(PageSlots):
    """In host memory."""

    def __init__(self, layout: PageLayout, slots: int, pinned: bool, unit: int = 1) -> None:
        """pinned: a GPU will copy from and to it. unit: bytes; slots lie a whole number of units apart."""
        stride = self.stride_of(layout, unit)
        self._memory: OwnedMemory | None = OwnedMemory(stride * slots, not_in_children=True)
        super().__init__(layout, slots, stride, self._memory.address, "host")
        self.not_pinned = pin(self.address, self.size) if pinned else "nothing asks for it"
        if not self.not_pinned:
            self._unpin = unpinning(self._memory, self._memory.map, self.address)

    @property
    def view(self) -> Any:
        """All of it, as a buffer."""
        assert self._memory is not None
        return self._memory.view

    def close(self) -> None:
        with self._cond:
            if self._memory is None or len(self._free) < self.slots:
                return
            memory, self._memory = self._memory, None
        if not self.not_pinned:
            self._unpin()
        memory.close()


class DeviceStaging(PageSlots):
    """In a GPU's memory: pages that a tier moves there and from there itself."""

    def __init__(self, layout: PageLayout, slots: int, device: int, unit: int = 1) -> None:
        """device: its ordinal. unit: bytes; slots lie a whole number of units apart. CudaUnavailable: not to be had, or
        too little of it."""
        opened = open_device(device)
        from hicache_ext import _cuda

        stride = self.stride_of(layout, unit)
        try:
            self._memory: _cuda.Memory | None = _cuda.memory(opened, stride * slots)
        except (_cuda.Unavailable, _cuda.Failed) as error:
            raise CudaUnavailable(str(error)) from error
        super().__init__(layout, slots, stride, self._memory.address, "device")

    def close(self) -> None:
        with self._cond:
            if len(self._free) == self.slots:
                self._memory = None

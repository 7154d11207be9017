"""One device pool as planes: which bytes are a page, where they lie in a slot, and which layer waits for them.

Belongs here: addresses of what is copied. Does not belong here: how SGLang's pools become this (linker_pools); nothing
of SGLang is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.page import PageLayout


@dataclass(frozen=True)
class Plane:
    """One buffer of a pool, and where its part of a page lies: `tokens x heads` runs of `run` bytes.

    buffer: the device tensor. page, token, head: strides in it, in bytes. at, slot_token, slot_head: in a slot.
    layer: of the forward, the first that reads this buffer.
    """

    buffer: Any
    layer: int
    tokens: int
    heads: int
    run: int
    page: int
    token: int
    head: int
    at: int
    slot_token: int
    slot_head: int


@dataclass(frozen=True)
class DevicePool:
    """One physical pool. entry: SGLang's view of it (DevicePoolEntry). planes: by layer. kind: the pool whose class
    says how it is split over ranks."""

    name: str
    entry: Any
    layout: PageLayout
    planes: tuple[Plane, ...]
    kind: Any

    @property
    def pages(self) -> int:
        return min(plane.buffer.shape[0] * row_stride(plane.buffer) // plane.page for plane in self.planes)

    def page_numbers(self, indices: Any) -> NDArray[np.int64]:
        """Page numbers of SGLang's device indices. ValueError where they are not whole, aligned pages."""
        rows = np.array(self.entry.prepare_locations(indices), np.int64)
        return rows // max(1, self.planes[0].page // row_stride(self.planes[0].buffer))


def row_stride(buffer: Any) -> int:
    """Bytes from row to row of a device tensor."""
    return int(buffer.stride(0) * buffer.element_size())

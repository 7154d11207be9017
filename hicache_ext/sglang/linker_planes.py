"""One device pool of SGLang's as planes (hicache_ext.device).

Belongs here: what a pool's page numbers are. Does not belong here: how SGLang's pools become this (linker_pools);
nothing of SGLang is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.device.planes import Plane
from hicache_ext.page import PageLayout


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

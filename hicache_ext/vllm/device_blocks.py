"""vLLM's blocks on a device as planes, whatever their order in memory: what the block copies are told.

Belongs here: strides of blocks and pages, and which part of a block is which part of a page. Does not belong here: how
anything is copied (hicache_ext.device), or when (device_loads, device_saves).

Blocks and pages are each a whole number of units, and the smaller of the two is one unit. Copies know units only: a
side whose blocks (or slots) are several units is described with the stride of a unit, so that one copy moves any of
them; the numbers between one block's units and the next block's are never used.

    own pages      a page is a block, with every layer's bytes as they lie in it, one layer after the other
    shared pages   canonical: the copy's strides are the conversion
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.canonical import Shape
from hicache_ext.device.planes import Plane
from hicache_ext.device.slots import DeviceStaging, PageSlots, Staging
from hicache_ext.page import PageLayout
from hicache_ext.vllm.blocks import UnsupportedLayout, blocks_of
from hicache_ext.vllm.pages import Pages

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class DeviceBlocks:
    """One group's blocks: a pool of units.

    planes: of a unit. page_bytes: of a page, packed. block, kernel, page, unit: tokens of vLLM's block, of the kernel's
    (some number of them to a block), of a page, of a unit. count: kernel blocks. stride: units' strides from kernel
    block to kernel block. unit_bytes: from unit to unit within a page.
    """

    planes: tuple[Plane, ...]
    page_bytes: int
    block: int
    kernel: int
    page: int
    unit: int
    count: int
    stride: int
    unit_bytes: int

    @property
    def pages(self) -> int:
        """Unit numbers are below this."""
        return (self.count - 1) * self.stride + self.kernel // self.unit

    @property
    def page_units(self) -> int:
        return self.page // self.unit

    def units(self, pages: Pages) -> Numbers:
        """int64[pages, units of a page]: numbers of the units that these pages are in. Raises IndexError for a number
        that is no block."""
        blocks = np.asarray(pages.blocks, np.int64)
        if len(blocks) and (blocks.max() + 1) * (self.block // self.kernel) > self.count:
            raise IndexError(f"block {blocks.max()} of {self.count * self.kernel // self.block}")
        first = np.arange(pages.count * self.page_units, dtype=np.int64) * self.unit + pages.skip
        within = first % self.block
        kernels = blocks[first // self.block] * (self.block // self.kernel) + within // self.kernel
        return (kernels * self.stride + within % self.kernel // self.unit).reshape(pages.count, -1)

    def wanted(self, pages: Pages) -> NDArray[np.bool_]:
        """bool[pages, units of a page]: which units are not in their blocks already, when the pages are loaded."""
        first = np.arange(pages.count * self.page_units, dtype=np.int64) * self.unit
        return (first >= pages.lead // self.unit * self.unit).reshape(pages.count, -1)

    def blocks_in(self, pages: Pages) -> Numbers:
        """int64[pages, units of a page]: the block of each unit."""
        first = np.arange(pages.count * self.page_units, dtype=np.int64) * self.unit + pages.skip
        return np.asarray(pages.blocks, np.int64)[first // self.block].reshape(pages.count, -1)

    def staging(self, layout: PageLayout, most_bytes: int, pinned: bool) -> Staging:
        """Slots for pages in host memory, within so many bytes, two at the least."""
        unit, slots = self._room(layout, most_bytes)
        return Staging(layout, slots, pinned, unit)

    def device_staging(self, layout: PageLayout, most_bytes: int, device: int) -> DeviceStaging:
        """As many in the memory of this device. Raises CudaUnavailable."""
        unit, slots = self._room(layout, most_bytes)
        return DeviceStaging(layout, slots, device, unit)

    def _room(self, layout: PageLayout, most_bytes: int) -> tuple[int, int]:
        """Bytes of a unit, and how many slots."""
        unit = self.unit_bytes if self.page_units > 1 else 1
        return unit, max(2, min(self.count, most_bytes // PageSlots.stride_of(layout, unit)))

    def slots(self, staging: PageSlots) -> UnitSlots:
        """The same slots by units."""
        step = self.unit_bytes if self.page_units > 1 else staging.stride
        return UnitSlots(staging, step, self.page_units)


@dataclass(frozen=True)
class UnitSlots:
    """Slots as units, `stride` bytes apart; each slot has `each` of them."""

    staging: PageSlots
    stride: int
    each: int

    @property
    def slots(self) -> int:
        return (self.staging.slots - 1) * (self.staging.stride // self.stride) + self.each

    @property
    def address(self) -> int:
        return self.staging.address

    @property
    def view(self) -> Any:
        """Of slots in host memory."""
        assert isinstance(self.staging, Staging)
        return self.staging.view

    def units(self, slots: Sequence[int]) -> Numbers:
        """int64[slots, units of a page]: numbers of the units in these slots."""
        first = np.asarray(slots, np.int64) * (self.staging.stride // self.stride)
        return first[:, None] + np.arange(self.each, dtype=np.int64)


def own_blocks(tensors: Mapping[str, Any], layers: Sequence[str], count: int, tokens: int) -> DeviceBlocks:
    """Blocks as vLLM has them. layers: in the order of a page. count: blocks. tokens: of a block. UnsupportedLayout."""
    found = blocks_of(tensors, layers, count)
    planes, at = [], 0
    for number, (start, stride, length) in enumerate(zip(found.starts, found.strides, found.lengths, strict=True)):
        start, stride, length = int(start), int(stride), int(length)
        tensor = next(
            tensor for name in layers
            if (tensor := tensors[name]).data_ptr() <= start < tensor.data_ptr() + _extent(tensor)
        )  # fmt: skip
        size = int(tensor.element_size())
        offset = int(tensor.storage_offset()) + (start - int(tensor.data_ptr())) // size
        rows = tensor.as_strided((count, length // size), (stride // size, 1), offset)
        planes.append(Plane(rows, number, 1, 1, length, stride, length, length, at, length, length))
        at += length
    return DeviceBlocks(tuple(planes), at, tokens, tokens, tokens, tokens, count, 1, at)


def _extent(tensor: Any) -> int:
    """Bytes from a tensor's first element to its last one's end."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def shared_blocks(views: Sequence[Sequence[Any]], shape: Shape, block: int) -> DeviceBlocks:
    """Blocks as canonical pages. views: of each layer, K and V: [kernel blocks, tokens, heads, dim]. block: tokens of
    vLLM's block. Raises UnsupportedLayout."""
    first = views[0][0]
    kernel, size = int(first.shape[1]), int(first.element_size())
    unit = min(kernel, shape.page_size)
    if kernel % unit or shape.page_size % unit or block % kernel:
        raise UnsupportedLayout(f"the kernel's blocks of {kernel} tokens and pages of {shape.page_size} do not divide")
    run = shape.dim * size
    row = shape.heads * run
    strides = set()
    planes = []
    for layer, parts in enumerate(views):
        for part, view in enumerate(parts):
            block_stride, token, head, element = (int(stride) * size for stride in view.stride())
            step = block_stride if unit == kernel else unit * token
            if element != size or not step or block_stride % step or tuple(view.shape) != tuple(first.shape):
                raise UnsupportedLayout(f"blocks with strides {tuple(view.stride())} are not known")
            strides.add(block_stride // step)
            at = (layer * shape.parts + part) * shape.page_size * row
            planes.append(Plane(view, layer, unit, shape.heads, run, step, token, head, at, row, run))
    if len(strides) > 1:
        raise UnsupportedLayout("the layers' blocks lie in different ways")
    return DeviceBlocks(
        tuple(planes), shape.page_bytes, block, kernel, shape.page_size, unit, int(first.shape[0]), strides.pop(),
        unit * row,
    )  # fmt: skip

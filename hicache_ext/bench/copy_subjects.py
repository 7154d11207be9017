"""What moves the pages of a cell: ours, one plain copy of as many bytes, torch.

Belongs here: cells, and each subject's calls as an engine would make them. Does not belong here: sgl-kernel's calls
(copy_sgl), timing and rows (copy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.cuda import BlockShape, Copier, Side, Way, layouts
from hicache_ext.cuda.copier import LAYER_MULTIPROCESSORS, MULTIPROCESSORS

#: Axes of the host's buffers: pages, layers, K and V, tokens, heads and the bytes of one.
AXES = {
    "page_first": "KPTLHD",
    "page_first_direct": "KPLTHD",
    "layer_first": "KLPTHD",
    "page_head": "KPHTLD",
    "canonical": "PLKTHD",
}
_SLOW_BYTES = 40 << 20
#: More than this is too much for torch's index copies.
TORCH_BYTES = 600 << 20
_TORCH_ROUNDS = 2


@dataclass(frozen=True)
class Cell:
    """One copy: `pages` pages between a device arena and a pinned host arena (both flat bytes, at least as large)."""

    layout: str
    shape: BlockShape
    pages: int
    op: str
    device: Any = field(repr=False)
    host: Any = field(repr=False)
    in_pools: NDArray[np.int64] = field(repr=False)
    in_pages: NDArray[np.int64] = field(repr=False)

    @property
    def bytes(self) -> int:
        return self.pages * self.shape.page_bytes

    @property
    def load(self) -> bool:
        return self.op == "h2d"

    @cached_property
    def pool(self) -> Any:
        """[K, L, P * T, row] bytes on the device: an engine's layer-first pool."""
        shape = self.shape
        return self.device[: self.bytes].view(shape.kv, shape.layers, self.pages * shape.tokens, shape.row)

    def host_array(self, of: Any = None) -> Any:
        shape = self.shape
        size = {"P": self.pages, "L": shape.layers, "K": shape.kv, "T": shape.tokens, "H": shape.heads, "D": shape.run}
        arena = self.host if of is None else of
        return arena[: self.bytes].view([size[axis] for axis in AXES[self.layout]])

    def moved(self, whole: bool) -> bool:
        """Whether both sides hold the same. whole: the arenas as they lie, not page by page."""
        import torch

        host = self.host[: self.bytes].cuda()
        if whole:
            return bool(torch.equal(host, self.device[: self.bytes]))
        axes = AXES[self.layout]
        pages = self.host_array(host).permute([axes.index(axis) for axis in "PKLTHD"])
        shape = self.shape
        pool = self.pool.view(shape.kv, shape.layers, self.pages, shape.tokens, shape.heads, shape.run)
        in_pools, in_pages = torch.from_numpy(self.in_pools).cuda(), torch.from_numpy(self.in_pages).cuda()
        return bool(torch.equal(pool.permute(2, 0, 1, 3, 4, 5)[in_pools], pages[in_pages]))


@dataclass(frozen=True)
class Subject:
    """multiprocessors: those that its kernel is given; 0: none."""

    name: str
    way: str
    go: Callable[[], Any]
    multiprocessors: int = 0
    whole: bool = False
    most_rounds: int = 1 << 30


def memcpy(cell: Cell) -> Subject:
    source, target = (cell.host, cell.device) if cell.load else (cell.device, cell.host)
    from_, to = source[: cell.bytes], target[: cell.bytes]
    return Subject("memcpy", "cudaMemcpyAsync", lambda: to.copy_(from_, non_blocking=True), whole=True)


# ---- ours


def ours(cell: Cell, multiprocessors: int | None = None) -> Iterator[Subject]:
    """The way that is chosen (as "ours"), every way by force, and layer after layer."""
    import torch

    copier = _copier(cell, multiprocessors)
    stream = torch.cuda.current_stream().cuda_stream

    def issue(way: Way | None) -> None:
        if cell.load:
            copier.load(cell.in_pages, cell.in_pools, stream, way)
        else:
            copier.store(cell.in_pools, cell.in_pages, stream, way)

    def used(way: Way, limit: int = copier.multiprocessors) -> int:
        return 0 if way is Way.engine else limit

    chosen = copier.order(cell.pages)[0]
    yield Subject("ours", chosen, lambda: issue(None), used(chosen))
    for way in copier.order(cell.pages):
        if way is Way.engine and copier.order(cell.pages, layer_wise=True)[0] is not way and cell.bytes > _SLOW_BYTES:
            continue  # about 2 us for each of a million short runs
        yield Subject(f"ours-{way}", way, lambda way=way: issue(way), used(way))  # type: ignore[misc]
    if cell.load:
        events = copier.events()

        def layer_wise() -> None:
            copier.load_layers(cell.in_pages, cell.in_pools, stream, events)

        way = copier.order(cell.pages, layer_wise=True)[0]
        yield Subject("ours-layers", way, layer_wise, used(way, copier.layer_multiprocessors))


def _copier(cell: Cell, limit: int | None) -> Copier:
    shape, pages = cell.shape, cell.pages
    planes = [cell.pool[kv, layer].data_ptr() for layer in range(shape.layers) for kv in range(shape.kv)]
    base = cell.host.data_ptr()
    bases = [base + kv * cell.bytes // shape.kv for kv in range(shape.kv)]
    makers: dict[str, Callable[[], Side]] = {
        "page_first": lambda: layouts.page_first(bases, shape, pages),
        "page_first_direct": lambda: layouts.page_first_direct(bases, shape, pages),
        "layer_first": lambda: layouts.layer_first(bases, shape, pages),
        "page_head": lambda: layouts.page_head(bases, shape, pages),
        "canonical": lambda: layouts.canonical(base, shape, pages),
    }
    return Copier(
        shape,
        layouts.paged(planes, shape, pages),
        makers[cell.layout](),
        multiprocessors=limit or MULTIPROCESSORS,
        layer_multiprocessors=limit or LAYER_MULTIPROCESSORS,
    )


# ---- plain yardsticks


def by_torch(cell: Cell) -> Subject:
    """Index copies plane by plane, as tensor code without kernels of its own does it."""
    import torch

    axes = AXES[cell.layout]
    host = cell.host_array().permute([axes.index(axis) for axis in "KLPTHD"])
    pool = cell.pool.view(cell.shape.kv, cell.shape.layers, cell.pages, cell.shape.tokens, cell.shape.heads, -1)
    in_pages, in_pools = torch.from_numpy(cell.in_pages), torch.from_numpy(cell.in_pools)
    in_pools_there = in_pools.cuda()

    def go() -> None:
        for kv in range(cell.shape.kv):
            for layer in range(cell.shape.layers):
                if cell.load:
                    pool[kv, layer][in_pools_there] = host[kv, layer][in_pages].cuda(non_blocking=True)
                else:
                    host[kv, layer][in_pages] = pool[kv, layer][in_pools_there].cpu()

    return Subject("torch", "index copies", go, most_rounds=_TORCH_ROUNDS)

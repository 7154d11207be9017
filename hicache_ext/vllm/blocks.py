"""Where the blocks of vLLM's KV cache are: from the registered tensors and block numbers to addresses.

Belongs here: shapes and strides. Does not belong here: what a block's bytes mean (identity), or moving them (worker).

A tensor has one dimension of blocks (or of kernel blocks, a whole number of them to a block). What lies at one block
number must be one dense run of bytes, or, where K and V come before the blocks, two. A page is one block of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.page import Namespace, chain_parents
from hicache_ext.store.copies import CopyBudget, copy_pages
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Outcome, PageBatch


class UnsupportedLayout(RuntimeError):
    """Blocks that cannot be addressed; `str()` is all that needs to be said."""


@dataclass(frozen=True)
class Blocks:
    """k buffers of every block. starts, strides, lengths: uint64[k], bytes: buffer j of block b is `lengths[j]` bytes
    at `starts[j] + b * strides[j]`. count: blocks. owner keeps the memory alive.
    """

    starts: NDArray[np.uint64]
    strides: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    count: int
    owner: Any

    def batch(self, space: Any, keys: bytes, parents: bytes | None, numbers: Sequence[int]) -> PageBatch:
        """The pages in these blocks. Raises IndexError for a number that is no block."""
        chosen = np.asarray(numbers, np.uint64)
        if len(chosen) and chosen.max() >= self.count:
            raise IndexError(f"block {chosen.max()} of {self.count}")
        addresses = self.starts[None, :] + chosen[:, None] * self.strides[None, :]
        width = len(self.starts)
        return PageBatch(
            space, keys, parents, addresses.ravel(), np.tile(self.lengths, len(chosen)),
            np.arange(0, addresses.size + 1, width, dtype=np.int64), self.owner,
        )  # fmt: skip

    def incoming(self, space: Namespace, pages: Pages) -> PageBatch | None:
        """Where pages are to be read into: the blocks themselves."""
        return self.batch(space, pages.keys, chain_parents(pages.keys, pages.parent), pages.blocks)

    def arrived(self, pages: Pages, batch: PageBatch, outcomes: Sequence[int]) -> list[int]:
        """The pages have their outcomes. Blocks that did not get their page."""
        return [block for block, outcome in zip(pages.blocks, outcomes, strict=True) if outcome != Outcome.HIT]

    def release(self, batch: PageBatch) -> None:
        """Of `incoming`: nothing uses it any more."""

    def outgoing(self, space: Namespace, pages: Pages, budget: CopyBudget) -> PageBatch | None:
        """A copy of the pages in memory of the budget's; None where there is no room."""
        batch = self.batch(space, pages.keys, chain_parents(pages.keys, pages.parent), pages.blocks)
        copy = budget.take(batch)
        if copy is not None:
            every = list(range(len(batch)))
            copy_pages(batch, every, copy, every)
        return copy


def blocks_of(tensors: Mapping[str, Any], layers: Sequence[str], count: int) -> Blocks:
    """The blocks of these layers' tensors, in the order of `layers`. Raises UnsupportedLayout."""
    runs: list[tuple[int, int, int]] = []
    for layer in layers:
        tensor = tensors.get(layer)
        if tensor is None:
            raise UnsupportedLayout(f"hicache_ext: layer {layer} has no KV tensor of its own")
        found = _runs(layer, tensor, count)
        runs += [run for run in found if run not in runs]  # layers may share a tensor
    table = np.asarray(runs, np.uint64)
    return Blocks(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), count, list(tensors.values()))


def _runs(layer: str, tensor: Any, count: int) -> list[tuple[int, int, int]]:
    """(start, stride, length) of each dense run of one block."""
    shape, strides, size = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.element_size())
    for dimension in range(min(2, len(shape))):
        outer, ratio = shape[:dimension], shape[dimension] / count
        if shape[dimension] % count or (outer and outer[0] != 2):
            continue
        inner = list(zip(shape[dimension + 1 :], strides[dimension + 1 :], strict=True))
        elements = int(np.prod([n for n, _ in inner], dtype=np.int64))
        dense = 1 + sum((n - 1) * stride for n, stride in inner) == elements
        if not dense or (ratio > 1 and strides[dimension] != elements):
            continue
        base = int(tensor.data_ptr())
        return [
            (
                base + (part * strides[0] * size if outer else 0),
                int(ratio) * strides[dimension] * size,
                int(ratio) * elements * size,
            )
            for part in range(outer[0] if outer else 1)
        ]
    raise UnsupportedLayout(
        f"hicache_ext: the blocks of layer {layer} do not lie in one piece (shape {shape}, strides {strides}, {count} "
        "blocks). Fix: let vLLM choose its default KV cache layout"
    )

"""One host pool as the adapter sees it: the layout of its pages, and where their bytes are.

Belongs here: from SGLang's host indices to addresses, lengths and offsets, and the way round for pools that give no
addresses. Does not belong here: what the pages mean (identity) or what is done with them (backend).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.page import PageLayout

logger = logging.getLogger(__name__)

_GEOMETRY = (
    "layer_num",
    "target_layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "index_head_dim",
    "item_bytes",
    "indexer_page_stride_size",
    "num_mamba_layers",
    "temporal_state_elem_size",
    "size_per_token",
    "dcp_size",
)
_BUFFERS = (
    "kv_buffer",
    "k_buffer",
    "v_buffer",
    "index_k_buffer",
    "index_k_scale_buffer",
    "index_k_with_scale_buffer",
    "temporal_buffer",
    "conv_buffer",
)


class Access(Enum):
    """How a pool's pages are reached; decided once, when the pool is registered."""

    ADDRESSES = "addresses"  # zero copy
    COPIES = "copies"  # the pool gives none: through flat pages that SGLang copies
    NOTHING = "nothing"  # a logical pool: it owns indices, no bytes


@dataclass
class Pages:
    """Where n pages are. addresses, lengths: uint64[m]. offsets: int64[n + 1]. owner keeps the memory alive.

    staged: with Access.COPIES, the flat page of each page (torch tensors), to be copied into the pool after a read.
    """

    addresses: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    owner: Any
    staged: list[Any] | None = None


class HostPool:
    """One registered pool. Thread-safe as far as the pool itself is."""

    def __init__(self, name: str, pool: Any, flat: bool = False) -> None:
        """flat: pages as `get_data_page` orders them even where there are addresses (SGLang's generic interface)."""
        self.name = name
        self.pool = pool
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        lengths = None if flat else self._probe()
        if lengths is not None:
            self.access = Access.ADDRESSES
            self.lengths = np.asarray(lengths, np.uint64)
        else:
            size = _flat_bytes(pool)
            self.access = Access.COPIES if size else Access.NOTHING
            self.lengths = np.asarray([size] if size else [], np.uint64)
        self.page_bytes = int(self.lengths.sum())
        if self.access is Access.COPIES and not flat:
            logger.warning(
                "host pool %s (%s, layout %s) gives no page addresses: its pages are copied on their way",
                name, type(pool).__name__, getattr(pool, "layout", "?"),
            )  # fmt: skip

    @property
    def layout(self) -> PageLayout:
        """The page's shape. Raises ValueError for a pool without bytes."""
        pool = self.pool
        device_pool = getattr(pool, "device_pool", None)
        geometry = {name: getattr(pool, name, None) for name in _GEOMETRY}
        # fp8 KV is stored as uint8: the host pool's dtype alone does not say which fp8.
        geometry["device_dtype"] = str(getattr(device_pool, "dtype", "") or "")
        geometry["class"] = type(pool).__name__
        geometry["format"] = getattr(pool, "storage_format_tag", None)
        kept = {key: _plain(value) for key, value in geometry.items() if value is not None and value != ""}
        kind = next(
            (kind for kind in ("mla", "mha", "mamba", "indexer") if kind in type(pool).__name__.lower()), self.name
        )
        order = "flat" if self.access is Access.COPIES else str(getattr(pool, "layout", "unknown"))
        return PageLayout(
            kind=kind,
            order=f"{order}/{getattr(pool, 'layout', '')}" if order == "flat" else order,
            dtype=str(getattr(pool, "dtype", "uint8")).removeprefix("torch."),
            page_size=self.page_size,
            buffer_lengths=tuple(int(length) for length in self.lengths),
            geometry=tuple(sorted(kept.items())),
        )

    def locate(self, host_indices: Any, pages: int, reading: bool) -> Pages:
        """Where these pages are. Raises ValueError when indices and pages do not fit."""
        if host_indices is None or len(host_indices) != pages * self.page_size:
            given = "none" if host_indices is None else len(host_indices)
            raise ValueError(f"pool {self.name}: {pages} pages of {self.page_size} need as many indices, got {given}")
        if self.access is Access.COPIES:
            return self._copies(host_indices, pages, reading)
        pointers, _ = self.pool.get_page_buffer_meta(host_indices)
        per_page = len(self.lengths)
        if len(pointers) != pages * per_page:
            raise ValueError(f"pool {self.name}: {len(pointers)} addresses for {pages} pages of {per_page} buffers")
        return Pages(
            addresses=np.fromiter(pointers, np.uint64, len(pointers)),
            lengths=np.tile(self.lengths, pages),
            offsets=np.arange(0, len(pointers) + 1, per_page, dtype=np.int64),
            owner=self.pool,
        )

    def restore(self, host_indices: Any, page: int, pages: Pages) -> None:
        """After a read by copies: put this page into the pool."""
        if pages.staged is not None:
            self.pool.set_from_flat_data_page(int(host_indices[page * self.page_size]), pages.staged[page])

    def memory(self) -> Iterator[tuple[int, int]]:
        """(address, bytes) of the pool's buffers, for registration."""
        seen = set()
        for name in _BUFFERS:
            value = getattr(self.pool, name, None)
            tensors: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
            for tensor in tensors:
                if hasattr(tensor, "data_ptr") and tensor.numel() and tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    yield tensor.data_ptr(), tensor.numel() * tensor.element_size()

    def _probe(self) -> list[int] | None:
        """The buffer lengths of one page, or None where the pool gives no addresses."""
        import torch

        try:
            found = self.pool.get_page_buffer_meta(torch.arange(self.page_size, dtype=torch.int64))
        except (AttributeError, NotImplementedError, ValueError, TypeError):
            return None
        if found is None or not len(found[0]):
            return None
        return [int(size) for size in found[1]]

    def _copies(self, host_indices: Any, pages: int, reading: bool) -> Pages:
        if reading:
            staged = [self.pool.get_dummy_flat_data_page() for _ in range(pages)]
        else:
            starts = [int(host_indices[i * self.page_size]) for i in range(pages)]
            staged = [self.pool.get_data_page(start, flat=True).contiguous() for start in starts]
        size = int(self.lengths[0])
        if any(page.numel() * page.element_size() != size for page in staged):
            raise ValueError(f"pool {self.name}: a flat page is not of {size} bytes")
        return Pages(
            addresses=np.fromiter((page.data_ptr() for page in staged), np.uint64, pages),
            lengths=np.full(pages, size, np.uint64),
            offsets=np.arange(pages + 1, dtype=np.int64),
            owner=staged,
            staged=staged,
        )


def unwrap(pool: Any) -> Any:
    """The pool that holds the anchor's bytes: hybrid models hand over a group of pools."""
    entry = getattr(pool, "anchor_entry", None)
    return pool if entry is None else entry.host_pool


def _flat_bytes(pool: Any) -> int:
    page = pool.get_dummy_flat_data_page()
    return int(page.numel() * page.element_size())


def _plain(value: Any) -> int | str:
    return int(value) if isinstance(value, (int, np.integer)) else str(value)

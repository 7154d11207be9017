"""Block layouts as arrays with named axes: the reference that addresses are held against, for numpy and torch alike.

Axes: P pages, L layers, K for K and V, T tokens, H heads, D the bytes of a head. The axes that stand before the colon
choose among buffers with addresses of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hicache_ext.cuda import layouts
from hicache_ext.cuda.layouts import BlockShape, Side

LOGICAL = "PLKTHD"
POOLS = {"paged": "LK:PTHD", "strided": "LK:PTHD", "blocks_heads_first": "L:PHTKD", "blocks_tokens_first": "L:PTHKD"}
PAGES = {
    "page_first": "K:PTLHD",
    "page_first_direct": "K:PLTHD",
    "layer_first": "K:LPTHD",
    "page_head": "K:PHTLD",
    "canonical": ":PLKTHD",
}
PADDING = 48  # bytes between strided rows
SHAPES = {
    "heads": BlockShape(3, 2, 4, 2, 32),
    "one token": BlockShape(2, 2, 1, 2, 64),
    "latent": BlockShape(3, 1, 5, 1, 1152),
    "odd bytes": BlockShape(2, 2, 3, 3, 7),
    "odd tokens": BlockShape(5, 2, 13, 1, 520),
    "wide": BlockShape(2, 2, 16, 8, 256),
}


def sizes(shape: BlockShape, pages: int) -> dict[str, int]:
    return {"P": pages, "L": shape.layers, "K": shape.kv, "T": shape.tokens, "H": shape.heads, "D": shape.run}


def filled(name: str, shape: BlockShape, pages: int, empty: Callable[[tuple[int, ...]], Any]) -> tuple[Any, Any, Side]:
    """(buffer, logical view [P, L, K, T, H, D] of it, side). empty: makes a byte array of these dimensions."""
    axes = {**POOLS, **PAGES}[name].replace(":", "")
    size = sizes(shape, pages)
    if name == "strided":
        buffer = empty((shape.layers, shape.kv, pages, shape.tokens, shape.row + PADDING))
        rows = buffer[..., : shape.row]
        dims = (*rows.shape[:-1], shape.heads, shape.run)
        array = rows.reshape(dims) if isinstance(rows, np.ndarray) else rows.unflatten(-1, dims[-2:])
    else:
        buffer = array = empty(tuple(size[axis] for axis in axes))
    order = [axes.index(axis) for axis in LOGICAL]
    view = array.transpose(order) if isinstance(array, np.ndarray) else array.permute(order)
    return buffer, view, side(name, buffer, shape, pages)


def address(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def side(name: str, buffer: Any, shape: BlockShape, pages: int) -> Side:
    chosen = {**POOLS, **PAGES}[name].index(":")
    count = math.prod(buffer.shape[:chosen])
    flat = buffer.reshape(count, *buffer.shape[chosen:])
    bases = [address(flat[i]) for i in range(count)]
    match name:
        case "paged":
            return layouts.paged(bases, shape, pages)
        case "strided":
            return layouts.paged(bases, shape, pages, token=shape.row + PADDING)
        case "blocks_heads_first" | "blocks_tokens_first":
            return layouts.paged_blocks(bases, shape, pages, heads_first=name == "blocks_heads_first")
        case "canonical":
            return layouts.canonical(bases[0], shape, pages)
        case "page_first":
            return layouts.page_first(bases, shape, pages)
        case "page_first_direct":
            return layouts.page_first_direct(bases, shape, pages)
        case "layer_first":
            return layouts.layer_first(bases, shape, pages)
        case "page_head":
            return layouts.page_head(bases, shape, pages)
    raise ValueError(name)

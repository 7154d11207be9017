"""Block layouts as addresses: every layout of every engine is the same few numbers.

Belongs here: sides, the reduction of two sides to runs and strides, the stretches that a page consists of. Does not
belong here: moving anything.

A page is `layers x kv x tokens x heads` runs of `run` bytes: bytes only, whatever the dtype. On each side of a copy the
run of (page, plane, token, head), with plane = layer * kv + (0 for K, 1 for V), starts at

    planes[plane] + page * page_stride + token * token_stride + head * head_stride
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockShape:
    """What a page holds. kv: 2 for K and V, 1 for MLA's latent. run: bytes of one head of a token (MLA: of a token)."""

    layers: int
    kv: int
    tokens: int
    heads: int
    run: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def planes(self) -> int:
        return self.layers * self.kv

    @property
    def row(self) -> int:
        """Bytes of one token in one plane."""
        return self.heads * self.run

    @property
    def page_bytes(self) -> int:
        return self.planes * self.tokens * self.row


@dataclass(frozen=True)
class Side:
    """One side of a copy: `pages` pages by number.

    planes: address of page 0's first run in each plane. page, token, head: strides in bytes.
    """

    planes: tuple[int, ...]
    pages: int
    page: int
    token: int
    head: int

    def offsets(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint64]:
        """Byte offsets of these pages. IndexError for a page that this side does not have."""
        numbers = np.asarray(indices, np.int64)
        if numbers.ndim != 1:
            raise ValueError(f"page numbers come in one dimension, not {numbers.ndim}")
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.pages):
            raise IndexError(f"pages {numbers.min()} to {numbers.max()} were asked for and there are {self.pages}")
        return numbers.astype(np.uint64) * np.uint64(self.page)

    def extents(self, shape: BlockShape) -> list[tuple[int, int]]:
        """(address, bytes) of the memory that pages of this side lie in, in order, what touches or overlaps joined."""
        length = (
            (self.pages - 1) * self.page + (shape.tokens - 1) * self.token + (shape.heads - 1) * self.head + shape.run
        )
        joined: list[tuple[int, int]] = []
        for start in sorted(self.planes):
            if joined and start <= sum(joined[-1]):
                first, bytes_ = joined[-1]
                joined[-1] = (first, max(bytes_, start + length - first))
            else:
                joined.append((start, length))
        return joined


# ---- the sides that engines have. bases: addresses of whole buffers.


def paged(bases: Sequence[int], shape: BlockShape, pages: int, token: int | None = None) -> Side:
    """Layer-first device pools: [pages * tokens][heads][dim] in each plane. bases: one for each plane.

    token: bytes from token to token where rows are strided; packed by default.
    """
    if len(bases) != shape.planes:
        raise ValueError(f"{shape.layers} layers x {shape.kv} make {shape.planes} planes, got {len(bases)} addresses")
    token = shape.row if token is None else token
    if token < shape.row:
        raise ValueError(f"rows of {shape.row} bytes cannot lie {token} bytes apart")
    return Side(tuple(bases), pages, shape.tokens * token, token, shape.run)


def paged_blocks(bases: Sequence[int], shape: BlockShape, pages: int, heads_first: bool) -> Side:
    """vLLM's family: [blocks][heads][tokens][K then V], or heads and tokens swapped. bases: one for each layer."""
    if len(bases) != shape.layers:
        raise ValueError(f"{shape.layers} layers, got {len(bases)} addresses")
    content = shape.kv * shape.run
    planes = tuple(base + i * shape.run for base in bases for i in range(shape.kv))
    head, token = (shape.tokens * content, content) if heads_first else (content, shape.heads * content)
    return Side(planes, pages, shape.heads * shape.tokens * content, token, head)


def layer_first(bases: Sequence[int], shape: BlockShape, pages: int) -> Side:
    """[layers][pages * tokens][heads][dim] in one buffer for each of K and V."""
    layer = pages * shape.tokens * shape.row
    return Side(_planes(bases, shape, layer), pages, shape.tokens * shape.row, shape.row, shape.run)


def page_first(bases: Sequence[int], shape: BlockShape, pages: int) -> Side:
    """[pages * tokens][layers][heads][dim] in one buffer for each of K and V."""
    token = shape.layers * shape.row
    return Side(_planes(bases, shape, shape.row), pages, shape.tokens * token, token, shape.run)


def page_first_direct(bases: Sequence[int], shape: BlockShape, pages: int) -> Side:
    """[pages][layers][tokens][heads][dim] in one buffer for each of K and V."""
    layer = shape.tokens * shape.row
    return Side(_planes(bases, shape, layer), pages, shape.layers * layer, shape.row, shape.run)


def page_head(bases: Sequence[int], shape: BlockShape, pages: int) -> Side:
    """[pages][heads][tokens][layers][dim] in one buffer for each of K and V."""
    token = shape.layers * shape.run
    head = shape.tokens * token
    return Side(_planes(bases, shape, shape.run), pages, shape.heads * head, token, head)


def canonical(base: int, shape: BlockShape, pages: int) -> Side:
    """[pages][layers][K, V][tokens][heads][dim] in one buffer: the page that engines share."""
    plane = shape.tokens * shape.row
    planes = tuple(base + i * plane for i in range(shape.planes))
    return Side(planes, pages, shape.page_bytes, shape.row, shape.run)


def _planes(bases: Sequence[int], shape: BlockShape, layer: int) -> tuple[int, ...]:
    if len(bases) != shape.kv:
        raise ValueError(f"one buffer for each of {shape.kv} (K and V, or one latent), got {len(bases)} addresses")
    return tuple(base + number * layer for number in range(shape.layers) for base in bases)


# ---- two sides as runs


@dataclass(frozen=True)
class Blocks:
    """Two sides, with what is contiguous on both of them joined into longer runs: what csrc/cuda is given.

    heads is the dimension that is nearer on side b; both are 1 where a plane of a page is one run.
    """

    a_planes: tuple[int, ...]
    b_planes: tuple[int, ...]
    tokens: int
    heads: int
    run: int
    a_token: int
    a_head: int
    b_token: int
    b_head: int


def reduce(shape: BlockShape, a: Side, b: Side) -> Blocks:
    for side in (a, b):
        if len(side.planes) != shape.planes:
            raise ValueError(f"a side has {len(side.planes)} planes and the shape {shape.planes}")
        if min(side.page, side.token, side.head) < 0:
            raise ValueError("strides must not be negative")
    run = shape.run
    steps = [(shape.tokens, a.token, b.token), (shape.heads, a.head, b.head)]
    steps = [step for step in steps if step[0] > 1]
    while near := next((step for step in steps if step[1] == step[2] == run), None):
        run *= near[0]
        steps.remove(near)
    steps.sort(key=lambda step: step[2], reverse=True)
    steps += [(1, 0, 0)] * (2 - len(steps))
    (tokens, a_token, b_token), (heads, a_head, b_head) = steps
    return Blocks(a.planes, b.planes, tokens, heads, run, a_token, a_head, b_token, b_head)


@dataclass(frozen=True)
class Spans:
    """The stretches of contiguous bytes that a page is on side b: what one copy can move.

    starts: address of each stretch in page 0. at, of: where in which stretch each plane's first run lies.
    """

    bytes: int
    starts: tuple[int, ...]
    at: tuple[int, ...]
    of: tuple[int, ...]


def spans(blocks: Blocks) -> Spans | None:
    """None where a stretch is no longer than a run, or where stretches differ in length."""
    within = np.add.outer(
        np.arange(blocks.tokens, dtype=np.int64) * blocks.b_token,
        np.arange(blocks.heads, dtype=np.int64) * blocks.b_head,
    ).ravel()
    planes = np.array(blocks.b_planes, np.uint64)
    base = int(planes.min())
    starts = np.sort(np.add.outer((planes - np.uint64(base)).astype(np.int64), within).ravel())
    first = np.flatnonzero(np.diff(starts, prepend=starts[0] - blocks.run - 1) != blocks.run)
    counts = np.diff(np.append(first, len(starts)))
    if counts[0] < 2 or (counts != counts[0]).any():
        return None
    stretch = int(counts[0]) * blocks.run
    origins = starts[first]
    own = (planes - np.uint64(base)).astype(np.int64)
    of = np.searchsorted(origins, own, side="right") - 1
    at = own - origins[of]
    if (at + within.max() + blocks.run > stretch).any():
        return None  # a plane's runs lie in several stretches
    return Spans(stretch, tuple(int(o) + base for o in origins), tuple(at.tolist()), tuple(of.tolist()))

"""The canonical page: KV in an order that belongs to no engine, so that what one stored another can read.

    page    [layer][K, V][token][kv head][head dim], packed; of MLA [layer][token][dim]; little-endian elements
    key     chain.extend over the tokens of canonical pages; seeded with salt and LoRA adapter (chain)

A namespace with the tag "canonical" holds what decides these bytes and nothing of an engine: the model's config and
weights, the element type, the shape, the layers, and which part of the heads this rank has.

Belongs here: the page's shape, its namespace, moving it to and from memory that an engine describes as planes, and
which models it is known to mean the same for. Does not belong here: where an engine's planes come from (adapters).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hicache_ext import fingerprint
from hicache_ext.config import Config
from hicache_ext.page import Namespace, PageLayout, Shard
from storage_backends.base import PageBatch

TAG = "canonical"
POOL = "kv"

#: Element types, and their bytes. Types of one byte come with scales that are the engine's own affair.
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

#: Architectures whose cached keys and values are the same function of the model in every engine: keys after their
#: norm and rotation, values as projected, all layers alike.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Shape:
    """One rank's canonical page.

    kind: "mha" (K and V of every head) or "mla" (one latent vector a token: heads is 1). first_layer: number in the
    model of the first of the `layers`. heads, dim: of this rank. page_size: tokens.
    """

    kind: str
    layers: int
    first_layer: int
    heads: int
    dim: int
    dtype: str
    page_size: int

    def __post_init__(self) -> None:
        if self.kind not in ("mha", "mla") or (self.kind == "mla" and self.heads != 1):
            raise ValueError(f"no canonical page of kind {self.kind!r} with {self.heads} heads")

    @property
    def parts(self) -> int:
        """Planes of a layer: K and V, or the latent vectors."""
        return 1 if self.kind == "mla" else 2

    @property
    def dimensions(self) -> tuple[int, ...]:
        """(layers, parts, tokens, heads, dim)."""
        return self.layers, self.parts, self.page_size, self.heads, self.dim

    @property
    def page_bytes(self) -> int:
        return int(np.prod(self.dimensions)) * _ITEM_BYTES[self.dtype]

    @property
    def layout(self) -> PageLayout:
        return PageLayout(
            kind=self.kind,
            order=TAG,
            dtype=self.dtype,
            page_size=self.page_size,
            buffer_lengths=(self.page_bytes,),
            geometry=(
                ("first_layer", self.first_layer), ("head_dim", self.dim), ("kv_heads", self.heads),
                ("layers", self.layers),
            ),
        )  # fmt: skip


def namespace(config: Config, path: Path, weights: str, shape: Shape, shard: Shard) -> Namespace:
    """Of one rank's pages. path: the model's folder. shard: which part of the KV heads (tp) this is; the layers say
    the rest. Raises OSError, ValueError where the model's config cannot be read."""
    return Namespace(
        model=fingerprint.digest({"model": fingerprint.model_config(path)}),
        weights=weights,
        layout=shape.layout,
        shard=Shard(tp_rank=shard.tp_rank, tp_size=shard.tp_size),
        salt=config.salt,
        pool=POOL,
        tag=TAG,
    )


def heads_shard(tp_rank: int, tp_size: int, kv_heads: int) -> Shard:
    """The part of the KV heads that a tp rank holds; with fewer heads than ranks, neighbours hold the same one."""
    parts = min(tp_size, kv_heads)
    return Shard(tp_rank=tp_rank * parts // tp_size, tp_size=parts)


def kv_heads(model: Mapping[str, Any]) -> int:
    """Of the whole model, by its config.json."""
    return int(model.get("num_key_value_heads") or model["num_attention_heads"])


def objection(model: Mapping[str, Any], dtype: str | None = None) -> str:
    """Why pages of this model (its config.json) cannot be shared between engines; "" where they can.

    dtype: of the cache's elements, where it is known.
    """
    names = model.get("architectures") or ["unknown"]
    if names[0] not in ARCHITECTURES:
        return (
            f"{names[0]} is not among the models whose KV is known to be the same in both ({', '.join(ARCHITECTURES)})"
        )
    if model.get("sliding_window") and model.get("use_sliding_window", True):
        return "the model has layers with a sliding window"
    if dtype is not None and dtype not in _ITEM_BYTES:
        return f"KV of {dtype} comes with scales that are each engine's own"
    return ""


def mismatch(page_size: int, share_page: int) -> str:
    """Why pages or blocks of this many tokens cannot be made into shared ones; "" where they can."""
    if page_size % share_page and share_page % page_size:
        return f"pages of {page_size} tokens and `share_page: {share_page}` do not divide one another"
    return ""


class Planes(Protocol):
    """An engine's memory: for every layer and part, slots of [heads, dim] elements."""

    def read(self, layer: int, part: int, slots: Any) -> Any:
        """int tensor[len(slots), heads, dim], a copy. slots: int64 tensor."""

    def write(self, layer: int, part: int, slots: Any, values: Any) -> None:
        """The other way round."""


class Strided:
    """Planes that are tensors with strides. views: by layer and part, tensor[blocks, tokens, heads, dim]."""

    def __init__(self, views: Sequence[Sequence[Any]]) -> None:
        self._views = [[as_bits(view) for view in layer] for layer in views]
        self._tokens = int(views[0][0].shape[1])

    def read(self, layer: int, part: int, slots: Any) -> Any:
        return self._views[layer][part][slots // self._tokens, slots % self._tokens]

    def write(self, layer: int, part: int, slots: Any, values: Any) -> None:
        self._views[layer][part][slots // self._tokens, slots % self._tokens] = values


class Packed:
    """Planes of blocks whose elements lie as some kernel likes them, always in the same way.

    blocks: by layer, tensor[blocks, elements of a block]. places: int64[parts, tokens, heads, dim], where in a block
    each element is.
    """

    def __init__(self, blocks: Sequence[Any], places: Any) -> None:
        self._blocks = [as_bits(layer) for layer in blocks]
        self._tokens = int(places.shape[1])
        self._places = places

    def read(self, layer: int, part: int, slots: Any) -> Any:
        return self._blocks[layer][(slots // self._tokens)[:, None, None], self._places[part, slots % self._tokens]]

    def write(self, layer: int, part: int, slots: Any, values: Any) -> None:
        self._blocks[layer][(slots // self._tokens)[:, None, None], self._places[part, slots % self._tokens]] = values


def as_bits(tensor: Any) -> Any:
    """The tensor's elements as integers of the same size: bits are moved, never numbers."""
    import torch

    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def gather(shape: Shape, planes: Planes, slots: NDArray[np.int64], batch: PageBatch) -> None:
    """Make the pages of `batch` (one buffer each) of the tokens in these slots: int64[len(batch) * page_size].

    Where a slot is negative the page keeps what it has.
    """
    moves = _moves(shape, slots, batch, range(len(batch)))
    where = _tensor(slots[slots >= 0])
    for layer in range(shape.layers):
        for part in range(shape.parts):
            tokens = planes.read(layer, part, where)
            for page, inside, outside in moves:
                page[layer, part, inside] = tokens[outside]


def scatter(shape: Shape, planes: Planes, slots: NDArray[np.int64], batch: PageBatch, chosen: Sequence[int]) -> None:
    """Put the chosen pages of `batch` into their slots, int64[len(batch) * page_size]; a negative one means nowhere."""
    import torch

    if not chosen:
        return
    slots = slots.reshape(len(batch), shape.page_size)[list(chosen)].ravel()
    moves = _moves(shape, slots, batch, chosen)
    where = _tensor(slots[slots >= 0])
    for layer in range(shape.layers):
        for part in range(shape.parts):
            planes.write(layer, part, where, torch.cat([page[layer, part, inside] for page, inside, _ in moves]))


def _moves(
    shape: Shape, slots: NDArray[np.int64], batch: PageBatch, chosen: Sequence[int]
) -> list[tuple[Any, Any, slice]]:
    """By page: its tensor, which of its tokens have a slot, and where these are among all that have."""
    moves, done = [], 0
    for row, page in zip(slots.reshape(len(chosen), shape.page_size), chosen, strict=True):
        inside = np.flatnonzero(row >= 0)
        whole = len(inside) == shape.page_size
        moves.append(
            (page_of(shape, batch, page), slice(None) if whole else _tensor(inside), slice(done, done + len(inside)))
        )
        done += len(inside)
    return moves


def page_of(shape: Shape, batch: PageBatch, page: int) -> Any:
    """int tensor [layers, parts, tokens, heads, dim]: one page of a batch, in place."""
    import torch

    address, length = int(batch.addresses[page]), int(batch.lengths[page])
    assert length == shape.page_bytes
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[_ITEM_BYTES[shape.dtype]]
    return torch.frombuffer((ctypes.c_char * length).from_address(address), dtype=kind).view(shape.dimensions)


def pages(space: Namespace, keys: bytes, parents: bytes | None) -> PageBatch:
    """A batch of these canonical pages without memory, for a CopyBudget to give some."""
    count = len(keys) // 32
    return PageBatch(
        space, keys, parents, np.zeros(count, np.uint64), np.full(count, space.layout.payload_bytes, np.uint64),
        np.arange(count + 1, dtype=np.int64),
    )  # fmt: skip


def _tensor(numbers: NDArray[np.int64]) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(numbers))

"""`share: engines` under vLLM: canonical pages of its blocks, or the one line that says why not.

Belongs here: what must hold of vLLM's configuration, model and blocks for their bytes to be shared, and the blocks as
canonical pages. Does not belong here: the canonical page (canonical), or how a kernel packs (packing).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext import canonical, fingerprint
from hicache_ext.canonical import Planes, Shape
from hicache_ext.config import Config
from hicache_ext.page import Namespace, chain_parents
from hicache_ext.store.copies import CopyBudget
from hicache_ext.vllm import packing
from hicache_ext.vllm.blocks import UnsupportedLayout
from hicache_ext.vllm.device_blocks import DeviceBlocks, shared_blocks
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Outcome, PageBatch

#: Kernels that keep K and V as they are computed, wherever in a block.
_SIDE_BY_SIDE = frozenset({"FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"})
_PACKED = frozenset({"CPU_ATTN"})
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_STAGING_BYTES = 1 << 30


class Unshared(Exception):
    """Bytes cannot be shared; `str()` says why."""


@dataclass(frozen=True)
class SharedBlocks:
    """Canonical pages in vLLM's blocks of `block_size` tokens. Moves bytes; which pages, it is told."""

    shape: Shape
    planes: Planes
    block_size: int
    staging: CopyBudget

    def incoming(self, space: Namespace, pages: Pages) -> PageBatch | None:
        """Memory for pages to be read into; None where there is no room."""
        return self.staging.take(_empty(space, pages))

    def arrived(self, pages: Pages, batch: PageBatch, outcomes: Sequence[int]) -> list[int]:
        """The pages have their outcomes: good ones go to their blocks. Blocks that did not get all of theirs."""
        slots = self._slots(pages)
        slots[: pages.lead] = -1
        arrived = np.frombuffer(bytes(outcomes), np.uint8) == Outcome.HIT
        canonical.scatter(self.shape, self.planes, slots, batch, np.flatnonzero(arrived).tolist())
        missing = slots.reshape(len(batch), -1)[~arrived]
        return np.unique(missing[missing >= 0] // self.block_size).tolist()

    def release(self, batch: PageBatch) -> None:
        """Of `incoming`: nothing uses it any more."""
        self.staging.give(batch)

    def outgoing(self, space: Namespace, pages: Pages, budget: CopyBudget) -> PageBatch | None:
        """A copy of the pages in memory of the budget's; None where there is no room."""
        copy = budget.take(_empty(space, pages))
        if copy is None:
            return None
        try:
            canonical.gather(self.shape, self.planes, self._slots(pages), copy)
        except BaseException:
            budget.give(copy)
            raise
        return copy

    def _slots(self, pages: Pages) -> NDArray[np.int64]:
        blocks = np.asarray(pages.blocks, np.int64)
        slots = (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()
        return slots[pages.skip : pages.skip + pages.count * self.shape.page_size]


def shared(
    config: Config, vllm_config: Any, spec: Any, tensors: Mapping[str, Any], layers: Mapping[str, Any], tp_rank: int
) -> tuple[SharedBlocks | DeviceBlocks, Namespace]:
    """The blocks of this worker as canonical pages, and their namespace. layers: vLLM's attention layers by name, those
    of `tensors`. Raises Unshared."""
    model = vllm_config.model_config
    _check(vllm_config)
    path = fingerprint.locate(
        config.model.path or str(model.model), model.revision, vllm_config.load_config.download_dir
    )
    if path is None or not path.is_dir():
        raise Unshared("the model's folder is not known (set `model.path`)")
    described = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if model.quantization and "quantization_config" not in described:
        raise Unshared(f"the weights are quantised at load time ({model.quantization})")
    first = next(iter(tensors.values()))
    dtype = str(first.dtype).removeprefix("torch.")
    _refuse(canonical.objection(described, dtype))
    if dtype != str(model.dtype).removeprefix("torch."):
        raise Unshared(f"KV is {dtype}, the model computes in {str(model.dtype).removeprefix('torch.')}")
    block_size = int(spec.block_size)
    _refuse(canonical.mismatch(block_size, config.share_page))
    _check_content(spec)
    numbers = [int(found.group(1)) if (found := _LAYER.search(name)) else -1 for name in tensors]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    if [numbers[i] for i in order] != list(range(numbers[order[0]], numbers[order[0]] + len(numbers))):
        raise Unshared("its attention layers are not one to a layer of the model")
    names = [list(tensors)[i] for i in order]
    shape = Shape(
        "mha", len(names), numbers[order[0]], int(spec.num_kv_heads), int(spec.head_size), dtype, config.share_page
    )
    shard = canonical.heads_shard(
        tp_rank, int(vllm_config.parallel_config.tensor_parallel_size), canonical.kv_heads(described)
    )
    weights = f"revision:{config.model.revision}" if config.model.revision else fingerprint.weights_of(path)
    space = canonical.namespace(config, path, weights, shape, shard)
    ordered, kernels = [tensors[name] for name in names], [layers[name] for name in names]
    if first.device.type == "cpu":
        planes = planes_of(ordered, kernels, shape)
        return SharedBlocks(shape, planes, block_size, CopyBudget(_STAGING_BYTES)), space
    used = _kernels(kernels)
    if not used <= _SIDE_BY_SIDE:
        raise Unshared(f"the blocks of {', '.join(sorted(used))} are not known")
    try:
        return shared_blocks([halves(tensor, shape) for tensor in ordered], shape, block_size), space
    except UnsupportedLayout as error:
        raise Unshared(str(error)) from error


def halves(tensor: Any, shape: Shape) -> list[Any]:
    """K and V of a layer's KV tensor as [blocks, tokens, heads, dim], in place. Raises Unshared.

    The tensor is [blocks, heads, tokens, K then V] (vLLM 0.32), or has K and V apart: [blocks, 2, tokens, heads, dim]
    (0.25), or before the blocks (older ones). Strides are as they may be.
    """
    dims = tuple(tensor.shape)
    if len(dims) == 4 and dims[1] == shape.heads and dims[3] == 2 * shape.dim:
        view = tensor.permute(0, 2, 1, 3)
        return [view[..., : shape.dim], view[..., shape.dim :]]
    if len(dims) == 5 and dims[3:] == (shape.heads, shape.dim) and (dims[0] == 2) != (dims[1] == 2):
        return list(tensor.unbind(1 if dims[1] == 2 else 0))
    raise Unshared(f"blocks of shape {dims[1:]} are not known")


def _kernels(layers: Sequence[Any]) -> set[str]:
    return {layer.get_attn_backend().get_name() for layer in layers}


def planes_of(tensors: Sequence[Any], layers: Sequence[Any], shape: Shape) -> Planes:
    """Of each layer's KV tensor in host memory. Raises Unshared for what nobody knows to read."""
    views = [halves(tensor, shape) for tensor in tensors]
    kernels = _kernels(layers)
    if kernels <= _SIDE_BY_SIDE:
        return canonical.Strided(views)
    if kernels <= _PACKED:
        tokens = int(tensors[0].shape[2])
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise Unshared("its blocks are not contiguous")
        places = packing.learn(partial(_store, layers[0]), tensors[0].dtype, shape.heads, shape.dim, tokens)
        if places is None:
            raise Unshared("the attention kernel does not only move KV into its blocks")
        return canonical.Packed([tensor.flatten(1) for tensor in tensors], places)
    raise Unshared(f"the blocks of {', '.join(sorted(kernels))} are not known")


def _store(layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
    """By the layer's own kernel."""
    if not hasattr(layer, "isa"):  # vLLM sets it with the first batch's metadata
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        layer.isa = _get_attn_isa(cache.dtype, cache.shape[2], key.shape[-1])
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)


def _check(vllm_config: Any) -> None:
    """vLLM's own arguments. Those that change what is computed have no counterpart that could be compared."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.hf_overrides:
        raise Unshared("hf_overrides change the model")
    if str(vllm_config.load_config.load_format) == "dummy":
        raise Unshared("dummy weights are each engine's own")
    if vllm_config.speculative_config is not None:
        raise Unshared("a draft model's layers may lie in the same blocks")
    if max(int(getattr(parallel, f"{kind}_context_parallel_size", 1) or 1) for kind in ("decode", "prefill")) > 1:
        raise Unshared("context parallelism spreads a page's tokens over ranks")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise Unshared("KV scales are each engine's own")


def _check_content(spec: Any) -> None:
    """A block is K and V of every head, dense, of every token."""
    packed = (
        getattr(spec, "state_content_bytes", None) is not None
        or getattr(spec, "num_head_slots", None) is not None
        or getattr(spec, "tokens_per_state", 1) != 1
        or str(getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")) != "NONE"
    )
    if type(spec).__name__ != "FullAttentionSpec" or packed or int(spec.head_size) != int(spec.head_size_v):
        raise Unshared(f"blocks of {type(spec).__name__} with other contents than K and V of equal width")


def _refuse(reason: str) -> None:
    if reason:
        raise Unshared(reason)


def _empty(space: Namespace, pages: Pages) -> PageBatch:
    return canonical.pages(space, pages.keys, chain_parents(pages.keys, pages.parent))

"""Who we are: the Namespace of this engine's KV blocks, from vLLM's configuration and the tensors themselves.

Belongs here: which facts of a vLLM process decide whether stored pages are its own. Does not belong here: how files are
fingerprinted (fingerprint), where blocks are (blocks), or what a request adds (its salt and adapter seed its chain).
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hicache_ext import fingerprint
from hicache_ext.config import Config, ConfigError
from hicache_ext.page import Namespace, PageLayout, Shard

#: Format tag: pages of vLLM's blocks as its kernels have them. Raise the number if their meaning changes.
TAG = "vllm/1"
POOL = "kv"


@dataclass(frozen=True)
class Rank:
    """A worker's place. shards: how many different parts tp cuts the KV into; several ranks may hold the same one."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    shards: int = 1

    @property
    def shard(self) -> Shard:
        part = self.tp_rank * self.shards // self.tp_size
        return Shard(tp_rank=part, tp_size=self.shards, pp_rank=self.pp_rank, pp_size=self.pp_size)

    @property
    def writes(self) -> bool:
        """Whether this rank stores pages: the first of those that hold the same part."""
        return self.tp_rank * self.shards % self.tp_size == 0


def rank_of(vllm_config: Any, tp_rank: int, pp_rank: int) -> Rank:
    """The place of a worker, from its ranks within the groups."""
    parallel = vllm_config.parallel_config
    size = int(parallel.tensor_parallel_size)
    if getattr(vllm_config.model_config, "use_mla", False):
        shards = 1
    else:
        # Grouped queries: with fewer KV heads than ranks, neighbours hold the same head.
        shards = min(size, int(vllm_config.model_config.get_total_num_kv_heads()))
    return Rank(tp_rank, size, pp_rank, int(parallel.pipeline_parallel_size), shards)


def namespace(config: Config, vllm_config: Any, layout: PageLayout, rank: Rank) -> Namespace:
    """The namespace of one worker's blocks. Raises ConfigError, which names the key and the fix."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    revision = config.model.revision
    named = config.model.path or str(model.model)
    path = fingerprint.locate(named, model.revision, vllm_config.load_config.download_dir)
    if path is None and not revision:
        raise ConfigError(
            f"model.path = {config.model.path!r}: cannot tell which model this is (vLLM's is {named!r}, no local "
            "folder and not in the Hugging Face cache). Fix: set `model.path` to the model's folder, or "
            "`model.revision` to a name for these weights"
        )
    facts: dict[str, Any] = {
        "model": fingerprint.model_config(path) if path is not None else {"revision": revision, "name": named},
        "dtype": str(model.dtype),
        "quantization": str(model.quantization or ""),
        "overrides": repr(sorted(_items(model.hf_overrides))),
        "implementation": str(model.model_impl),
        "kv_scales": bool(getattr(cache, "calculate_kv_scales", False)),
        "draft": _draft(vllm_config),
    }
    weights = f"revision:{revision}" if revision else _weights(path, vllm_config)
    return Namespace(
        model=fingerprint.digest(facts),
        weights=weights,
        layout=layout,
        shard=rank.shard,
        quantisation=f"{model.quantization or ''}/{cache.cache_dtype}",
        salt=config.salt,
        pool=POOL,
        tag=TAG,
    )


def at_epoch(space: Namespace, epoch: str) -> Namespace:
    """The same engine after its cache was reset; "" before that."""
    return space.with_weights(f"{space.weights}/{epoch}") if epoch else space


def block_format(backends: Iterable[str], device: str, kv_layout: str | None, version: tuple[int, ...]) -> str:
    """What a block's bytes mean beside their shape: kernels pack them as they like.

    Kernels of a CPU choose by its instruction set, so that is part of it.
    """
    where = f"{device}:{_instructions()}" if device == "cpu" else device
    release = ".".join(map(str, version))
    return "/".join(["vllm", release, where, kv_layout or "", *sorted(set(backends))])


def _instructions() -> str:
    """Digest of what this CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return fingerprint.digest(sorted(flags.split()))[:12]


def _weights(path: Path | None, vllm_config: Any) -> str:
    if str(vllm_config.load_config.load_format) == "dummy":
        return "dummy"  # vLLM fills them from a constant; the model's shape is part of the identity anyway
    assert path is not None
    return fingerprint.weights_of(path)


def _draft(vllm_config: Any) -> Any:
    """A draft model's layers may lie in the same blocks: its identity counts as well."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None:
        return ""
    draft = getattr(speculative, "draft_model_config", None)
    path = fingerprint.locate(str(draft.model), draft.revision) if draft is not None else None
    return {
        "method": str(speculative.method),
        "model": fingerprint.model_config(path) if path is not None else str(getattr(draft, "model", "")),
        "weights": fingerprint.weights_of(path) if path is not None else "",
    }


def _items(overrides: Any) -> list[tuple[str, Any]]:
    if callable(overrides):
        raise ConfigError(
            "hf_overrides: is a function, so nobody can tell what it changes. Fix: give it as keys and values"
        )
    return list(dict(overrides or {}).items())

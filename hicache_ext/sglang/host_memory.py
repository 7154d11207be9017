"""Memory of SGLang's host pool: huge pages and prefaulted, where SGLang itself would take 4 KiB pages.

I/O into 4 KiB pages costs several times the CPU of I/O into huge ones, since the kernel pins each page on its own.
Belongs here: the allocation and who asks for it. Does not belong here: the hook that puts it in place (plugin).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

from hicache_ext.config import Config
from hicache_ext.sglang import identity
from storage_backends.buffers import HUGE_PAGE, OwnedMemory

logger = logging.getLogger(__name__)

NAME = "hicache_ext"


def wanted() -> Config | None:
    """The configuration where this server's host pool is ours to place: our backend on the command line, and nothing
    else decided."""
    if os.environ.get("SGLANG_HUGEPAGE_SIZE"):
        return None  # the operator chose SGLang's own way
    args = identity.server_args()
    if getattr(args, "hicache_storage_backend", None) != NAME:
        return None
    try:
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

        given = getattr(args, "hicache_storage_backend_extra_config", None)
        config = Config.load(HybridCacheController.parse_storage_backend_extra_config(given)[0])
        return config if config.host_huge_pages else None
    except Exception as error:
        # What is wrong with the configuration is said where the backend is attached.
        logger.debug("host pool: the configuration cannot be read: %r", error)
        return None


def shared(config: Config) -> bool:
    """Whether a tier would use the pool from another process."""
    chosen = [config.backend(tier) for tier in range(len(config.tiers))]
    return any(backend.shares_memory(options) for backend, options in chosen)


def around_allocate(original: Callable[..., Any], allocator: Any, dims: Any, dtype: Any, device: str = "cpu") -> Any:
    """AROUND hook of HostTensorAllocator.allocate: the same tensor, in memory of ours."""
    import torch

    size = math.prod(dims) * torch.empty([], dtype=dtype).element_size()
    config = wanted() if device == "cpu" and size >= HUGE_PAGE else None
    if config is None:
        return original(allocator, dims, dtype, device)
    try:
        placed, kind = tensor(dims, dtype, shared(config))
    except (OSError, ValueError) as error:
        logger.warning("hicache_ext: the host pool stays in SGLang's own memory: %s", error)
        return original(allocator, dims, dtype, device)
    allocator.dtype, allocator.dims = dtype, dims
    logger.info("hicache_ext: host pool of %.2f GB: %s", size / 1e9, kind)
    return placed


def tensor(dims: Any, dtype: Any, shared: bool = False) -> tuple[Any, str]:
    """A tensor in memory of ours, and what that turned out to be. OSError or ValueError when it cannot be had.

    shared: other processes may be given the memory to map.
    """
    import torch

    size = math.prod(dims) * torch.empty([], dtype=dtype).element_size()
    memory = OwnedMemory(size, not_in_children=True, shared=shared)
    # The tensor keeps the mapping alive; nobody else does.
    flat = torch.frombuffer(memory.map, dtype=torch.uint8, count=size, offset=memory.offset)
    return flat.view(dtype).reshape(dims), memory.kind

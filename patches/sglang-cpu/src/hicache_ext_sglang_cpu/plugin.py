"""SGLang plugin (entry point group `sglang.srt.plugins`): replacements for what exists on CUDA only.

Only what stands in for missing device code belongs here; nothing that changes what HiCache does.
Every patch looks for its target first: SGLang 0.5.17 to 0.5.23 differ, and a patch without a target is
left out.
"""

import importlib
import inspect
import logging

import torch

logger = logging.getLogger(__name__)

HOST_POOLS = ("mha", "mla", "mamba", "dsa", "unified")


class _Launch:
    """Stands in for a Triton kernel: `kernel[grid](*args)`."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return self.function


def _alloc_extend(prefix_lens, seq_lens, last_loc, free_pages, out, bs_upper, page_size):
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    alloc_extend_naive(prefix_lens, seq_lens, last_loc, free_pages, out, page_size, out.device)


def _alloc_decode(seq_lens, last_loc, free_pages, out, bs_upper, page_size):
    opens_a_page = (seq_lens - 1) % page_size == 0
    rank = torch.cumsum(opens_a_page.to(torch.int64), 0) - 1
    if free_pages.numel():
        opened = free_pages[rank.clamp(min=0, max=free_pages.numel() - 1)] * page_size
        out.copy_(torch.where(opens_a_page, opened, last_loc + 1))
    else:
        out.copy_(last_loc + 1)


def _not_pinned(original, self, *args, **kwargs):
    """HostKVCache pins its buffer by default; here is no accelerator to pin it for."""
    bound = inspect.signature(original).bind(self, *args, **kwargs)
    bound.arguments["pin_memory"] = False
    return original(*bound.args, **bound.kwargs)


class _Unpinned:
    """Stands in for the name `torch` in a module that pins what it makes: the same, but for pinning."""

    def __getattr__(self, name):
        found = getattr(torch, name)
        if name not in ("tensor", "empty", "zeros", "ones"):
            return found

        def make(*args, pin_memory=False, **kwargs):
            return found(*args, **kwargs)

        return make


def _lora_without_pinning(original, *args, **kwargs):
    """LoRA pins adapters and offsets, whatever the device. Done when a server has LoRA: the modules are large."""
    for name in ("layers", "lora", "mem_pool", "backend.torch_backend"):
        module = _module(f"sglang.srt.lora.{name}")
        if module is not None:
            module.torch = _Unpinned()
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    return original(*args, **kwargs)


def _module(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        logger.debug("hicache-ext-sglang-cpu: %s is not in this SGLang: %s", name, error)
        return None


def register():
    if torch.cuda.is_available():
        logger.warning("hicache-ext-sglang-cpu: this machine has a GPU; uninstall this package to use it")

    paged = _module("sglang.srt.mem_cache.allocator.paged")
    if paged is not None:
        paged.alloc_extend_kernel = _Launch(_alloc_extend)
        paged.alloc_decode_kernel = _Launch(_alloc_decode)

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__", _not_pinned, HookType.AROUND)

    HookRegistry.register("sglang.srt.lora.lora_manager.LoRAManager.__init__", _lora_without_pinning, HookType.AROUND)

    # The pools import these names under CUDA only.
    from sgl_kernel import kvcacheio

    for pool in HOST_POOLS:
        module = _module(f"sglang.srt.mem_cache.pool_host.{pool}")
        if module is not None:
            for name in kvcacheio.__all__:
                setattr(module, name, getattr(kvcacheio, name))

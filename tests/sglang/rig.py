"""A real HiCacheController over CPU host pools, in this process: for every SGLang version that the adapter supports.

Runs inside the SGLang environment, so it imports neither pytest nor anything of the test machine. What stands in:
the compiled page hash (a Python one with the same arguments), and a tiny model folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
import threading
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

PAGE = 16
LAYERS, HEADS, DIM, DTYPE = 3, 2, 32, torch.bfloat16
SLOTS = 64  # device pages
MODULE, CLASS = "hicache_ext.sglang.backend", "HiCacheExtStorage"


def model_folder(root: Path, name: str = "model", fill: int = 0, tensors: tuple[str, ...] = ("a", "b")) -> Path:
    """A folder with a config and one safetensors file of these tensors."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "hidden_size": HEADS * DIM}))
    header, body = {}, b""
    for tensor in tensors:
        header[tensor] = {"dtype": "U8", "shape": [64], "data_offsets": [len(body), len(body) + 64]}
        body += bytes([fill]) * 64
    packed = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(packed)) + packed + body)
    return folder


class _PythonHash:
    """SGLang's compiled page hash, in Python."""

    @staticmethod
    def get_hash(raw: Any, length: int, width: int, bigram: bool, prior: bytes | None, page: int | None) -> Any:
        units = [tuple(raw[i : i + 2]) for i in range(length)] if bigram else [(token,) for token in raw[:length]]
        chained, hashes = prior, []
        for start in range(0, length, page or max(length, 1)):
            digest = hashlib.sha256()
            if chained:
                digest.update(chained)
            for unit in units[start : start + (page or length)]:
                digest.update(b"".join(struct.pack("<I", token) for token in unit))
            chained = digest.digest()
            hashes.append(chained.hex())
        return hashes if page else (hashes or [""])[-1]


def prepare(**server_args: Any) -> Any:
    """Publish server arguments and a one-process group; the hash in Python. Returns the published ServerArgs."""
    import torch.distributed as dist
    from sglang.srt.mem_cache.cpp_utils import native_hash
    from sglang.srt.runtime_context import get_context, get_parallel

    native_hash._load_native_hash_module = lambda: _PythonHash
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", init_method=f"file://{server_args['model_path']}/rendezvous", rank=0, world_size=1
        )
    fields = {"hicache_ratio": 2.0, "hicache_size": 0, **server_args}
    published = get_context().override_server_args(**fields).install()
    ranks = dict.fromkeys(("tp_rank", "pp_rank", "attn_tp_rank", "attn_dp_rank", "attn_dcp_rank", "attn_cp_rank"), 0)
    sizes = dict.fromkeys(("tp_size", "pp_size", "attn_tp_size", "attn_dp_size", "attn_dcp_size", "attn_cp_size"), 1)
    scope = get_parallel().override(**{**ranks, **sizes})
    scope.__enter__()
    published._rig_scope = scope
    return published


class Rig:
    """One controller: device pool, host pool, and the calls that a radix cache makes."""

    def __init__(
        self, layout: str = "page_first", mla: bool = False, hybrid: bool = False, slots: int = SLOTS, **controller: Any
    ) -> None:
        import torch.distributed as dist
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        self.layout, self.mla = layout, mla
        self.device_pool = _device_pool(mla, slots)
        self.host_pool = _host_pool(self.device_pool, layout, mla)
        self.allocator = PagedTokenToKVPoolAllocator(
            slots * PAGE, page_size=PAGE, dtype=DTYPE, device="cpu", kvcache=self.device_pool, need_sort=False
        )
        kind, pool = HiCacheController, self.host_pool
        if hybrid:
            kind, pool = _hybrid(self.host_pool, self.device_pool)
        options: dict[str, Any] = {
            "token_to_kv_pool_allocator": self.allocator,
            "mem_pool_host": pool,
            "page_size": PAGE,
            "tp_group": dist.group.WORLD,
            "load_cache_event": threading.Event(),
            "write_policy": "write_through",
            "io_backend": "direct",
            "prefetch_threshold": PAGE,
            "model_name": "served-name",
        }
        self.controller = kind(**{**options, **controller})

    @property
    def adapter(self) -> Any:
        backend = self.controller.storage_backend
        return getattr(backend, "_backend", backend)

    def attach(self, name: str, extra: dict[str, Any], **options: Any) -> None:
        """As the radix caches do, at run time."""
        pools = getattr(self.controller.mem_pool_host, "entries", None)
        if pools is not None:
            options["host_pools"] = pools
        self.controller.attach_storage_backend(
            storage_backend=name,
            prefetch_threshold=PAGE,
            model_name="served-name",
            storage_backend_extra_config=dict(extra),
            **options,
        )

    def detach(self) -> None:
        self.controller.detach_storage_backend()

    def close(self) -> None:
        if self.controller.enable_storage:
            self.detach()

    def key(self, tokens: list[int], extra_key: str | None = None, **more: Any) -> Any:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array("q", tokens), extra_key, **more)

    def hashes(self, key: Any, prior: str | None = None) -> list[str]:
        """Page hashes as this version's tree computes them for storage."""
        from sglang.srt.mem_cache import utils

        node = SimpleNamespace(key=key, parent=None)
        if prior is not None:
            node.parent = SimpleNamespace(hash_value=[prior], key=[0])
        return utils.compute_node_hash_values(node, PAGE)

    def fill(self, indices: torch.Tensor, seed: int) -> None:
        """Random bytes into these host pages."""
        torch.manual_seed(seed)
        for start in indices[::PAGE].tolist():
            page = self.host_pool.get_dummy_flat_data_page()
            self.host_pool.set_from_flat_data_page(start, torch.randn(page.numel()).to(page.dtype).reshape(page.shape))

    def bytes_of(self, indices: torch.Tensor) -> bytes:
        return b"".join(
            self.host_pool.get_data_page(start, flat=True).contiguous().view(torch.uint8).numpy().tobytes()
            for start in indices[::PAGE].tolist()
        )

    def backup(self, key: Any, seed: int, prefix: list[str] | None = None) -> tuple[bytes, list[str]]:
        """Fill host pages, write them to storage through the controller, free them. Their bytes and hashes."""
        controller = self.controller
        indices = self.host_pool.alloc(len(key) // PAGE * PAGE)
        self.fill(indices, seed)
        hashes = self.hashes(key, prefix[-1] if prefix else None)
        content = self.bytes_of(indices)
        controller.write_storage(indices, key, hashes, prefix)
        controller.ack_backup_queue.get(timeout=30)
        self.host_pool.free(indices)
        return content, hashes

    def prefetch(self, key: Any, last_hash: str | None = None, prefix: list[str] | None = None) -> bytes:
        """Ask storage for these tokens through the controller's threads; the bytes that arrived."""
        controller = self.controller
        handle: Any = "request"
        if type(controller).__name__ == "HybridCacheController":
            handle = _handle()
        operation = controller.prefetch(handle, key, last_hash, prefix)
        hit = None
        until = time.monotonic() + 30
        while hit is None and time.monotonic() < until:
            if not controller.prefetch_hit_queue.empty():
                hit = controller.prefetch_hit_queue.get()
            elif hasattr(controller, "prefetch_revoke_queue") and not controller.prefetch_revoke_queue.empty():
                controller.prefetch_revoke_queue.get()
                return b""
            else:
                time.sleep(0.002)
        assert hit is operation, "the hit query did not answer"
        if operation.storage_hit_count < PAGE:
            return b""
        operation.host_indices = self.host_pool.alloc(operation.storage_hit_count)
        # Nothing of what is there before may pass for loaded.
        self.fill(operation.host_indices, seed=987654)
        controller.prefetch_buffer.put(operation)
        if hasattr(controller, "prefetch_sync_queue"):
            while True:
                ack = controller.ack_prefetch_queue.get(timeout=30)
                done = ack.completed_tokens if ack.completed_tokens is not None else done  # noqa: F821
                if ack.completed_req:
                    break
        else:
            while operation.completed_tokens < operation.storage_hit_count and not operation.is_terminated():
                assert time.monotonic() < until, "the transfer did not end"
                time.sleep(0.002)
            done = operation.completed_tokens
        content = self.bytes_of(operation.host_indices[:done])
        self.host_pool.free(operation.host_indices)
        return content


def dynamic(extra: dict[str, Any]) -> dict[str, Any]:
    """The stock route's extra config."""
    return {**extra, "backend_name": "ours", "module_path": MODULE, "class_name": CLASS, "interface_v1": 1}


def load_plugin() -> None:
    """What SGLang does with our entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from hicache_ext.sglang import plugin

    plugin.register()
    HookRegistry.apply_hooks()


def _device_pool(mla: bool, slots: int = SLOTS, device: str = "cpu") -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    common: dict[str, Any] = {
        "size": slots * PAGE, "page_size": PAGE, "dtype": DTYPE, "layer_num": LAYERS, "device": device,
        "enable_memory_saver": False,
    }  # fmt: skip
    if mla:
        return MLATokenToKVPool(kv_lora_rank=48, qk_rope_head_dim=16, **common)
    return MHATokenToKVPool(head_num=HEADS, head_dim=DIM, **common)


def _host_pool(device_pool: Any, layout: str, mla: bool) -> Any:
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    kind = MLATokenToKVPoolHost if mla else MHATokenToKVPoolHost
    options: dict[str, Any] = {"pin_memory": False, "device": "cpu"}
    first: Any = device_pool
    if hasattr(device_pool, "get_device_pool_infos"):  # 0.5.23: from the facts of the device pool
        first = device_pool.get_device_pool_infos()[0].buffer_info
        options |= {"device_capacity_tokens": device_pool.size}
        options |= {"start_layer": device_pool.start_layer, "end_layer": device_pool.end_layer}
        if mla:
            options["target_layer_num"] = LAYERS
    return kind(first, 2.0, 0, PAGE, layout, **options)


def _hybrid(host_pool: Any, device_pool: Any) -> tuple[Any, Any]:
    from sglang.srt.mem_cache.hicache_storage import PoolName
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    try:
        from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
    except ImportError:
        from sglang.srt.mem_cache.memory_pool_host import HostPoolGroup, PoolEntry
    import inspect

    wanted = {
        "name": PoolName.KV, "host_pool": host_pool, "device_pool": device_pool, "layer_mapper": lambda layer: layer,
        "is_primary_index_anchor": True,
    }  # fmt: skip
    known = inspect.signature(PoolEntry).parameters
    return HybridCacheController, HostPoolGroup([PoolEntry(**{k: v for k, v in wanted.items() if k in known})])


def token_of(pool: Any, layer: int, slot: int) -> list[Any]:
    """K and V of one token in one layer, [heads, dim], by the definition of each host layout."""
    page, inside = divmod(slot, PAGE)
    match pool.layout:
        case "layer_first":
            return [side[layer, slot] for side in (pool.k_buffer, pool.v_buffer)]
        case "page_first":
            return [side[slot, layer] for side in (pool.k_buffer, pool.v_buffer)]
        case "page_first_direct":
            return [side[page, layer, inside] for side in (pool.k_buffer, pool.v_buffer)]
        case _:
            return [side[page, :, inside, layer] for side in (pool.k_buffer, pool.v_buffer)]


def by_token(pool: Any, indices: Any) -> bytes:
    """[token, layer, K and V, head, dim] of these slots of an MHA host pool, whatever its layout."""
    parts = [
        torch.stack([torch.stack(token_of(pool, layer, slot)) for layer in range(LAYERS)]) for slot in indices.tolist()
    ]
    return torch.stack(parts).view(torch.uint8).numpy().tobytes()


def _handle() -> Any:
    try:
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
    except ImportError:
        return "request"
    import inspect

    values = {"rid": "request"}
    return CacheRequestHandle(**{k: values.get(k) for k in inspect.signature(CacheRequestHandle).parameters})


def out(message: str) -> None:
    print(f"[{os.getpid()}] {message}", file=sys.stderr, flush=True)


class SharedMemory:
    """A memory tier that every adapter of this process shares, as they would share a directory. Built on first use."""

    pages: dict[tuple[bytes, bytes], Any] = {}  # noqa: RUF012


def shared_tier() -> dict[str, Any]:
    """Extra config of a memory tier that outlives its adapter; `SharedMemory.pages` is its content."""
    from tests.dictionary import DictionaryBackend

    if "Backend" not in vars(SharedMemory):

        class Backend(DictionaryBackend):
            def __init__(self, options: Any, dispatcher: Any) -> None:
                super().__init__(options, dispatcher)
                self._pages = SharedMemory.pages  # type: ignore[assignment]

        from collections import OrderedDict

        SharedMemory.pages = OrderedDict()
        SharedMemory.Backend = Backend  # type: ignore[attr-defined]
        globals()["SharedBackend"] = Backend
    return {"tiers": [{"type": "rig:SharedBackend", "name": "shared"}]}

"""SGLang's unified cache with our linker, on device pools in host memory: built as SGLang builds it, driven as it is.

Real: the registry and linker factory, UnifiedRadixCache with its linker wrapper, Req, allocators, device pools. What
stands in: the model. Its KV is a function of the tokens, so a forward can check, layer by layer and only once the
pool's own wait for that layer is over, that what was loaded is what it would have computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import rig
import torch
from support import ROOT, refused, version

MODULE, CLASS = "hicache_ext.sglang.linker", "HiCacheExtLinker"
DEVICE = "cpu"  # tests/gpu puts the pools on one
_numbers = itertools.count()


def flags(extra: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The server arguments that take the linker's route."""
    config = {"linker": CLASS, "linker_module_path": MODULE, "linker_extra_config": extra}
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": config,
        **more,
    }


def page_of(kind: str) -> int:
    """Tokens in a page: sparse attention has 64 or none."""
    return 64 if kind == "dsa" else rig.PAGE


def device_pool(kind: str, slots: int) -> Any:
    """[slots + 1] pages; kind: mha, mla, swa, dsa."""
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    if kind in ("mha", "mla"):
        return rig._device_pool(kind == "mla", slots, DEVICE)
    common: dict[str, Any] = {
        "size": slots * page_of(kind),
        "page_size": page_of(kind),
        "dtype": torch.bfloat16,
        "device": DEVICE,
    }
    if kind == "swa":
        return SWAKVPool(
            size_swa=slots * rig.PAGE, head_num=rig.HEADS, head_dim=rig.DIM, swa_attention_layer_ids=[0, 2, 3],
            full_attention_layer_ids=[1, 4], **common,
        )  # fmt: skip
    assert kind == "dsa"
    return memory_pool.DSATokenToKVPool(
        kv_lora_rank=48, qk_rope_head_dim=16, layer_num=rig.LAYERS, enable_memory_saver=False, index_head_dim=128,
        kv_cache_dim=64, **common,
    )  # fmt: skip


class Worker:
    """The part of SGLang's tp worker that the cache talks to."""

    def __init__(self) -> None:
        self.model_runner = SimpleNamespace(forward_stream=None)
        self.counter: Any = None

    def register_hicache_layer_transfer_counter(self, counter: Any) -> None:
        self.counter = counter


class Linked:
    """One server's cache: `serve` is what a scheduler does with a request."""

    def __init__(
        self, kind: str = "mha", extra: dict[str, Any] | None = None, layout: str = "page_first", slots: int = 64,
        rank: tuple[int, int] | None = None, **args: Any,
    ) -> None:  # fmt: skip
        from sglang.srt.mem_cache import registry
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.runtime_context import get_memory, get_parallel

        from hicache_ext.sglang import identity

        self.kind, self.worker, self.page = kind, Worker(), page_of(kind)
        self.pool = device_pool(kind, slots)
        options = {"page_size": self.page, "dtype": torch.bfloat16, "device": DEVICE, "need_sort": False}
        if kind == "swa":
            self.allocator = SWATokenToKVPoolAllocator(
                slots * self.page, slots * self.page, kvcache=self.pool, **options
            )
        else:
            self.allocator = PagedTokenToKVPoolAllocator(slots * self.page, kvcache=self.pool, **options)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(8, 4096, DEVICE, False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=self.page,
            tp_cache_group=torch.distributed.group.WORLD,
            sliding_window_size=2 * self.page if kind == "swa" else None,
        )
        context = registry.TreeCacheBuildContext(
            server_args=None, params=params, is_hybrid_swa=kind == "swa", is_hybrid_ssm=False,
            enable_hierarchical_cache=False, disable_radix_cache=False, tp_worker=self.worker, model_config=None,
            tp_size=1, tp_rank=0, tp_group=None, full_tokens_per_layer=slots * self.page,
        )  # fmt: skip
        given = flags(extra if extra is not None else rig.shared_tier(), hicache_mem_layout=layout)
        identity.use_server_args(SimpleNamespace(model_path=str(ROOT / "model"), dtype="bfloat16", **given, **args))
        try:
            with contextlib.ExitStack() as scope:
                scope.enter_context(get_memory().override(**given))
                if rank is not None:
                    sizes = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), rank[1])
                    scope.enter_context(get_parallel().override(tp_rank=rank[0], attn_tp_rank=rank[0], **sizes))
                self.cache = registry.default_radix_cache_factory(context)
        finally:
            identity.use_server_args(None)
        self.linker = self.cache.linker.cache_linker
        self.layers = self.linker._device.layers
        self.locks: dict[str, tuple[Any, Any]] = {}

    def buffers(self, layer: int) -> list[Any]:
        """The layer's buffers, after the pool's own wait for it."""
        if self.kind == "swa":
            local, swa = self.pool.layers_mapping[layer]
            inner = self.pool.swa_kv_pool if swa else self.pool.full_kv_pool
            self.pool.get_key_buffer(layer)
            return [inner.k_buffer[local], inner.v_buffer[local]]
        self.pool.get_key_buffer(layer)
        if self.kind == "mha":
            return [self.pool.k_buffer[layer], self.pool.v_buffer[layer]]
        if self.kind == "mla":
            return [self.pool.kv_buffer[layer]]
        rows = self.pool.index_k_with_scale_buffer[layer]  # a row for each page
        return [self.pool.kv_buffer[layer], rows.view(torch.uint8).reshape(rows.shape[0] * self.page, -1)]

    def is_swa(self, layer: int) -> bool:
        return self.kind == "swa" and self.pool.layers_mapping[layer][1]

    def rows(self, layer: int, indices: Any) -> Any:
        """Where the layer keeps these slots."""
        return self.allocator.translate_loc_from_full_to_swa(indices) if self.is_swa(layer) else indices

    def request(self, tokens: list[int], **more: Any) -> Any:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        return Req(f"r{next(_numbers)}", "", array("q", tokens), SamplingParams(max_new_tokens=1), **more)

    def admit(self, tokens: list[int], **more: Any) -> tuple[Any, int]:
        """Match and queue the load; (request, tokens to be loaded)."""
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams

        request = self.request(tokens, **more)
        request.init_next_round_input(self.cache)
        self.locks[request.rid] = request.last_node, self.cache.inc_lock_ref(request.last_node).to_dec_params()
        loaded = 0
        if request.host_hit_length:
            wanted = InitLoadBackParams(request.best_match_node, request.host_hit_length, req=request)
            loaded, request.last_node = self.cache.init_load_back(wanted)
        return request, loaded

    def drop(self, request: Any) -> None:
        """The request is done with its prefix."""
        node, lock = self.locks.pop(request.rid)
        self.cache.dec_lock_ref(node, lock)

    def serve(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        """Whole pages of these tokens and one token more, so that all of the pages can be a prefix."""
        return self.forward([(tokens, *self.admit([*tokens, 7], **more))])[0]

    def forward(self, batch: list[tuple[list[int], Any, int]]) -> list[dict[str, Any]]:
        """One prefill of these requests: device and loaded tokens of each, and whether it may go on."""
        self.worker.counter.set_consumer(self.cache.ready_to_load_host_cache())
        rows = []
        for tokens, request, loaded in batch:
            have = request.prefix_len + loaded
            path = self.cache.tree_core.collect_full_device_indices(
                request.last_node, self.cache.root_node_handle(request.extra_key)
            )
            private = self.cache.linker.private_load_indices.get(request.rid)
            prefix = path if private is None else torch.cat([path, private])
            assert len(prefix) == have, (len(prefix), have)
            fresh = self.allocate(len(tokens) - have)
            rows.append((have, torch.cat([prefix, fresh]).to(torch.int64)))
        wrong: dict[str, list[str]] = {request.rid: [] for _, request, _ in batch}
        for layer in range(self.layers):
            buffers = self.buffers(layer)
            for (tokens, request, _), (have, slots) in zip(batch, rows, strict=True):
                salt = (request.extra_key or "") + (request.cache_salt or "")
                window = have - 2 * self.page if self.is_swa(layer) else 0
                for number, buffer in enumerate(buffers):
                    flat = buffer.view(torch.uint8).reshape(buffer.shape[0], -1)
                    for start in range(0, len(tokens), self.page):
                        wanted = kv(tokens[: start + self.page], salt, layer, number, flat.shape[1], self.page)
                        at = self.rows(layer, slots[start : start + self.page])
                        if start >= have:
                            flat[at] = wanted
                        elif start >= window and not torch.equal(flat[at], wanted):
                            wrong[request.rid].append(f"layer {layer} buffer {number} token {start}")
        self.worker.counter.set_consumer(-1)
        failed = self.cache.finish_external_linker_loads([request for _, request, _ in batch])
        results = []
        for (tokens, request, loaded), (have, slots) in zip(batch, rows, strict=True):
            device = have - loaded
            if request in failed:
                assert request.skip_radix_cache_insert
                assert request.discard_output_reason.status_code == 503
                self.free(slots[device:])
            else:
                assert not wrong[request.rid], wrong[request.rid][:5]
                self.insert(tokens, slots, device, request)
            self.drop(request)
            results.append({"device": device, "loaded": loaded, "landed": request not in failed})
        return results

    def insert(self, tokens: list[int], slots: Any, device: int, request: Any) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        key = RadixKey(array("q", tokens), request.extra_key, cache_salt=request.cache_salt)
        evicted = dict(request.kv.component_evicted_seqlens) if request.kv is not None else {}
        # Frees what somebody inserted meanwhile.
        self.cache.insert(InsertParams(key=key, value=slots, prev_prefix_len=device, component_evicted_seqlens=evicted))

    def allocate(self, count: int) -> Any:
        if self.kind != "swa":
            return self.allocator.alloc(count)
        full, window = self.allocator.full_attn_allocator.alloc(count), self.allocator.swa_attn_allocator.alloc(count)
        self.allocator.set_full_to_swa_mapping(full, window)
        return full

    def free(self, slots: Any) -> None:
        if len(slots):
            self.allocator.free(slots)

    def settle(self, seconds: float = 60) -> None:
        """As the scheduler's steps do, until every offload was acknowledged."""
        until = time.monotonic() + seconds
        while self.cache.linker.pending_offloads:
            self.cache.check_hicache_events()
            assert time.monotonic() < until, "an offload did not end"
            time.sleep(0.002)

    def flush(self) -> None:
        """As /flush_cache does."""
        self.cache.reset()
        self.allocator.clear()
        for layer in range(self.layers):
            for buffer in self.buffers(layer):
                buffer.view(torch.uint8).fill_(0xA5)

    def close(self) -> None:
        self.cache.release_host_resources()


@contextlib.contextmanager
def linked(**options: Any) -> Iterator[Linked]:
    found = Linked(**options)
    try:
        yield found
    finally:
        found.close()


def kv(chain: list[int], salt: str, layer: int, number: int, width: int, page: int) -> Any:
    """uint8 [page, width]: the KV of the last page of this sequence."""
    digest = hashlib.sha256(f"{chain}{salt}{layer}.{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randint(0, 256, (page, width), dtype=torch.uint8, generator=generator).to(DEVICE)


# ---- what the scenarios share

PAGES = 20
TOKENS = list(range(100, 100 + PAGES * rig.PAGE))


def has_linker() -> bool:
    if version() >= (0, 5, 23):
        return True
    line = refused(lambda: __import__("hicache_ext.sglang.linker"))
    assert "needs SGLang 0.5.23 or later" in line, line
    assert "--enable-hierarchical-cache" in line
    return False


def fresh() -> dict[str, Any]:
    """The shared tier, emptied."""
    extra = rig.shared_tier()
    rig.SharedMemory.pages.clear()
    return extra


def stored(found: Linked) -> None:
    found.serve(TOKENS)
    found.settle()
    found.flush()


def hash_of(page: int) -> bytes:
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    return bytes.fromhex(get_storage_hash_str(RadixKey(array("q", TOKENS)), None, page_size=rig.PAGE)[page])


def keys() -> Any:
    """The lookup of the pages of TOKENS."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    return PoolTransfer(name=PoolName.KV, keys=[hash_of(page).hex() for page in range(PAGES)])


def wait(until: Any) -> None:
    end = time.monotonic() + 30
    while not until():
        assert time.monotonic() < end
        time.sleep(0.002)

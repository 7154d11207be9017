"""The rest of HiCacheStorage: pools and hit policies, copies, clearing, metrics, generic keys."""

from __future__ import annotations

from typing import Any

import rig
import torch
from support import TOKENS, attached, changed, logged, round_trip, version


def plugin_v2_pools_and_policies() -> None:
    from sglang.srt.mem_cache import hicache_storage as storage

    policies = storage.PoolHitPolicy
    rig.SharedMemory.pages.clear()
    with attached() as found:
        adapter = found.adapter
        window = rig._host_pool(found.device_pool, "page_first", False)
        adapter.register_mem_host_pool_v2(window, storage.PoolName.SWA)
        adapter.register_mem_host_pool_v2(window, storage.PoolName.INDEXER)
        key = found.key(TOKENS)
        _, hashes = found.backup(key, 1)
        indices = window.alloc(20 * rig.PAGE)

        def put(name: Any, pages: list[int]) -> None:
            chosen = torch.cat([indices[page * rig.PAGE : (page + 1) * rig.PAGE] for page in pages])
            transfer = storage.PoolTransfer(name=name, host_indices=chosen, keys=[hashes[page] for page in pages])
            assert adapter.batch_set_v2([transfer]) == {name: [True] * len(pages)}

        def ask(name: Any, policy: Any, keys: list[str] | None = None, **more: Any) -> Any:
            transfer = storage.PoolTransfer(name=name, keys=keys, hit_policy=policy, **more)
            return adapter.batch_exists_v2(hashes, [transfer])

        assert adapter.batch_exists_v2(hashes).kv_hit_pages == 20
        assert ask(storage.PoolName.SWA, policies.ALL_PAGES).kv_hit_pages == 0
        put(storage.PoolName.INDEXER, list(range(7)))
        result = ask(storage.PoolName.INDEXER, policies.ALL_PAGES)
        assert result.kv_hit_pages == 7
        assert result.extra_pool_hit_pages[storage.PoolName.INDEXER] == 7
        put(storage.PoolName.SWA, [3, 4, 10, 11, 12, 18])
        result = ask(storage.PoolName.SWA, policies.TRAILING_PAGES, hashes[:2])
        assert result.kv_hit_pages == 13, result
        if hasattr(result, "restorable_prefix_pages"):
            assert result.restorable_prefix_pages == [5, 12, 13]
        both = [
            storage.PoolTransfer(name=storage.PoolName.SWA, keys=hashes[:1], hit_policy=policies.TRAILING_PAGES),
            storage.PoolTransfer(name=storage.PoolName.INDEXER, hit_policy=policies.ALL_PAGES),
        ]
        assert adapter.batch_exists_v2(hashes, both).kv_hit_pages == 5
        if hasattr(policies, "BLOCK_GROUPS"):
            result = ask(storage.PoolName.INDEXER, policies.BLOCK_GROUPS, hashes[:10], block_pages=4, group_pages=2)
            assert result.kv_hit_pages == 20, "it never gates the prefix"
            assert result.extra_pool_hit_pages[storage.PoolName.INDEXER] == 12
        # What was written for one pool comes back, and only for that pool.
        target = window.alloc(2 * rig.PAGE)
        found_bytes = [window.get_data_page(int(indices[page * rig.PAGE])).clone() for page in (10, 11)]
        transfer = storage.PoolTransfer(name=storage.PoolName.SWA, host_indices=target, keys=hashes[10:12])
        assert adapter.batch_get_v2([transfer]) == {storage.PoolName.SWA: [True, True]}
        for page, expected in enumerate(found_bytes):
            assert torch.equal(window.get_data_page(int(target[page * rig.PAGE])), expected)
        transfer = storage.PoolTransfer(name=storage.PoolName.INDEXER, host_indices=target, keys=hashes[10:12])
        assert adapter.batch_get_v2([transfer]) == {storage.PoolName.INDEXER: [False, False]}


def plugin_pools_without_addresses_are_copied() -> None:
    with attached() as found:
        adapter = found.adapter

        class NoAddresses(type(found.host_pool)):  # type: ignore[misc]
            def get_page_buffer_meta(self, indices: Any) -> Any:
                raise ValueError("none here")

        assert adapter.served_namespace(), "as the thread of KV events may ask at any time"
        with changed(found.host_pool, __class__=NoAddresses), logged() as lines:
            adapter.register_mem_pool_host(found.host_pool)
            assert adapter.details()["pools"]["kv"] == "copies"
            assert lines.count("gives no page addresses") == 1
            round_trip(found, seed=8)
            round_trip(found, [token + 1 for token in TOKENS], seed=9)
            assert lines.count("gives no page addresses") == 1
            assert adapter.details()["adapter"]["pools_by_copies"] == 1


def plugin_logical_anchor_holds_nothing() -> None:
    from sglang.srt.mem_cache import hicache_storage as storage
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    rig.SharedMemory.pages.clear()
    with attached() as found:
        adapter = found.adapter
        adapter.register_mem_pool_host(LogicalHostPool(64 * rig.PAGE, rig.PAGE))
        adapter.register_mem_host_pool_v2(found.host_pool, storage.PoolName.SWA)
        key = found.key(TOKENS)
        hashes = found.hashes(key)
        indices = found.host_pool.alloc(len(TOKENS))
        assert adapter.details()["pools"]["kv"] == "nothing"
        assert adapter.batch_set_v1(hashes, indices) == [True] * 20
        assert adapter.batch_exists_v2(hashes).kv_hit_pages == 0
        transfer = storage.PoolTransfer(name=storage.PoolName.SWA, host_indices=indices, keys=hashes)
        assert adapter.batch_exists_v2(hashes, [transfer]).kv_hit_pages == 0
        adapter.batch_set_v2([transfer])
        assert adapter.batch_exists_v2(hashes, [transfer]).kv_hit_pages == 20
        assert adapter.batch_get_v1(hashes, indices) == [True] * 20


def plugin_clear_takes_only_our_own() -> None:
    rig.SharedMemory.pages.clear()
    with attached(extra={**rig.shared_tier(), "salt": "other"}) as found:
        found.backup(found.key(TOKENS), 1)
    others = len(rig.SharedMemory.pages)
    with attached() as found:
        key = found.key(TOKENS)
        found.backup(key, 1)
        assert len(rig.SharedMemory.pages) == 2 * others
        # 0.5.17's plain controller leaves clearing to the tree, which calls the backend.
        clear = getattr(found.controller, "clear_storage_backend", found.adapter.clear)
        assert clear() is True
        assert len(rig.SharedMemory.pages) == others
        assert found.prefetch(key) == b""


def plugin_metrics() -> None:
    from sglang.srt.observability.metrics_collector import StorageMetrics

    with attached(enable_storage_metrics=True) as found:
        round_trip(found)
        metrics = found.adapter.get_stats()
        assert isinstance(metrics, StorageMetrics)
        assert metrics.backup_pgs == [20]
        assert metrics.prefetch_pgs == [20]
        assert metrics.backup_bandwidth[0] > 0
        assert metrics.prefetch_bandwidth[0] > 0
        assert found.adapter.get_stats().prefetch_pgs == []


def plugin_any_string_is_a_key() -> None:
    with attached() as found:
        adapter = found.adapter
        pages = [torch.randn(64).to(torch.bfloat16) for _ in range(4)]
        keys = [f"{'ab' * 31}{i:02x}.draft" for i in range(4)]
        assert adapter.batch_get(keys, [torch.zeros_like(page) for page in pages]) == [None] * 4
        assert adapter.batch_set(keys, pages) is True
        got = adapter.batch_get(keys, [torch.zeros_like(page) for page in pages])
        assert all(torch.equal(one, two) for one, two in zip(got, pages, strict=True))
        assert adapter.exists(keys[0])
        assert not adapter.exists("something else")
        # The page of the same hash in the pool is another page.
        assert adapter.exists(keys[0][:64]) is False
        # Another size under the same key is a miss, not another page's bytes.
        assert adapter.get(keys[0], torch.zeros(32, dtype=torch.bfloat16)) is None


def plugin_draft_pages_of_0_5_17() -> None:
    if version() > (0, 5, 17):
        return
    rig.SharedMemory.pages.clear()
    found = rig.Rig()
    draft = rig._host_pool(rig._device_pool(False), "page_first", False)
    found.controller.set_draft_kv_pool(found.device_pool, draft)
    found.attach("hicache_ext", rig.shared_tier())
    key = found.key(TOKENS)
    content, _ = found.backup(key, 1)
    assert len(rig.SharedMemory.pages) == 40
    assert found.prefetch(key) == content
    assert found.adapter.details()["adapter"]["read_hit"] == 40
    found.close()


def plain_without_the_zero_copy_interface() -> None:
    rig.SharedMemory.pages.clear()
    extra = rig.dynamic(rig.shared_tier())
    del extra["interface_v1"]
    with logged() as lines:
        found = rig.Rig(storage_backend="dynamic", storage_backend_extra_config=extra)
    assert lines.count("`interface_v1: 1` is missing") == 1
    assert found.controller.page_get_func.__name__ == "_generic_page_get"
    round_trip(found)
    found.close()
    # The same pages in another order of bytes are other pages.
    with attached("dynamic") as other:
        assert other.prefetch(other.key(TOKENS)) == b""

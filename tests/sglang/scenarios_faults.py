"""Corrupt pages, a store that raises, injected faults: every byte that arrives is right, and nothing hangs."""

from __future__ import annotations

import json
from typing import Any

import rig
from support import TOKENS, attached, changed, logged, round_trip, spy, version

from storage_backends.base import Outcome


def plugin_corrupt_pages_are_misses() -> None:
    rig.SharedMemory.pages.clear()
    with attached() as found:
        key = found.key(TOKENS)
        content, hashes = found.backup(key, 1)
        for page in (12, 5):
            name = next(name for name in rig.SharedMemory.pages if name[1] == bytes.fromhex(hashes[page]))
            rig.SharedMemory.pages[name][0][37] ^= 1
            got = found.prefetch(key)
            assert got == content[: page * len(content) // 20], page
        assert found.adapter.details()["adapter"]["read_corrupt"] == 2
        # The next write heals.
        assert found.backup(key, 1)[0] == content
        assert found.prefetch(key) == content


def plugin_nothing_is_raised() -> None:
    """Whatever the store does, every call answers."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    with attached() as found:
        adapter, controller = found.adapter, found.controller
        real = adapter.store

        class Broken:
            def __getattr__(self, name: str) -> Any:
                def fail(*_: Any, **__: Any) -> Any:
                    raise OSError(f"{name} is broken")

                return fail

        key = found.key(TOKENS)
        hashes = found.hashes(key)
        indices = found.host_pool.alloc(len(TOKENS))
        page = found.host_pool.get_dummy_flat_data_page()
        transfer = PoolTransfer(name=PoolName.KV, host_indices=indices, keys=hashes)
        adapter.store = Broken()
        with logged() as lines:
            for _ in range(3):
                assert adapter.batch_exists(hashes) == 0
                assert adapter.batch_get_v1(hashes, indices) == [False] * 20
                assert adapter.batch_set_v1(hashes, indices) == [False] * 20
                assert adapter.batch_exists_v2(hashes, [transfer]).kv_hit_pages == 0
                assert adapter.batch_get_v2([transfer]) == {PoolName.KV: [False] * 20}
                assert adapter.batch_set_v2([transfer]) == {PoolName.KV: [False] * 20}
                assert adapter.get(hashes[0], page) is None
                assert adapter.batch_get(hashes, [page] * 20) == [None] * 20
                assert adapter.set(hashes[0], page) is False
                assert adapter.batch_set(hashes, [page] * 20) is False
                assert adapter.exists(hashes[0]) is False
                assert adapter.clear() is False
        assert len(lines.lines) == len(set(lines.lines)), "each kind is said once"
        # Odd arguments as well.
        adapter.store = real
        assert adapter.batch_get_v1(hashes, indices[:-1]) == [False] * 20
        assert adapter.batch_set_v1(hashes, None) == [False] * 20
        assert adapter.batch_exists([]) == 0
        assert adapter.batch_get_v1([], indices[:0]) == []
        unknown = PoolTransfer(name="nobody", host_indices=indices, keys=hashes)
        assert adapter.batch_get_v2([unknown]) == {"nobody": [False] * 20}
        assert adapter.batch_exists_v2(hashes, [unknown]).kv_hit_pages == 0
        # And the threads are alive.
        adapter.store = Broken()
        found.host_pool.free(indices)
        assert found.prefetch(key) == b""
        adapter.store = real
        assert controller.prefetch_thread.is_alive()
        assert controller.backup_thread.is_alive()
        round_trip(found)


def plugin_rejected_is_not_a_failure() -> None:
    from storage_backends.base import Completion

    with attached() as found:
        key = found.key(TOKENS)
        hashes = found.hashes(key)
        indices = found.host_pool.alloc(len(TOKENS))
        table = {
            Outcome.HIT: True, Outcome.REJECTED: True, Outcome.FAILED: False, Outcome.TIMEOUT: False,
            Outcome.MISS: False, Outcome.CORRUPT: False,
        }  # fmt: skip
        for outcome, answer in table.items():
            done = Completion.finished(20, outcome)
            with changed(found.adapter.store, write=lambda *_, done=done: done, read=lambda *_, done=done: done):
                assert found.adapter.batch_set_v1(hashes, indices) == [answer] * 20
                assert found.adapter.batch_get_v1(hashes, indices) == [outcome is Outcome.HIT] * 20
        mixed = Completion(0)
        mixed.outcomes = bytearray([Outcome.HIT, Outcome.MISS] + [Outcome.HIT] * 18)
        with changed(found.adapter.store, read=lambda *_: mixed):
            assert found.adapter.batch_get_v1(hashes, indices) == [True] + [False] * 19


def plugin_own_injector() -> None:
    import os

    rig.SharedMemory.pages.clear()
    os.environ["HICACHE_EXT_ADAPTER_FAULTS"] = json.dumps({"failure": 0.3, "delay_ms": 3, "seed": 4})
    try:
        with logged() as lines, attached() as found:
            assert lines.count("faults are injected on purpose") == 1
            _under_faults(found)
            injected = found.adapter.details()["injected"]
            assert injected["read_failed"], injected
            assert injected["write_failed"], injected
            assert injected["lookup_failed"], injected
            assert injected["read_delayed"], injected
    finally:
        del os.environ["HICACHE_EXT_ADAPTER_FAULTS"]


def _under_faults(found: rig.Rig) -> None:
    """Every byte that arrives is right; nothing hangs."""
    stored: dict[int, bytes] = {}
    served = 0
    for turn in range(60):
        which = turn % 6
        key = found.key([token + 1000 * which for token in TOKENS])
        if which not in stored:
            stored[which] = found.backup(key, which)[0]
        else:
            found.backup(key, which)
        got = found.prefetch(key)
        assert stored[which].startswith(got), (turn, len(got))
        served += len(got)
    assert served, "nothing was served"


def plugin_sglang_own_injector() -> None:
    if version() < (0, 5, 23):
        return
    from sglang.srt.environ import envs

    rig.SharedMemory.pages.clear()
    with (
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY.override(0.003),
        envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(0.3),
        attached() as found,
    ):
        assert type(found.controller.storage_backend).__name__ == "HiCacheStorageFailureInjector"
        assert found.controller.page_get_func.__name__ == "_page_get_zero_copy"
        batches = spy(found.adapter, "write")
        _under_faults(found)
        assert batches
        assert any(batch.tokens is not None for batch in batches)

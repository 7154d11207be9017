"""The external linker when tiers fail, are late or full: what is told and locked, and what never reaches the device."""

from __future__ import annotations

from typing import Any

import rig
import torch
from linker_rig import PAGES, TOKENS, fresh, has_linker, hash_of, keys, linked, stored, wait
from support import changed, logged

from storage_backends.base import Completion, Outcome

# --- loads that fail


def plugin_linker_a_bad_page_fails_the_load_and_nothing_else() -> None:
    if not has_linker():
        return
    for kind in ("mha", "swa"):
        with linked(kind=kind, extra=fresh(), slots=256) as found:
            stored(found)
            free = found.allocator.available_size()
            name = found.linker._space("kv").digest, hash_of(12)
            rig.SharedMemory.pages[name][0][37] ^= 1
            with logged() as lines:
                assert found.serve(TOKENS) == {"device": 0, "loaded": len(TOKENS), "landed": False}
            assert lines.count("a load failed, SGLang aborts its requests: 1 corrupt of") == 1, lines.lines
            assert found.linker.details()["staged"][0] == dict.fromkeys(found.linker._pools, 0)
            assert found.cache.evictable_size() == 0, "nothing of it is in the tree"
            if kind == "mha":
                assert found.allocator.available_size() == free
                # The page is quarantined: what comes before it is served at once, and the next write heals it.
                assert found.serve(TOKENS) == {"device": 0, "loaded": 12 * rig.PAGE, "landed": True}
                found.settle()
                found.flush()
                assert found.serve(TOKENS)["loaded"] == len(TOKENS)


def plugin_linker_a_page_that_went_meanwhile() -> None:
    """Evicted between the lookup and the load: the request that counted on it is aborted, the next one is not."""
    if not has_linker():
        return
    with linked(extra=fresh()) as found:
        stored(found)
        request, loaded = found.admit([*TOKENS, 7])
        assert loaded == len(TOKENS)
        rig.SharedMemory.pages.clear()
        assert found.forward([(TOKENS, request, loaded)])[0]["landed"] is False
        assert found.serve(TOKENS) == {"device": 0, "loaded": 0, "landed": True}


def plugin_linker_no_byte_of_a_failed_load_reaches_the_device() -> None:
    """With one part: it is verified whole before its first byte is copied."""
    if not has_linker():
        return
    with linked(extra=fresh()) as found:
        stored(found)
        before = [buffer.clone() for layer in range(found.layers) for buffer in found.buffers(layer)]
        page = next(name for name in rig.SharedMemory.pages if name[1] == hash_of(0))
        rig.SharedMemory.pages[page][0][0] ^= 1
        request, loaded = found.admit([*TOKENS, 7])
        index = found.linker.start_layer_wise_loading()
        assert loaded
        assert found.linker.finish_layer_wise_loading(index) is False
        after = [buffer for layer in range(found.layers) for buffer in found.buffers(layer)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        found.cache.linker.private_load_indices.pop(request.rid)
        found.cache.linker.inflight_load_rids.clear()


def plugin_linker_a_tier_in_trouble_is_left_alone() -> None:
    if not has_linker():
        return
    from hicache_ext.sglang import linker

    with linked(extra=fresh()) as found:
        stored(found)
        for read in (
            lambda batch, *_: Completion.finished(len(batch), Outcome.FAILED),
            lambda *_: 1 / 0,
        ):
            with changed(found.linker.store, read=read), changed(linker, PAUSE_SECONDS=0.5):
                assert found.serve(TOKENS)["landed"] is False
            assert found.linker.lookup("r", [keys()]) == [], "offered again at once"
            found.linker._paused = 0.0
            assert found.linker.lookup("r", [keys()]) == list(range(1, PAGES + 1))
        assert found.serve(TOKENS)["landed"] is True


def plugin_linker_a_late_tier_is_not_waited_for() -> None:
    """The load ends at its deadline; what the tier does after that, it does to slots that nobody else gets."""
    if not has_linker():
        return
    with linked(extra={**fresh(), "load_timeout": 0.3}) as found:
        stored(found)
        held: list[Any] = []

        def late(batch: Any, *_: Any) -> Completion:
            held.append((batch, Completion(len(batch))))
            return held[-1][1]

        with changed(found.linker.store, read=late), logged() as lines:
            assert found.serve(TOKENS)["landed"] is False
        assert lines.count("did not give its pages of pool kv in time") == 1, lines.lines
        assert found.linker.store.stats()["shared"]["read_timeout"] == PAGES, "the tier's health knows"
        assert found.linker.details()["staged"][0]["kv"] == PAGES
        before = [buffer.clone() for layer in range(found.layers) for buffer in found.buffers(layer)]
        batch, completion = held[0]
        for page in range(len(batch)):
            for view in batch.buffers(page):
                view[:] = b"\xff" * len(view)
        completion.settle_many(range(len(batch)), [Outcome.HIT] * len(batch))
        after = [buffer for layer in range(found.layers) for buffer in found.buffers(layer)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert found.linker.details()["staged"][0]["kv"] == 0
        found.linker._paused = 0.0
        assert found.serve(TOKENS)["landed"] is True


def plugin_linker_layers_are_waited_for_one_by_one() -> None:
    if not has_linker():
        return
    import threading

    with linked(extra=fresh()) as found:
        stored(found)
        copies, gate = found.linker._sides[0].host.copies, threading.Semaphore(0)
        original = copies.load_layers

        def gated(parts: Any, layers: int, arrived: Any) -> None:
            def held(layer: int) -> None:
                assert gate.acquire(timeout=30)
                arrived(layer)

            original(parts, layers, held)

        with changed(copies, load_layers=gated):
            request, loaded = found.admit([*TOKENS, 7])
            index = found.linker.start_layer_wise_loading()
            counter = found.linker.layer_done_counter
            counter.set_consumer(index)
            futures = counter.futures[index]
            for layer in range(found.layers):
                assert not futures[layer].done()
                gate.release()
                found.buffers(layer)  # waits for this layer
                assert futures[layer].done()
                assert not any(later.done() for later in futures[layer + 1 :])
            assert found.linker.finish_layer_wise_loading(index) is True
            assert loaded
        found.cache.linker.private_load_indices.pop(request.rid)
        found.cache.linker.inflight_load_rids.clear()


# --- offloads


def plugin_linker_device_pages_are_read_before_they_may_change() -> None:
    """A node is locked until its offload's result was taken; what changes on the device after that is not stored."""
    if not has_linker():
        return
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    with linked(extra=fresh()) as found:
        store, held = found.linker.store, []
        original = store.write

        def hold(batch: Any) -> Completion:
            held.append((batch, Completion(len(batch))))
            return held[-1][1]

        with changed(store, write=hold):
            found.serve(TOKENS)
            wait(lambda: held)
            found.cache.check_hicache_events()
            free = found.allocator.available_size()
            found.cache.evict(EvictParams(num_tokens=len(TOKENS)))
            assert found.allocator.available_size() == free, "evicted under an offload"
            # The bytes are in our own memory: nothing that happens on the device can change them.
            for layer in range(found.layers):
                for buffer in found.buffers(layer):
                    buffer.view(torch.uint8).fill_(0x11)
            for batch, completion in held:
                done = original(batch)
                assert done.wait(30)
                completion.settle_many(range(len(batch)), done.outcomes)
        found.settle()
        found.cache.evict(EvictParams(num_tokens=len(TOKENS)))
        assert found.allocator.available_size() == free + len(TOKENS)
        found.flush()
        assert found.serve(TOKENS) == {"device": 0, "loaded": len(TOKENS), "landed": True}


def plugin_linker_offloads_lock_a_part_of_the_pool_only() -> None:
    """Results come in the order of the calls, and what was turned down is offloaded at its next hit."""
    if not has_linker():
        return
    with linked(extra=fresh(), slots=64) as found:
        held: list[Any] = []

        def hold(batch: Any) -> Completion:
            held.append((batch, Completion(len(batch))))
            return held[-1][1]

        chains = [list(range(1000 * i, 1000 * i + 10 * rig.PAGE)) for i in range(1, 4)]
        original = found.linker.store.write
        with changed(found.linker.store, write=hold):
            for chain in chains:
                found.serve(chain)
            assert found.linker.counters.snapshot()["offload_refused_full"] == 2
            assert found.linker.num_completed_offloads() == 0, "a later result must wait for the first"
            from hicache_ext.sglang import linker_offloads

            # A tier that never ends it: given up, in order.
            found.linker._offloads._queue.join()
            found.linker._offloads._ordered[0].until = 0.0
            assert found.linker.num_completed_offloads() == 3
            assert linker_offloads.LOCKED_SHARE < 1
        for batch, completion in held:
            done = original(batch)
            assert done.wait(30)
            completion.settle_many(range(len(batch)), done.outcomes)
        found.settle()
        for chain in chains:
            found.serve(chain)
            found.settle()
        found.flush()
        assert [found.serve(chain)["loaded"] for chain in chains] == [10 * rig.PAGE] * 3


def plugin_linker_writes_that_fail_are_told() -> None:
    if not has_linker():
        return
    with linked(extra=fresh()) as found:
        for write in (lambda batch: Completion.finished(len(batch), Outcome.REJECTED), lambda _: 1 / 0):
            with changed(found.linker.store, write=write):
                found.serve(TOKENS)
                found.settle()
            assert not rig.SharedMemory.pages
            assert found.linker.details()["staged"][1] == {"kv": 0}
        found.serve(TOKENS)  # a hit on the device: offloaded this time
        found.settle()
        assert len(rig.SharedMemory.pages) == PAGES

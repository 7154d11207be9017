"""The external linker under SGLang's unified cache: its factory, tree, wrapper, allocators and device pools on the CPU.

Belongs here: round trips, identity, updates. Does not belong here: faults (scenarios_linker_faults), machines
(scenarios_linker_machines). Every forward of linker_rig checks each layer's bytes after the pool's own wait for it.
SGLang takes linkers of others from 0.5.23 on; before, the module refuses with one line.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import linker_rig
import numpy as np
import rig
import torch
from linker_rig import PAGES, TOKENS, fresh, has_linker, keys, kv, linked, stored, wait
from support import LAYOUTS, ROOT, attached, changed, fresh_weights, logged

from hicache_ext.sglang import identity, weights
from tests.dictionary import DictionaryBackend


def plugin_linker_round_trips() -> None:
    if not has_linker():
        return
    for kind, layout in [("mla" if mla else "mha", layout) for layout, mla in LAYOUTS] + [("swa", "page_first")]:
        with linked(kind=kind, extra=fresh(), layout=layout, slots=128) as found:
            assert found.serve(TOKENS) == {"device": 0, "loaded": 0, "landed": True}
            found.settle()
            assert found.serve(TOKENS) == {"device": len(TOKENS), "loaded": 0, "landed": True}
            found.flush()
            assert found.serve(TOKENS) == {"device": 0, "loaded": len(TOKENS), "landed": True}
            assert found.serve([*TOKENS[:160], *range(5000, 5064)])["loaded"] == (0 if kind != "swa" else 160)
            found.settle()
            found.flush()
            # Longer than what is stored: the head is loaded, the rest computed.
            more = [*TOKENS, *range(9000, 9000 + 3 * rig.PAGE)]
            assert found.serve(more) == {"device": 0, "loaded": len(TOKENS), "landed": True}
            found.settle()
            assert found.linker.details()["staged"] == [dict.fromkeys(found.linker._pools, 0)] * 2
            assert found.linker.details()["copies"] == "memory copies"


def plain_linker_pools_that_sglang_assembles() -> None:
    """Sparse attention: two pools in an order of their own, one of them a row for each page."""
    if not has_linker():
        return
    tokens = list(range(6 * 64))
    with linked(kind="dsa", extra=fresh(), slots=64) as found:
        found.serve(tokens)
        found.settle()
        found.flush()
        assert found.serve(tokens)["loaded"] == len(tokens)
        assert found.linker.details()["pools"] == {"kv": "linker", "indexer": "linker"}


def plain_linker_one_request_after_another() -> None:
    """Several in one batch, of which two want the same pages; parts smaller than the load."""
    if not has_linker():
        return
    from hicache_ext.device import slots as device_slots

    other = list(range(7000, 7000 + 9 * rig.PAGE))
    extra = {**fresh(), "staging_bytes": "2MiB"}
    with changed(device_slots, PART_BYTES=3 * 12288), linked(extra=extra, slots=256) as found:
        found.serve(TOKENS)
        found.serve(other)
        found.settle()
        found.flush()
        batch = [(tokens, *found.admit([*tokens, 7])) for tokens in (TOKENS, other, TOKENS)]
        results = found.forward(batch)
        assert [one["loaded"] for one in results] == [len(TOKENS), len(other), len(TOKENS)]
        assert all(one["landed"] for one in results)
        assert found.linker.store.stats()["shared"]["read_hit"] == 29, "pages that two requests want are read once"


class Distant(DictionaryBackend):
    """A server: what it holds is known here only of pages that it was asked for."""

    capabilities = replace(DictionaryBackend.capabilities, knows=False, shared=True)

    def __init__(self, options: Any, dispatcher: Any) -> None:
        super().__init__(options, dispatcher)
        self.told: set[bytes] = set()
        self.asked = 0

    def lookup_local(self, batch: Any) -> Any:
        return np.array([batch.key(page) in self.told for page in range(len(batch))], np.uint8)

    def lookup(self, batch: Any) -> Any:
        self.asked += 1
        found = super().lookup(batch)
        self.told |= {batch.key(int(page)) for page in np.flatnonzero(found)}
        return found


def plain_linker_what_only_a_server_knows() -> None:
    """The scheduler's thread never asks it; the background does, once, and a later request has the pages."""
    if not has_linker():
        return
    with linked(extra={"tiers": [{"type": "scenarios_linker:Distant"}]}) as found:
        backend = found.linker.store.tiers[0].backend
        found.serve(TOKENS)
        found.settle()
        wait(lambda: not found.linker._asked)
        backend.told.clear()
        backend.asked = 0
        found.flush()
        assert found.linker.lookup("r", [keys()]) == [], "asked on the scheduler's thread"
        wait(lambda: not found.linker._asked)
        assert backend.asked == 1
        assert found.serve(TOKENS) == {"device": 0, "loaded": len(TOKENS), "landed": True}


# --- one directory for both routes


def _host_pages(pool: Any, mla: bool, layer: int, part: int) -> Any:
    """View [pages, tokens, ...] of one layer's K or V (or latent) in SGLang's host pool, by the axes it documents."""
    buffer = pool.kv_buffer if mla else pool.kv_buffer[part]
    match pool.layout:
        case "layer_first":
            return buffer[layer].unflatten(0, (-1, rig.PAGE))
        case "page_first":
            return buffer[:, layer].unflatten(0, (-1, rig.PAGE))
        case "page_first_direct":
            return buffer[:, layer]
        case _:  # page_head: [pages, heads, tokens, layers, dim]
            return buffer[:, :, :, layer].transpose(1, 2)


def _same_both_ways(extra: dict[str, Any], layout: str, mla: bool, linker_first: bool) -> bytes:
    """One route stores, the other serves; the namespace's digest."""
    with (
        attached(extra=extra, layout=layout, mla=mla) as host,
        linked(kind="mla" if mla else "mha", extra=extra, layout=layout, slots=128) as found,
    ):
        adapter, ours = host.adapter, found.linker._space("kv")
        assert adapter._namespace(adapter._pools["kv"]).digest == ours.digest
        indices = host.host_pool.alloc(len(TOKENS))
        hashes = host.hashes(host.key(TOKENS))
        pages = (indices[:: rig.PAGE] // rig.PAGE).tolist()

        def each() -> Any:
            for layer in range(rig.LAYERS):
                for part in range(1 if mla else 2):
                    view = _host_pages(host.host_pool, mla, layer, part)
                    for number, page in enumerate(pages):
                        width = view[page, 0].numel() * view.element_size()
                        chain = TOKENS[: (number + 1) * rig.PAGE]
                        yield view[page], kv(chain, "", layer, part, width, rig.PAGE)

        if linker_first:
            found.serve(TOKENS)
            found.settle()
            assert adapter.batch_get_v1(hashes, indices) == [True] * PAGES
            for got, wanted in each():
                assert torch.equal(got.contiguous().view(torch.uint8).reshape(wanted.shape), wanted), (layout, mla)
        else:
            for target, wanted in each():
                target.copy_(wanted.view(target.dtype).reshape(target.shape))
            assert adapter.batch_set_v1(hashes, indices) == [True] * PAGES
            assert found.serve(TOKENS)["loaded"] == len(TOKENS)
        host.host_pool.free(indices)
        return bytes(ours.digest)


def plugin_linker_shares_the_hierarchical_cache_s_pages() -> None:
    """Both ways, in every layout: namespace and bytes agree; another layout is another namespace."""
    if not has_linker():
        return
    digests = set()
    try:
        for layout, mla in LAYOUTS:
            for linker_first in (True, False):
                identity.use_server_args(SimpleNamespace(model_path=str(ROOT / "model"), dtype="bfloat16"))
                digests.add(_same_both_ways(fresh(), layout, mla, linker_first))
    finally:
        identity.use_server_args(None)
    assert len(digests) == len(LAYOUTS), "other bytes, other namespaces"


def plugin_linker_namespaces() -> None:
    if not has_linker():
        return
    other = rig.model_folder(ROOT, "linker-other", fill=5)
    spaces = {}
    for name, options in {
        "base": {},
        "layout": {"layout": "page_first_direct"},
        "mla": {"kind": "mla"},
        "salt": {"extra": {**fresh(), "salt": "tenant"}},
        "revision": {"extra": {**fresh(), "model": {"revision": "r"}}},
        "quantization": {"quantization": "fp8"},
        "rank 0": {"rank": (0, 2)},
        "rank 1": {"rank": (1, 2)},
    }.items():
        with linked(**options) as found:
            spaces[name] = found.linker._space("kv").digest
            assert found.linker.writes
    with linked(extra={**fresh(), "model": {"path": str(other)}}) as found:
        spaces["weights"] = found.linker._space("kv").digest
    with linked(kind="swa") as found:
        spaces |= {f"swa {name}": found.linker._space(name).digest for name in ("kv", "swa")}
    with linked(kind="dsa") as found:
        spaces |= {f"dsa {name}": found.linker._space(name).digest for name in ("kv", "indexer")}
    assert len(set(spaces.values())) == len(spaces), spaces
    with linked() as found:
        assert found.linker._space("kv").digest == spaces["base"]
    # No token ids, no canonical pages: an engine's own, and nobody else's.
    with logged() as lines, linked(extra={**fresh(), "share": "engines"}) as found:
        assert lines.count("`share: engines` does not hold here") == 1
        assert found.linker._space("kv").tag == identity.TAG


def plugin_linker_ranks_that_hold_the_same_bytes() -> None:
    """MLA: rank 0 writes, every rank reads, and every rank sees as many results."""
    if not has_linker():
        return
    extra = fresh()
    with linked(kind="mla", extra=extra, rank=(1, 2)) as second, linked(kind="mla", extra=extra, rank=(0, 2)) as first:
        assert first.linker._space("kv").digest == second.linker._space("kv").digest
        second.serve(TOKENS)
        assert second.linker.num_completed_offloads() == 1
        second.settle()
        assert not rig.SharedMemory.pages
        first.serve(TOKENS)
        first.settle()
        second.flush()
        assert second.serve(TOKENS)["loaded"] == len(TOKENS)


def plugin_linker_tenants() -> None:
    if not has_linker():
        return
    with linked(extra=fresh(), slots=256) as found:
        for who in ({"cache_salt": "a"}, {"cache_salt": "b"}, {"extra_key": "adapter"}, {}):
            assert found.serve(TOKENS, **who)["loaded"] == 0, who
            found.settle()
        found.flush()
        for who in ({}, {"cache_salt": "b"}, {"extra_key": "adapter"}):
            assert found.serve(TOKENS, **who)["loaded"] == len(TOKENS), who
        assert found.serve(TOKENS, cache_salt="c")["loaded"] == 0


# --- the life of a linker


def plugin_linker_cancel_reset_close() -> None:
    if not has_linker():
        return
    with linked(extra=fresh()) as found:
        stored(found)
        request, loaded = found.admit([*TOKENS, 7])
        slots = found.cache.linker.private_load_indices[request.rid]
        found.cache.release_aborted_request(request.cache_request_handle)
        found.drop(request)
        assert found.linker.start_layer_wise_loading() == -1, "a cancelled load was started"
        found.free(slots)
        assert loaded
        # A flush while a load and an offload are under way.
        found.serve(list(range(50, 50 + 5 * rig.PAGE)))
        request, _ = found.admit([*TOKENS, 7])
        index = found.linker.start_layer_wise_loading()
        found.drop(request)
        found.flush()
        assert found.linker.finish_layer_wise_loading(index) is True
        assert found.linker.num_completed_offloads() == 0
        assert found.serve(TOKENS)["landed"]
        found.close()
        found.close()
        assert found.linker.lookup("r", [keys()]) == []
        assert found.linker.finish_layer_wise_loading(index) is True


def _update(found: linker_rig.Linked) -> None:
    """As a server's update without a flush, and then the flush."""
    found.serve(TOKENS)
    found.settle()
    before = found.linker._space("kv").digest
    weights.STATE.begin("disk")
    weights.STATE.end("files:new")
    assert found.linker.lookup("r", [keys()]) == []
    old = [*TOKENS[:32], *range(800, 832)]
    found.serve(old)  # on a device that holds KV of the old weights
    found.settle()
    assert found.linker.counters.snapshot()["offload_refused_frozen"]
    assert len(rig.SharedMemory.pages) == PAGES, "a page was stored under the new weights' name"
    found.flush()
    after = found.linker._space("kv")
    assert after.digest != before
    assert after.weights == "files:new"
    assert found.serve(TOKENS) == {"device": 0, "loaded": 0, "landed": True}
    found.settle()
    found.flush()
    assert found.serve(TOKENS)["loaded"] == len(TOKENS)


def plugin_linker_weight_updates() -> None:
    if not has_linker():
        return
    fresh_weights()
    try:
        with linked(extra=fresh(), slots=256) as found:
            _update(found)
            # Between a load's lookup and its start.
            found.flush()
            request, loaded = found.admit([*TOKENS, 7])
            weights.STATE.begin("tensor")
            weights.STATE.end()
            assert found.forward([(TOKENS, request, loaded)])[0]["landed"] is False
    finally:
        fresh_weights()


def plain_linker_weight_updates() -> None:
    """Without the plugin the updater itself is watched, and the cache's own flush is heard."""
    if not has_linker():
        return
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    fresh_weights()
    try:
        with linked(extra=fresh(), slots=256) as found:
            assert WeightUpdater.update_weights_from_disk.__hicache_ext__
            _update(found)
    finally:
        fresh_weights()


def plain_linker_random_requests_under_faults() -> None:
    """Requests that share prefixes, flushes, a small pool, a tier that fails: every byte that is served is right."""
    if not has_linker():
        return
    import json
    import random

    draw = random.Random(3)
    os.environ["HICACHE_EXT_ADAPTER_FAULTS"] = json.dumps({"failure": 0.1, "delay_ms": 4, "seed": 4})
    try:
        with linked(extra=fresh(), slots=96) as found:
            counts = {"loaded": 0, "failed": 0, "served": 0}
            for turn in range(80):
                found.linker._paused = 0.0
                batch = []
                for _ in range(draw.randint(1, 2)):
                    stem = draw.randint(0, 2) * 10000
                    tokens = [*range(stem, stem + 16 * draw.randint(1, 6)), *range(turn, turn + 16)]
                    tokens = tokens[: draw.randint(1, 6) * 16]
                    if found.allocator.available_size() < 3 * len(tokens):
                        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

                        found.cache.evict(EvictParams(num_tokens=3 * len(tokens)))
                    batch.append((tokens, *found.admit([*tokens, 7])))
                for one in found.forward(batch):
                    counts["loaded"] += one["loaded"] if one["landed"] else 0
                    counts["failed"] += not one["landed"]
                    counts["served"] += one["landed"]
                found.cache.check_hicache_events()
                if draw.random() < 0.2:
                    found.settle()
                    found.flush()
            found.settle()
            assert counts["loaded"] > 500, counts
            assert counts["failed"] > 0, counts
            assert found.linker.details()["staged"] == [{"kv": 0}, {"kv": 0}]
    finally:
        del os.environ["HICACHE_EXT_ADAPTER_FAULTS"]

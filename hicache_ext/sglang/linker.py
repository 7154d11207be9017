"""HiCacheExtLinker: SGLang's external linker (0.5.23 and later) over a TieredStore, from device pools and no host pool.

Belongs here: SGLang's calls, and what decides whether pages may be served. Does not belong here: pools (linker_pools),
slots and copies (hicache_ext.device), loading (linker_loads), offloading (linker_offloads).

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config '{"linker": "HiCacheExtLinker",
        "linker_module_path": "hicache_ext.sglang.linker", "linker_extra_config": {"config": "hicache.yaml"}}'

Every call comes on the scheduler's thread and returns at once, but for `finish_layer_wise_loading`, which waits for the
layers of a load until its deadline at most, and `reset` and `close`, which wait for what is under way. What SGLang must
see alike on every rank (whether a load or an offload was taken, the order of results) depends on the arguments alone;
what only this rank knows comes as a result.

On a GPU it has run under SGLang's cache with a scripted forward (tests/gpu/test_linker.py, test_stress.py), and not yet
under a server.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np

from hicache_ext.config import ConfigError
from hicache_ext.device.sides import Sides
from hicache_ext.page import Namespace, chain_parents, pack_keys
from hicache_ext.sglang import identity, plugin, versions, weights
from hicache_ext.sglang.guard import answers
from hicache_ext.sglang.stats import AdapterStats
from hicache_ext.store import NO_TIER, TieredStore, inject, policies
from storage_backends.base import KeyBatch

if versions.check(versions.installed()) < (0, 5, 23):  # 0.5.22 has the contract, and no way to name a linker
    raise versions.UnsupportedVersion(
        f"hicache_ext's linker needs SGLang 0.5.23 or later, this is {versions.installed()}. "
        "Fix: use --enable-hierarchical-cache --hicache-storage-backend hicache_ext"
    )

from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from hicache_ext.sglang import linker_pools, linker_settings, linker_sides
from hicache_ext.sglang.linker_loads import Load, LoadFailed, Loads, Wanted
from hicache_ext.sglang.linker_offloads import Leaving, Offload, Offloads

logger = logging.getLogger(__name__)

#: Seconds for which nothing is offered after a load that a tier failed: SGLang aborts the requests of such a load.
PAUSE_SECONDS = 10.0
#: Lookups of servers that may be under way.
_ASKED = 1024


class HiCacheExtLinker(UnifiedCacheLinker):
    """One rank's linker. Built by SGLang's factory; raises there, and only there, what is wrong."""

    def __init__(
        self, server_args: Any, params: Any, *, components: Any, extra_config: Mapping[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:  # fmt: skip
        versions.check(versions.installed())
        self.options, self.config = linker_settings.read(extra_config)
        self.forward_stream = forward_stream
        self.counters = AdapterStats(per_batch=False)
        args = identity.server_args() or server_args
        self._model = identity.identify(self.config, args)
        self._with_plugin = plugin.verify(self)
        if weights.STATE.frozen:
            raise ConfigError("hicache_ext: the weights are being updated. Fix: flush the cache, or restart SGLang")
        if not self._with_plugin:
            weights.watch_without_plugin()
        self._lora = "" if plugin.maps_adapters() else identity.startup_adapters(args)
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        order = str(getattr(args, "hicache_mem_layout", None) or "page_first")
        self._device = linker_pools.open_pools(kvcache, params, components, order)
        self._pools = self._device.pools
        self.pools = self._device.group.entry_map
        self._rank = _rank(params, self._device.group.rank_replicated)
        #: Ranks that hold the same bytes leave writing to the first of them.
        self.writes = not self._device.group.rank_replicated or self._rank.tp_rank == 0
        self._process = os.getpid()
        self._spaces: dict[tuple[str, str | None], Namespace] = {}
        self._queued: dict[str, dict[str, Wanted]] = {}
        self._paused = 0.0
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._asking: ThreadPoolExecutor | None = None
        self._closed = False
        self._close_lock = threading.Lock()
        self.layer_done_counter = LayerWiseLoadCounter(self._device.layers)
        if "mamba" in self._pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        incoming, outgoing = linker_sides.host_sides(self._pools, int(self.options.staging_bytes))
        self.store: TieredStore | inject.FaultyStore = inject.wrap(TieredStore.open(self.config))
        for side in (incoming, outgoing):
            for slots in side.staging.values():
                self.store.register_memory(slots.address, slots.size)
        past = linker_sides.device_sides(self._pools, self.store, int(self.options.device_staging_bytes))
        self._sides = [Sides(incoming, past[0]), Sides(outgoing, past[1])]
        self._loads = Loads(
            self.store, self._pools, self._sides[0], self._device.layers, self.layer_done_counter, self._ended
        )
        self._offloads = Offloads(self.store, self._pools, self._sides[1], self.counters)
        logger.info(
            "hicache_ext linker: tiers %s, model %s, weights %s, tp %s/%s pp %s/%s, %s, pools %s%s",
            [tier.label for tier in self.config.tiers], self._model.model[:12], self._model.weights[:24],
            self._rank.tp_rank, self._rank.tp_size, self._rank.pp_rank, self._rank.pp_size, self._ways(),
            {name: f"{pool.layout.order}, {pool.layout.payload_bytes} bytes" for name, pool in self._pools.items()},
            "" if self._with_plugin else ", without the plugin",
        )  # fmt: skip
        # Both would need the pages' token ids, which SGLang does not give a linker.
        logger.info("hicache_ext linker: KV events of the storage tiers are not published on this route")
        if self.config.share == "engines":
            logger.warning(
                "hicache_ext linker: `share: engines` does not hold here: SGLang gives a linker no token ids. "
                "Pages are this engine's own"
            )

    # --- who we are

    def _space(self, name: str) -> Namespace | None:
        """The pool's namespace now, or None while nothing may be stored or served."""
        state = weights.STATE
        override = state.override
        if self._closed or state.frozen:
            return None
        found = self._spaces.get((name, override))
        if found is None:
            pool = self._pools[name]
            found = identity.namespace(
                self.config, self._model, self._rank, name, pool.kind, pool.layout, self._lora
            )  # fmt: skip
            if override is not None:
                found = found.with_weights(override)
            self._spaces[name, override] = found
        return found

    def _ours(self) -> bool:
        """False in a forked child: threads and devices are the parent's."""
        if os.getpid() == self._process:
            return True
        self.counters.once("forked", logging.WARNING, "this process was forked: the linker stays with its parent")
        return False

    # --- lookup: the scheduler's thread, from memory

    @answers(lambda *_, **__: [])
    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        resolved = self._device.group.resolve_transfers(transfers)
        if not resolved or not self._ours() or time.monotonic() < self._paused:
            return []
        chain = next((list(transfer.keys) for transfer in transfers if str(transfer.name) == "kv"), [])
        if not chain:
            return []
        keys = pack_keys(chain)
        parents = chain_parents(keys, None)
        usable = []
        for transfer in resolved:
            space = self._space(str(transfer.name))
            if space is None:
                self.counters.add("lookup_frozen")
                return []
            batch = KeyBatch(space, keys, parents)
            present = self.store.lookup_local(batch) != NO_TIER
            if not present.all():
                self._ask(batch)
            if str(transfer.hit_policy.value) == "trailing_pages":
                usable.append(policies.usable_trailing(present, max(1, len(transfer.keys))))
            else:
                usable.append(policies.usable_full(present))
        self.counters.add("lookups")
        together = np.logical_and.reduce(usable)
        return (np.flatnonzero(together) + 1).tolist()

    def _ask(self, batch: KeyBatch) -> None:
        """Ask servers for what memory does not know, in the background and once: the next lookup may know it."""
        if all(tier.backend.capabilities.knows for tier in self.store.tiers):
            return
        name = f"{batch.namespace.digest.hex()}{batch.keys[-32:].hex()}"
        if name in self._asked:
            return
        self._asked[name] = None
        while len(self._asked) > _ASKED:
            self._asked.popitem(last=False)
        if self._asking is None:
            self._asking = ThreadPoolExecutor(1, "hicache-linker-ask")
        self._asking.submit(self._ask_now, batch, name)

    def _ask_now(self, batch: KeyBatch, name: str) -> None:
        try:
            self.store.lookup(batch)
        except Exception:
            logger.debug("a lookup failed", exc_info=True)
        finally:
            self._asked.pop(name, None)

    # --- load

    @answers(lambda *_, **__: False)
    def load(self, rid: str, transfers: list[Any]) -> bool:
        resolved = self._device.group.resolve_transfers(transfers, allow_partial=True, allow_missing_kv=True)
        if not resolved or rid in self._queued:
            return False
        self._queued[rid] = {
            str(transfer.name): Wanted(None, list(transfer.keys), [transfer.host_indices]) for transfer in resolved
        }
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return self._queued.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        index: int = self.layer_done_counter.update_producer()
        try:
            if not self._ours():
                raise LoadFailed("this process was forked")
            merged: dict[str, Wanted] = {}
            for wanted in queued.values():
                for name, one in wanted.items():
                    whole = merged.setdefault(name, Wanted(self._space(name)))
                    whole.keys += one.keys
                    whole.indices += one.indices
            size = sum(len(wanted.keys) * self._pools[name].layout.payload_bytes for name, wanted in merged.items())
            deadline = time.monotonic() + self.options.load_timeout + size / (1 << 30)
            # Whatever runs on either stream now may still use what these pages held before.
            self._loads.put(Load(index, merged, self.record_offload_ready(), deadline))
            self.counters.add("loads")
        except Exception as error:
            self.counters.once(f"error_load_{type(error).__name__}", logging.ERROR, "a load failed: %r", error)
            self.layer_done_counter.fail(index, error)
        return index

    def _ended(self, load: Load, error: Exception | None) -> None:
        """On the loading thread."""
        if error is None:
            for wanted in load.wanted.values():
                self.counters.add("load_pages", len(wanted.keys))
            return
        self.counters.add("loads_failed")
        if isinstance(error, LoadFailed):
            if error.trouble:
                self._paused = time.monotonic() + PAUSE_SECONDS
            logger.warning(
                "hicache_ext linker: a load failed, SGLang aborts its requests: %s%s", error,
                f"; nothing is offered for {PAUSE_SECONDS:.0f} s" if error.trouble else "",
            )  # fmt: skip
        else:
            self._paused = time.monotonic() + PAUSE_SECONDS
            logger.error("hicache_ext linker: a load failed, SGLang aborts its requests", exc_info=error)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return bool(self.layer_done_counter.finish(counter_index))

    # --- offload

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        resolved = self._device.group.resolve_transfers(transfers, allow_partial=True)
        if not resolved:
            return False
        if not self.writes or not self._ours():
            self._offloads.skip(True)  # another rank's to do, or another process's
            return True
        try:
            leaving = {
                str(transfer.name): Leaving(self._space(str(transfer.name)), list(transfer.keys), transfer.host_indices)
                for transfer in resolved
            }
            self._offloads.put(Offload(leaving, self.record_offload_ready()))
        except Exception as error:
            self.counters.once(f"error_offload_{type(error).__name__}", logging.ERROR, "an offload failed: %r", error)
            self._offloads.skip(False)
        return True

    def num_completed_offloads(self) -> int:
        return self._offloads.completed()

    def pop_completed_offload(self) -> bool:
        return self._offloads.pop()

    # --- administration

    def reset(self) -> None:
        """SGLang empties its tree: nothing of older weights is left on the device after this."""
        self._queued.clear()
        if self._ours():
            self._loads.join()
            self._offloads.reset()
        self.layer_done_counter.reset()
        weights.STATE.flushed()

    def details(self) -> dict[str, Any]:
        """Every counter: the linker's, the injector's where there is one, and the tiers'."""
        return {
            "adapter": self.counters.snapshot(),
            "copies": self._ways(),
            "pools": {name: pool.layout.order for name, pool in self._pools.items()},
            "staged": [
                {name: sum(side.staging[name].lent for side in sides.all) for name in self._pools}
                for sides in self._sides
            ],
            "frozen": weights.STATE.frozen or self._closed,
            "tiers": self.store.stats(),
            "injected": getattr(self.store, "injected", {}),
        }

    def _ways(self) -> str:
        """How pages are copied, the preferred way first."""
        return self._sides[0].ways

    def close(self) -> None:
        """Let go of threads, tiers and memory. Idempotent."""
        with self._close_lock:
            if self._closed or not self._ours():
                return
            self._queued.clear()
            self._loads.close()
            self._offloads.close()
            self._closed = True
        logger.info("hicache_ext linker: %s", self.counters.snapshot())
        if self._asking is not None:
            self._asking.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        for sides in self._sides:
            sides.close()


def _rank(params: Any, replicated: bool) -> Any:
    """This rank as the hierarchical cache's storage config would describe it. ConfigError for what is not supported."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_dcp_size > 1:
        raise ConfigError(
            "hicache_ext linker: --dcp-size above 1 is not supported. Fix: use --enable-hierarchical-cache"
        )
    own = is_dp_attention_enabled()
    return SimpleNamespace(
        tp_rank=parallel.attn_tp_rank if own else parallel.tp_rank,
        tp_size=parallel.attn_tp_size if own else parallel.tp_size,
        pp_rank=parallel.pp_rank,
        pp_size=parallel.pp_size,
        attn_cp_rank=params.attn_cp_rank,
        attn_cp_size=params.attn_cp_size,
        dcp_rank=0,
        dcp_size=1,
        is_mla_model=replicated,
    )

"""HiCacheExtStorage: SGLang's HiCacheStorage interface over a TieredStore.

Belongs here: SGLang's calls and what they become: batches, outcomes, booleans. Does not belong here: who we are
(identity), where pages are (pools), prefix policies (store.policies), or how calls get here (plugin).

SGLang calls from its own background threads, and an exception that reaches one of them kills it: a request then waits
for ever. So every public method answers, whatever happens: a failed lookup found nothing, a failed read is a miss, a
failed write was not stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sglang.srt.mem_cache import hicache_storage as sglang_storage

from hicache_ext.config import Config
from hicache_ext.page import Namespace, PageLayout, chain_parents, pack_key, pack_keys, split_keys
from hicache_ext.sglang import identity, plugin, shared, unplugged, versions, weights
from hicache_ext.sglang.announcing import EVENTS
from hicache_ext.sglang.chains import Chains
from hicache_ext.sglang.generic import GenericPages
from hicache_ext.sglang.guard import answers, none_of, none_of_transfers
from hicache_ext.sglang.naming import Naming
from hicache_ext.sglang.pools import Access, HostPool, unwrap
from hicache_ext.sglang.stats import AdapterStats
from hicache_ext.sglang.tokens import Noted, TokenNotes
from hicache_ext.store import NO_TIER, TieredStore, inject, policies
from storage_backends.base import KeyBatch, Outcome, PageBatch

logger = logging.getLogger(__name__)

KV = "kv"
#: What a write may end with and still count as done. REJECTED is a choice of ours, not a failure: one False makes
#: SGLang drop the rest of the backup.
_DONE = frozenset({Outcome.HIT, Outcome.REJECTED})


class HiCacheExtStorage(sglang_storage.HiCacheStorage):
    """One rank's storage backend. Built by SGLang's dynamic factory; raises there, and only there, what is wrong."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        versions.check(versions.installed())
        self.storage_config = storage_config
        extra = dict(storage_config.extra_config or {})
        self.config = Config.load(extra)
        self.counters = AdapterStats(per_batch=bool(getattr(storage_config, "enable_storage_metrics", False)))
        self.tokens = TokenNotes()
        self._args = identity.server_args()
        self._model = identity.identify(self.config, self._args)
        self._zero_copy = bool(extra.get("interface_v1", 0))
        if not self._zero_copy:
            logger.warning(
                "hicache_ext: `interface_v1: 1` is missing in the storage backend's extra config: "
                "SGLang copies every page through staging tensors, which is slow"
            )
        self._lora = ""
        self._with_plugin = plugin.verify(self)
        unplugged.check_chains(self._with_plugin)
        if not self._with_plugin:
            unplugged.prepare(self.config, self._args)
        if self._lora == "" and not plugin.maps_adapters():
            self._lora = identity.startup_adapters(self._args)
        self._pools: dict[str, HostPool] = {}
        self._shared: shared.SharedPool | None = None
        self._namespaces: dict[tuple[HostPool, str | None], Namespace] = {}
        self._used: set[Namespace] = set()
        self._generic = GenericPages(self._namespace_of_tensors)
        self._detached = ""
        self._naming = Naming()
        self._lock = threading.Lock()
        self._closed = False
        self.store: TieredStore | inject.FaultyStore = inject.wrap(TieredStore.open(self.config))
        weights.STATE.listen(self)
        if self._with_plugin:
            EVENTS.attach(self)
        logger.info(
            "hicache_ext: tiers %s, model %s, weights %s, tp %s/%s pp %s/%s%s",
            [tier.label for tier in self.config.tiers], self._model.model[:12], self._model.weights[:24],
            storage_config.tp_rank, storage_config.tp_size, storage_config.pp_rank, storage_config.pp_size,
            "" if self._with_plugin else ", without the plugin",
        )  # fmt: skip

    # --- pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host
        self._register(KV, unwrap(mem_pool_host), flat=not self._zero_copy)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        name = str(host_pool_name)
        if name != KV or KV not in self._pools:
            self._register(name, unwrap(host_pool))

    def on_host_pools_registered(self) -> None:
        """Nothing is waiting for the last pool."""

    def _register(self, name: str, host_pool: Any, flat: bool = False) -> None:
        pool = HostPool(name, host_pool, flat)
        if pool.access is Access.COPIES:
            self.counters.add("pools_by_copies")
        if pool.access is not Access.NOTHING:
            _ = pool.layout  # raises now, at attach, rather than in a thread
        if name == KV and self.config.share == "engines":
            self._share(pool)
        # Last: from here on other threads ask for its namespace, which depends on what was found out above.
        self._pools[name] = pool
        for address, length in pool.memory():
            self.store.register_memory(address, length)
        logger.info("hicache_ext: pool %s: %s, buffers of %s bytes", name, pool.access.value, pool.lengths.tolist())

    def _share(self, pool: HostPool) -> None:
        """Canonical pages where they can be; why not is said once."""
        self._shared = None
        try:
            if pool.access is not Access.ADDRESSES:
                raise shared.Unshared("the host pool gives no page addresses, or `interface_v1` is not set")
            self._shared = shared.shared(
                self.config, self._args, self._model, self.storage_config, pool, self._with_plugin
            )
        except shared.Unshared as reason:
            logger.warning("hicache_ext: `share: engines` does not hold here: %s. Pages are this engine's own", reason)
        else:
            logger.info(
                "hicache_ext: pages are shared with other engines, %s tokens each; those with images, other multimodal "
                "inputs or LoRA adapters with SGLang only", self.config.share_page,
            )  # fmt: skip

    @property
    def chains(self) -> Chains | None:
        """What canonical pages cover SGLang's, where pages are shared with other engines."""
        return None if self._shared is None else self._shared.chains

    def _namespace(self, pool: HostPool) -> Namespace | None:
        """The pool's namespace now, or None while nothing may be stored or served."""
        state = weights.STATE
        if self._detached or self._closed:
            return None
        override = state.override
        if state.frozen:
            return None
        found = self._namespaces.get((pool, override))
        if found is None:
            found = self._namespace_of_layout(pool.name, pool.layout, pool.pool)
            self._namespaces[pool, override] = found
        return found

    def _namespace_of_tensors(self, name: str, dtype: str, size: int) -> Namespace | None:
        """The namespace of pages that come as tensors. None: there is none yet, or none for the moment."""
        pool = self._pools.get(KV)
        if pool is None or self._frozen():
            return None
        if name == KV and pool.access is Access.COPIES and size == pool.page_bytes:
            return self._namespace(pool)
        # The host layout decides the order of bytes in a flat page, also of pools that we never see.
        order = f"flat/{getattr(pool.pool, 'layout', '')}"
        return self._namespace_of_layout(
            f"generic.{name}", PageLayout("generic", order, dtype, pool.page_size, (size,))
        )

    def _namespace_of_layout(self, name: str, layout: PageLayout, host_pool: Any = None) -> Namespace:
        if name == KV and self._shared is not None:
            space = self._shared.space
        else:
            space = identity.namespace(
                self.config, self._model, self.storage_config, name, host_pool, layout, self._lora
            )
        override = weights.STATE.override
        if override is not None:
            space = space.with_weights(override)
        self._used.add(space)
        return space

    def served_namespace(self) -> bytes | None:
        """Digest of the namespace whose KV pages can be loaded at this moment; None: none can."""
        pool = self._pools.get(KV)
        space = None if pool is None or pool.access is Access.NOTHING else self._namespace(pool)
        return None if space is None else space.digest

    def is_own_shard(self, pool_name: str) -> bool:
        """Whether this rank holds bytes of this pool that no other tp rank holds."""
        pool = self._pools.get(pool_name)
        return pool is not None and not identity.is_replicated(self.storage_config, pool_name, pool.pool)

    # --- weight updates

    def weights_changing(self, kind: str) -> None:
        """Called before weights change. Without the plugin nobody tells us when L1 and L2 were flushed: detach."""
        if not self._with_plugin and not self._detached:
            self._detached = kind
            logger.warning(
                "hicache_ext: weight update (%s) without the plugin: the tiers are detached until SGLang restarts", kind
            )

    # --- v1: the KV pool, zero copy

    @answers(lambda *_, **__: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return policies.prefix_length(self._present(self._pools[KV], keys, extra_info))

    @answers(none_of)
    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return self._get(self._pools[KV], keys, host_indices, extra_info)

    @answers(none_of)
    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        return self._set(self._pools[KV], keys, host_indices, extra_info)

    # --- v2: several pools

    @answers(lambda *_, **__: sglang_storage.PoolTransferResult.empty())
    def batch_exists_v2(self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None) -> Any:
        transfers = pool_transfers or []
        anchor = self._pools[KV]
        if anchor.access is Access.NOTHING:
            # The anchor owns indices only: what the other pools hold decides. With none of them there is nothing.
            needed = any(_policy(transfer) != "block_groups" for transfer in transfers)
            kv = np.full(len(keys), needed)
        else:
            kv = self._present(anchor, keys, extra_info)
        kv_pages = policies.prefix_length(kv)
        hits: dict[str, int] = {KV: kv_pages} if kv_pages else {}
        usable = []
        for transfer in transfers:
            pool = self._pools[str(transfer.name)]
            policy = _policy(transfer)
            if policy == "block_groups":
                # The pool's own verdict; it never shortens the prefix.
                covered = policies.block_group_pages(
                    self._present(pool, transfer.keys or []), transfer.block_pages, transfer.group_pages
                )
                if covered:
                    hits[transfer.name] = covered
                continue
            present = self._present(pool, keys[:kv_pages])
            if policy == "all_pages":
                lengths = policies.usable_full(present)
            elif policy == "trailing_pages":
                lengths = policies.usable_trailing(present, max(1, len(transfer.keys or ())))
            else:
                raise ValueError(f"hit policy {policy!r} of pool {pool.name} is unknown")
            usable.append(lengths)
            if boundary := policies.longest(lengths):
                hits[transfer.name] = boundary
        restorable = policies.usable_lengths(kv, usable)
        result = sglang_storage.PoolTransferResult(restorable[-1] if restorable else 0, hits)
        if hasattr(result, "restorable_prefix_pages"):
            result.restorable_prefix_pages = restorable
        return result

    @answers(none_of_transfers)
    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {
            transfer.name: self._one_pool("batch_get_v2", transfer, self._get, transfer.host_indices, extra_info)
            for transfer in transfers
        }

    @answers(none_of_transfers)
    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {
            transfer.name: self._one_pool("batch_set_v2", transfer, self._set, transfer.host_indices, extra_info)
            for transfer in transfers
        }

    def _one_pool(self, method: str, transfer: Any, call: Callable[..., list[bool]], *args: Any) -> list[bool]:
        """One pool of a v2 call: what fails here fails for this pool only."""
        keys = transfer.keys or []
        try:
            return call(self._pools[str(transfer.name)], keys, *args)
        except Exception as error:
            kind = f"error_{method}_{type(error).__name__}"
            self.counters.once(kind, logging.ERROR, "%s of pool %s failed: %r", method, transfer.name, error)
            return [False] * len(keys)

    # --- the four operations on one pool

    def _present(self, pool: HostPool, keys: Sequence[str], extra_info: Any = None) -> policies.Flags:
        space = self._namespace(pool) if pool.access is not Access.NOTHING else None
        if space is None or not keys:
            self.counters.add("lookup_frozen", int(space is None and bool(keys)))
            return np.zeros(len(keys), bool)
        self.counters.add("lookups")
        packed = pack_keys(keys)
        if pool.name == KV and self._shared is not None:
            self._shared.chains.asked(split_keys(packed), self._names, self._lora)
            return self._shared.present(self.store, space, packed)
        # The keys of a KV lookup are one chain: with its parent the tier knows that the chain's head is in use as well,
        # which SGLang has in memory and does not ask for.
        parents = chain_parents(packed, _parent(extra_info)) if pool.name == KV else None
        return self.store.lookup(KeyBatch(space, packed, parents)) != NO_TIER

    def _get(self, pool: HostPool, keys: Sequence[str], host_indices: Any, extra_info: Any) -> list[bool]:
        if pool.access is Access.NOTHING:
            return [True] * len(keys)
        space = self._namespace(pool)
        if space is None or not keys:
            self.counters.add("read_frozen", len(keys))
            return [False] * len(keys)
        since = time.monotonic()
        pages = pool.locate(host_indices, len(keys), reading=True)
        packed = pack_keys(keys)
        if pool.name == KV and self._shared is not None:
            outcomes = self._shared.read(self.store, space, packed, host_indices)
        else:
            parents = chain_parents(packed, _parent(extra_info)) if pool.name == KV else None
            batch = PageBatch(space, packed, parents, pages.addresses, pages.lengths, pages.offsets, pages.owner)
            outcomes = self._wait(self.store.read(batch))
        # Nothing after the first page that is not there is worth reading: the prefix ends here.
        good = policies.prefix_length(np.frombuffer(outcomes, np.uint8) == Outcome.HIT)
        for page in range(good if pages.staged is not None else 0):
            pool.restore(host_indices, page, pages)
        self._account("read", outcomes)
        self.counters.batch("prefetch", good, good * pool.page_bytes, since)
        return [True] * good + [False] * (len(keys) - good)

    def _set(self, pool: HostPool, keys: Sequence[str], host_indices: Any, extra_info: Any) -> list[bool]:
        if pool.access is Access.NOTHING:
            return [True] * len(keys)
        space = self._namespace(pool)
        if space is None or not keys:
            self.counters.add("write_frozen", len(keys))
            return [True] * len(keys)  # REJECTED: a choice, not a failure
        since = time.monotonic()
        pages = pool.locate(host_indices, len(keys), reading=False)
        packed = pack_keys(keys)
        noted = self.tokens.take(keys[0]) if pool.name == KV else None
        if pool.name == KV and self._shared is not None:
            batch, outcomes = self._shared.write(
                self.store, space, packed, host_indices, noted, self._names, self._lora, self._named
            )
        else:
            parents = chain_parents(packed, _parent(extra_info)) if pool.name == KV else None
            batch = PageBatch(space, packed, parents, pages.addresses, pages.lengths, pages.offsets, pages.owner)
            if noted is not None:
                batch = self._named(batch, noted, pool.page_size)
            outcomes = self._wait(self.store.write(batch))
        notes = batch.notes
        if notes is not None:
            EVENTS.know(space.digest, batch.keys, notes)  # of pages that were there before nothing was reported now
        self._account("write", outcomes)
        stored = outcomes.count(Outcome.HIT)
        self.counters.batch("backup", stored, stored * pool.page_bytes, since)
        return [outcome in _DONE for outcome in outcomes]

    @property
    def _names(self) -> Naming:
        return EVENTS.naming or self._naming

    def _named(self, batch: PageBatch, noted: Noted, page_size: int) -> PageBatch:
        """With the pages' tokens, and the names by which KV events call them, as far as these can be known."""
        naming = self._names
        tokens, ancestors = noted.pages(len(batch), page_size), noted.ancestors
        if tokens is None or ancestors is None or noted.space is None:
            self.counters.add("pages_without_event_hash", len(batch))
            return batch if tokens is None else replace(batch, tokens=tokens)
        prior = ancestors[-1] if ancestors else None
        if not naming.fits(batch.key(0), tokens[0], noted.space, prior):
            self.counters.add("pages_without_event_hash", len(batch))
            return batch
        named = naming.name(batch.keys, tokens, noted.space, ancestors)
        if named is None:
            self.counters.add("pages_without_event_hash", len(batch))
            return replace(batch, tokens=tokens)
        return replace(batch, tokens=tokens, event_hashes=named.hashes, salt=named.salt, lora=named.lora)

    @staticmethod
    def _wait(completion: Any) -> bytearray:
        # No timeout: an outcome is given when nothing can touch the buffers any more, and SGLang reuses them at once.
        completion.wait()
        outcomes: bytearray = completion.outcomes
        return outcomes

    def _account(self, what: str, outcomes: Iterable[int]) -> None:
        values = np.bincount(np.frombuffer(bytes(outcomes), np.uint8), minlength=len(Outcome) + 1)
        for outcome in Outcome:
            if values[outcome]:
                self.counters.add(f"{what}_{outcome.name.lower()}", int(values[outcome]))

    # --- generic: any string key, tensors of SGLang's own

    @answers(lambda *_, **__: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        return self.batch_get([key], [target_location])[0]

    @answers(lambda keys, *_, **__: [None] * len(keys))
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        targets = list(target_locations or [])
        if self._frozen() or len(targets) != len(keys) or any(target is None for target in targets):
            return [None] * len(keys)
        since = time.monotonic()
        batch = self._generic.batch(keys, targets)
        if batch is None:
            return [None] * len(keys)
        outcomes = self._wait(self.store.read(batch))
        good = policies.prefix_length(np.frombuffer(outcomes, np.uint8) == Outcome.HIT)
        self._account("read", outcomes)
        self.counters.batch("prefetch", good, int(batch.lengths[:good].sum()), since)
        return [target if page < good else None for page, target in enumerate(targets)]

    @answers(lambda *_, **__: False)
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value if value is not None else target_location])

    @answers(lambda *_, **__: False)
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        tensors = list(values if values is not None else target_locations or [])
        if len(tensors) != len(keys) or any(tensor is None for tensor in tensors):
            return False
        if self._frozen():
            return True  # REJECTED
        since = time.monotonic()
        batch = self._generic.batch(keys, [tensor.contiguous() for tensor in tensors])
        if batch is None:
            return False
        outcomes = self._wait(self.store.write(batch))
        self._account("write", outcomes)
        self.counters.batch("backup", outcomes.count(Outcome.HIT), int(batch.lengths.sum()), since)
        return all(outcome in _DONE for outcome in outcomes)

    @answers(lambda *_, **__: False)
    def exists(self, key: str) -> bool:
        if self._frozen():
            return False
        packed = pack_key(key)
        if self._zero_copy and len(key) == 64 and KV in self._pools:
            return bool(self._present(self._pools[KV], [key])[0])
        spaces = self._generic.spaces(key)
        return any(self.store.lookup(KeyBatch(space, packed))[0] != NO_TIER for space in spaces)

    def _frozen(self) -> bool:
        return weights.STATE.frozen or bool(self._detached) or self._closed

    # --- administration

    @answers(lambda *_, **__: False)
    def clear(self) -> bool:
        """Forget this server's pages, of these weights and of earlier ones; nobody else's."""
        self.store.clear(self._used)
        return True

    @answers(lambda *_, **__: None)
    def get_stats(self) -> Any:
        """What SGLang's storage metrics take; see `details` for all our numbers."""
        return self.counters.storage_metrics()

    def details(self) -> dict[str, Any]:
        """Every counter: the adapter's, the injector's where there is one, and the tiers'."""
        return {
            "adapter": self.counters.snapshot(),
            "pools": {name: pool.access.value for name, pool in self._pools.items()},
            "frozen": self._frozen(),
            "tiers": self.store.stats(),
            "events": EVENTS.stats(),
            "injected": getattr(self.store, "injected", {}),
        }

    @answers(lambda *_, **__: None)
    def close(self) -> None:
        """Let go of the tiers. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        EVENTS.detach(self)
        self.store.close()


def _policy(transfer: Any) -> str:
    return str(getattr(transfer.hit_policy, "value", transfer.hit_policy))


def _parent(extra_info: Any) -> bytes | None:
    """The page before the call's first one. SGLang 0.5.17 leaves an empty list empty in later batches: unknown."""
    prefix = getattr(extra_info, "prefix_keys", None)
    return pack_key(prefix[-1]) if prefix else None

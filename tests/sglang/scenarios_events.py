"""KV events of the storage tier in SGLang's own stream: a router's view of it, beside what the store itself holds."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rig
from support import ROOT, TOKENS, attached, logged, refused, version

from hicache_ext.events import model
from hicache_ext.page import pack_keys
from hicache_ext.sglang import announcing
from hicache_ext.store import NO_TIER
from storage_backends.base import KeyBatch
from storage_backends.format import BLOCK

CHAIN = 100  # pages of one backup


class Node:
    """A node of a radix tree, as far as SGLang's event recorder looks at it."""

    def __init__(self, key: Any, parent: Any = None) -> None:
        self.key, self.parent = key, parent
        self.hash_value = self.event_hash_value = None if len(key) else []


class Tree:
    """SGLang's radix cache as its publisher and our hooks see it, with the version's own event recorder."""

    def __init__(self, found: rig.Rig) -> None:
        from sglang.srt.mem_cache import events

        self.events: list[Any] = []
        self.root_node = Node(found.key([]))
        if hasattr(events, "KVCacheEventRecorder"):
            self.kv_events = events.KVCacheEventRecorder(enabled=True, page_size=rig.PAGE)
            self._record = self.kv_events
        else:
            kind = type("Old", (events.KVCacheEventMixin,), {})
            self._record = kind()
            for name, value in {
                "enable_kv_cache_events": True, "page_size": rig.PAGE, "root_node": self.root_node,
                "kv_event_queue": [],
            }.items():  # fmt: skip
                setattr(self._record, name, value)

    def take_events(self) -> list[Any]:
        events, self.events = self.events, []
        return events

    def device_events(self, node: Node) -> list[Any]:
        """What SGLang says when this node's blocks are stored on the device."""
        if hasattr(self, "kv_events"):
            self.kv_events.record_store(node)
            return self.kv_events.take()
        self._record._record_store_event(node)
        return self._record.take_events()


class Router:
    """A consumer of SGLang's publisher, through the bytes that it sends. Counts no references, and takes offence."""

    def __init__(self, found: rig.Rig) -> None:
        from sglang.srt.disaggregation.kv_events import EventPublisherFactory
        from sglang.srt.managers.scheduler_components import kv_events_publisher
        from sglang.srt.runtime_context import get_parallel

        EventPublisherFactory._registry["null"] = lambda **_: SimpleNamespace(publish=self._hear)
        self.tree = Tree(found)
        kind = kv_events_publisher.SchedulerKvEventsPublisher
        ranks = {"pp_rank": 0, "attn_tp_rank": 0, "attn_cp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0, "dp_rank": 0}
        values = {
            "kv_events_config": '{"publisher": "null"}', "tree_cache": self.tree, "send_metrics_from_scheduler": None,
            "max_running_requests": 1, "max_total_num_tokens": 1, "get_stats": None, "ps": SimpleNamespace(**ranks),
            **ranks,
        }  # fmt: skip
        known = {field.name for field in dataclasses.fields(kind)}
        with contextlib.nullcontext() if "ps" in known else get_parallel().override(dp_rank=None):
            self.publisher = kind(**{name: value for name, value in values.items() if name in known})
        self.view: dict[int, tuple[Any, ...]] = {}
        self.clear()  # of what an earlier scenario left to be said

    def clear(self) -> None:
        """SGLang's cache is flushed."""
        from sglang.srt.disaggregation.kv_events import AllBlocksCleared

        self.tree.events.append(AllBlocksCleared())
        self.publisher.publish_kv_events()
        assert not self.view

    def _hear(self, batch: Any) -> None:
        import msgspec

        decoded = model.decode(msgspec.msgpack.encode(batch))
        assert not decoded.problems, decoded.problems
        for event in decoded.batch.events:
            if isinstance(event, model.AllBlocksCleared):
                self.view.clear()
                continue
            assert event.medium == "DISK", event
            assert len(set(event.block_hashes)) == len(event.block_hashes)
            for at, block in enumerate(event.block_hashes):
                if isinstance(event, model.BlockRemoved):
                    assert self.view.pop(block, None) is not None, "removed, though never stored"
                    continue
                assert block not in self.view, "stored twice"
                assert event.block_size == rig.PAGE
                tokens = tuple(event.token_ids[at * rig.PAGE : (at + 1) * rig.PAGE])
                parent = event.block_hashes[at - 1] if at else event.parent_block_hash
                self.view[block] = (parent, tokens, event.cache_salt, event.lora_name)

    def becomes(self, expected: dict[int, tuple[Any, ...]] | Any, seconds: float = 20) -> None:
        """Wait until the view is what a dictionary, or a function that gives one, says."""
        until = time.monotonic() + seconds
        while True:
            self.publisher.publish_kv_events()
            wanted = expected() if callable(expected) else expected
            if self.view == wanted:
                return
            if time.monotonic() > until:
                missing, wrong = wanted.keys() - self.view.keys(), self.view.keys() - wanted.keys()
                raise AssertionError(f"{len(missing)} of {len(wanted)} are missing, {len(wrong)} are too many")
            time.sleep(0.005)


class Blocks:
    """What was given to the store: by storage key, what the device's events said of the same block."""

    def __init__(self, found: rig.Rig, router: Router) -> None:
        self.found, self.router = found, router
        self.said: dict[bytes, tuple[int, tuple[Any, ...]]] = {}

    def backup(self, tokens: list[int], seed: int, above: Node | None = None, **key: Any) -> Node:
        """Store these tokens below a node; the node."""
        node = Node(self.found.key(tokens, **key), above or self.router.tree.root_node)
        events = self.router.tree.device_events(node)
        prefix: list[str] = []
        at = node.parent
        while at is not self.router.tree.root_node:
            prefix = [*at.hash_value, *prefix]
            at = at.parent
        _, hashes = self.found.backup(node.key, seed, prefix)
        assert hashes == node.hash_value
        told = [
            (block, (event.parent_block_hash if not i else event.block_hashes[i - 1],
                     tuple(event.token_ids[i * rig.PAGE : (i + 1) * rig.PAGE]),
                     getattr(event, "cache_salt", None), getattr(event, "lora_name", None)))
            for event in events for i, block in enumerate(event.block_hashes)
        ]  # fmt: skip
        self.said |= zip((bytes.fromhex(one) for one in hashes), told, strict=True)
        return node

    def resident(self) -> dict[int, tuple[Any, ...]]:
        """What a router should see: the store is asked for every page."""
        adapter = self.found.adapter
        space = adapter._namespace(adapter._pools["kv"])
        keys = list(self.said)
        there = adapter.store.lookup(KeyBatch(space, b"".join(keys))) != NO_TIER
        return dict(self.said[key] for key, flag in zip(keys, there, strict=True) if flag)


@contextlib.contextmanager
def watched(capacity: str = "64MiB", **options: Any) -> Iterator[tuple[rig.Rig, Router, Blocks, dict[str, Any]]]:
    """A rig with a local tier, and a router that listens."""
    folder = tempfile.mkdtemp(dir=ROOT)
    extra = {"tiers": [{"type": "local", "path": folder, "capacity": capacity, "engine": "threads"}]}
    with attached(extra=extra, slots=CHAIN, **options) as found:
        router = Router(found)
        yield found, router, Blocks(found, router), extra


def chain(number: int, pages: int = CHAIN) -> list[int]:
    return [(number * 7919 + i * 31) % 30000 for i in range(pages * rig.PAGE)]


def plugin_events_follow_the_tier() -> None:
    """Stores, evictions, a flush, a damaged page, detach and attach, a tier that fails: the view is what is so."""
    with watched(capacity="16MiB") as (found, router, blocks, extra):
        assert announcing.EVENTS.active
        first = blocks.backup(chain(0), 0)
        router.becomes(blocks.resident)
        assert len(router.view) == CHAIN
        for number in range(1, 14):
            blocks.backup(chain(number), number)
        router.becomes(blocks.resident)
        assert CHAIN < len(router.view) < 14 * CHAIN, "nothing was evicted"

        router.clear()
        router.becomes(blocks.resident)
        before = dict(router.view)

        last = found.key(chain(13))
        damaged = bytes.fromhex(found.hashes(last)[3])
        assert blocks.said[damaged][0] in before
        _damage(found, damaged)
        found.prefetch(last)
        router.becomes(blocks.resident)
        assert router.view.keys() == before.keys() - {blocks.said[damaged][0]}

        tier = found.adapter.store.tiers[0]
        for _ in range(3):
            tier.reads.bad(time.monotonic(), "on purpose")
        router.becomes({})
        tier.reads.good()
        router.becomes(blocks.resident)

        before = dict(router.view)
        found.detach()
        router.becomes({})
        found.attach("hicache_ext", extra)
        router.becomes(before)
        assert router.view == blocks.resident()
        assert first is not None
        stats = found.adapter.details()["events"]
        assert stats["unknown"] == stats["over_limit"] == 0, stats


def _damage(found: rig.Rig, key: bytes) -> None:
    """Flip a byte of this page on the disk."""
    backend = found.adapter.store.tiers[0].backend
    space = found.adapter._namespace(found.adapter._pools["kv"])
    page = backend._index.get(space.digest, key)
    extent = backend._tier.extent(page.folder, page.extent)
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset(page.slot) + BLOCK + 99)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def plugin_events_are_the_devices() -> None:
    """Salts, adapters and deeper nodes: hash, parent, tokens, salt and name as the device's events have them."""
    with watched() as (found, router, blocks, extra):
        kinds: list[dict[str, Any]] = [{}, {"extra_key": "some-extra-key"}, {"extra_key": "a" * 32}]
        if version() > (0, 5, 17):
            kinds += [{"cache_salt": "tenant"}, {"cache_salt": "other", "extra_key": "a" * 32}]
        names = getattr(getattr(router.tree, "kv_events", None), "lora_names", None)
        if names is not None:
            names.register(SimpleNamespace(extra_key="a" * 32, lora_id="a" * 32), "my-adapter")
        for number, kind in enumerate(kinds):
            tokens = chain(5, 12)  # the same for all
            root = blocks.backup(tokens[: 5 * rig.PAGE], number, **kind)
            announcing.EVENTS.naming._digests.clear()  # as after a restart: known from the stored pages' tokens again
            middle = blocks.backup(tokens[5 * rig.PAGE : 9 * rig.PAGE], 10 + number, above=root, **kind)
            blocks.backup(tokens[9 * rig.PAGE :], 20 + number, above=middle, **kind)
        router.becomes(blocks.resident)
        assert len(blocks.said) == 12 * len(kinds)
        # A block that two storage pages have goes with the last of them.
        assert len(router.view) == len({block for block, _ in blocks.said.values()})
        if names is not None:
            assert "my-adapter" in {lora for *_, lora in router.view.values()}
        before = dict(router.view)
        found.detach()
        router.becomes({})
        found.attach("hicache_ext", extra)
        router.becomes(before)


def plugin_events_of_nodes_whose_tokens_come_bare() -> None:
    """As SGLang's unified cache gives them to the controller: token ids without salt, which the node alone knows."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    salts: list[dict[str, Any]] = [{}, {"extra_key": "e"}]
    if version() > (0, 5, 17):
        salts.append({"cache_salt": "tenant"})
    with watched(hybrid=True) as (found, router, blocks, _):
        for number, salt in enumerate(salts):
            node = Node(found.key(chain(number, 6), **salt), router.tree.root_node)
            events = router.tree.device_events(node)
            indices = found.host_pool.alloc(6 * rig.PAGE)
            found.fill(indices, number)
            spec = SimpleNamespace(
                host_value=indices, token_ids=node.key.token_ids, hash_value=node.hash_value, prefix_keys=[],
                comp_xfers={},
            )  # fmt: skip
            info = (node.key.extra_key, salt.get("cache_salt")) if version() > (0, 5, 17) else node.key.extra_key
            tree = SimpleNamespace(
                enable_storage=True, cache_controller=found.controller, hicache_storage_pass_prefix_keys=True,
                tree_core=SimpleNamespace(
                    build_storage_backup_spec=lambda *_, spec=spec: spec,
                    prefetch_anchor_info=lambda *_, info=info: info,
                ),
                _build_sidecar_transfers=lambda *_: [], ongoing_backup={},
                inc_host_lock_ref=lambda _: SimpleNamespace(to_dec_params=lambda: None),
            )  # fmt: skip
            UnifiedRadixCache.write_backup_storage(tree, 7)
            found.controller.ack_backup_queue.get(timeout=30)
            found.host_pool.free(indices)
            for event in events:
                for i, block in enumerate(event.block_hashes):
                    parent = event.block_hashes[i - 1] if i else event.parent_block_hash
                    tokens = tuple(event.token_ids[i * rig.PAGE : (i + 1) * rig.PAGE])
                    key = pack_keys([node.hash_value[tokens_at(node, tokens)]])
                    blocks.said[key] = (block, (parent, tokens, getattr(event, "cache_salt", None), None))
        router.becomes(blocks.resident)
        assert len(router.view) == len({block for block, _ in blocks.said.values()})
        # Bare tokens that nobody vouches for: stored, and not announced.
        found.controller.write_storage(
            indices := found.host_pool.alloc(rig.PAGE), chain(99, 1), found.hashes(found.key(chain(99, 1))), []
        )
        found.controller.ack_backup_queue.get(timeout=30)
        found.host_pool.free(indices)
        assert found.adapter.details()["adapter"]["pages_without_event_hash"] == 1
        router.becomes(blocks.resident)


def tokens_at(node: Node, tokens: tuple[int, ...]) -> int:
    """Which page of the node has these tokens."""
    ids = list(node.key.token_ids)
    return next(i for i in range(len(ids) // rig.PAGE) if tuple(ids[i * rig.PAGE : (i + 1) * rig.PAGE]) == tokens)


def plugin_a_dropped_removal_is_seen() -> None:
    """Negative control: an announcer that forgets one removal is found out by the comparison."""
    announcer = announcing.EVENTS.announcer
    with watched() as (found, router, blocks, _):
        blocks.backup(TOKENS, 1)
        router.becomes(blocks.resident)
        announcer.removed = lambda *_: None  # type: ignore[method-assign]
        try:
            assert found.adapter.clear()
            line = refused(lambda: router.becomes(blocks.resident, seconds=1))
        finally:
            del announcer.removed
        assert "20 are too many" in line, line
        found.detach()
        router.becomes({})


def plain_nothing_is_announced_and_that_is_said() -> None:
    folder = Path(tempfile.mkdtemp(dir=ROOT))
    with logged() as lines:
        with attached("dynamic", {"tiers": [{"type": "local", "path": str(folder), "capacity": "64MiB"}]}) as found:
            router = Router(found)
            assert router.publisher.tree_cache is router.tree
            blocks = Blocks(found, router)
            blocks.backup(TOKENS, 1)
            assert len(blocks.resident()) == len(TOKENS) // rig.PAGE
            router.publisher.publish_kv_events()
            assert not router.view
            assert not announcing.EVENTS.active
        assert lines.count("KV events of the storage tiers") == 1

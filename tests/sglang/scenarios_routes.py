"""Both ways in, on every layout: attach, write, read back, detach; and the one line said when it cannot be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import rig
import torch
from support import (
    LAYOUTS,
    ROOT,
    TOKENS,
    attached,
    changed,
    fresh_weights,
    hashes_late,
    is_zero_copy,
    logged,
    refused,
    round_trip,
    spy,
    version,
)

from hicache_ext.sglang import identity, versions


def _every_layout(name: str) -> None:
    for layout, mla in LAYOUTS:
        rig.SharedMemory.pages.clear()
        with attached(name, layout=layout, mla=mla) as found:
            assert is_zero_copy(found), (layout, mla)
            round_trip(found)
            counted = found.adapter.details()["adapter"]
            assert counted["write_hit"] == counted["read_hit"] == 20, counted


def plugin_every_layout() -> None:
    _every_layout("hicache_ext")


def plain_every_layout() -> None:
    _every_layout("dynamic")


def plugin_stock_route_works_beside_the_plugin() -> None:
    with attached("dynamic") as found:
        assert is_zero_copy(found)
        round_trip(found)


def _hybrid(name: str) -> None:
    with attached(name, hybrid=True) as found:
        assert type(found.controller).__name__ == "HybridCacheController"
        assert is_zero_copy(found)
        round_trip(found)


def plugin_hybrid_controller() -> None:
    _hybrid("hicache_ext")


def plain_hybrid_controller() -> None:
    _hybrid("dynamic")


def _at_start(name: str, extra: dict[str, Any]) -> None:
    fresh_weights()
    rig.SharedMemory.pages.clear()
    found = rig.Rig(storage_backend=name, storage_backend_extra_config=extra)
    try:
        assert is_zero_copy(found)
        # From the files, not of this run: a server that starts again finds its pages.
        space = found.adapter._namespace(found.adapter._pools["kv"])
        assert space.weights.startswith("files:"), space.weights
        round_trip(found)
    finally:
        found.close()


def plugin_attached_at_start() -> None:
    _at_start("hicache_ext", rig.shared_tier())


def plain_attached_at_start() -> None:
    _at_start("dynamic", rig.dynamic(rig.shared_tier()))


def plugin_detach_and_attach_again() -> None:
    rig.SharedMemory.pages.clear()
    found = rig.Rig()
    for turn in range(3):
        found.attach("hicache_ext", rig.shared_tier())
        assert found.controller.storage_backend_type == "hicache_ext"
        assert is_zero_copy(found)
        key = found.key(TOKENS)
        if turn == 0:
            content, _ = found.backup(key, 5)
        assert found.prefetch(key) == content
        began = time.monotonic()
        found.detach()
        assert time.monotonic() - began < 8
        assert found.controller.storage_backend is None


def plugin_local_tier_keeps_every_layout() -> None:
    """Detached and attached again, pages come back from the disk: aligned and not, in one buffer or in many."""
    fresh_weights()
    for layout, mla in LAYOUTS:
        path = ROOT / f"local-{layout}-{mla}"
        tier = {"type": "storage_backends.local:LocalBackend", "name": "local", "path": str(path), "capacity": "64MiB"}
        found = rig.Rig(layout=layout, mla=mla)
        key = found.key(TOKENS)
        found.attach("hicache_ext", {"tiers": [tier]})
        content, _ = found.backup(key, 1)
        assert found.prefetch(key) == content, (layout, mla)
        found.detach()
        found.attach("hicache_ext", {"tiers": [tier]})
        assert found.prefetch(key) == content, (layout, mla)
        assert found.adapter.details()["adapter"]["read_hit"] == 20
        assert found.adapter.clear() is True
        assert found.prefetch(key) == b""
        found.close()


def plugin_runs_from_one_batch_to_the_next() -> None:
    """More pages than one call takes: the second batch's parent is the first one's last page."""
    pages = 140
    tokens = [(7 * i) % 5000 for i in range(pages * rig.PAGE)]
    with attached(slots=160) as found:
        batches = spy(found.adapter, "write")
        key = found.key(tokens)
        indices = found.host_pool.alloc(len(tokens))
        found.fill(indices, 3)
        prefix = ["ab" * 32]
        hashes = found.hashes(key, prefix[-1])
        found.controller.write_storage(indices, key, hashes, prefix)
        found.controller.ack_backup_queue.get(timeout=30)
        assert [len(batch) for batch in batches] == [128, 12]
        first, second = batches
        assert first.parent(0) == bytes.fromhex("ab" * 32)
        assert first.parent(5) == bytes.fromhex(hashes[4])
        assert second.parent(0) == bytes.fromhex(hashes[127])
        assert first.tokens.tolist() == [tokens[i * 16 : i * 16 + 16] for i in range(128)]
        assert second.tokens.tolist() == [tokens[i * 16 : i * 16 + 16] for i in range(128, 140)]
        signed = [int.from_bytes(bytes.fromhex(one)[:8], "big", signed=True) for one in hashes]
        assert second.event_hashes.tolist() == [[signed[i], signed[i - 1]] for i in range(128, 140)]
        assert len(found.adapter.tokens) == 0


def plain_parents_are_unknown_and_that_is_fine() -> None:
    with attached("dynamic") as found:
        batches = spy(found.adapter, "write")
        found.backup(found.key(TOKENS), 1)
        assert batches[0].parent(0) is None
        assert batches[0].parent(1) == batches[0].key(0)
        assert batches[0].tokens is None


def plugin_missing_hook_is_one_line() -> None:
    from sglang.srt.managers.cache_controller import HiCacheController

    for name in ("write_storage", "reset"):
        hooked = getattr(HiCacheController, name)
        with changed(HiCacheController, **{name: hooked.__wrapped__}):
            line = refused(lambda: rig.Rig().attach("hicache_ext", rig.shared_tier()))
        assert f"HiCacheController.{name}" in line, line
        assert "Fix:" in line, line
    rig.Rig().attach("hicache_ext", rig.shared_tier())


def _unsupported(name: str) -> None:
    for number in ("0.5.16", "0.5.24", "0.6.0", "main"):
        with changed(versions, installed=lambda number=number: number):
            extra = rig.dynamic(rig.shared_tier())
            options = {"storage_backend": name, "storage_backend_extra_config": extra}
            line = refused(lambda options=options: rig.Rig(**options))
            assert "supports SGLang 0.5.17 to 0.5.23" in line, line
            assert number in line, line


def plugin_unsupported_version_is_one_line() -> None:
    from hicache_ext.sglang import plugin

    _unsupported("hicache_ext")
    state = plugin._state
    with changed(versions, installed=lambda: "0.5.24"), changed(plugin, _state=plugin._State()), logged() as lines:
        plugin.register()
        assert not plugin._state.registered, lines.lines
        assert len(lines.lines) == 1, lines.lines
    assert plugin._state is state


def plain_unsupported_version_is_one_line() -> None:
    _unsupported("dynamic")


def plugin_unknown_model_is_one_line() -> None:
    identity.use_server_args(SimpleNamespace(model_path="nobody/knows"))
    try:
        line = refused(lambda: rig.Rig().attach("hicache_ext", rig.shared_tier()))
        assert "model.path" in line, line
        assert "model.revision" in line, line
        with attached(extra={**rig.shared_tier(), "model": {"revision": "one"}}) as found:
            round_trip(found)
    finally:
        identity.use_server_args(None)


def plugin_wrong_key_is_one_line() -> None:
    line = refused(lambda: rig.Rig().attach("hicache_ext", {**rig.shared_tier(), "tires": []}))
    assert "tires" in line, line
    assert "Fix:" in line, line


def plugin_lookups_name_the_chain() -> None:
    """The tier learns from a lookup that the head of the chain is in use, though SGLang asks only for the tail."""
    with attached() as found:
        seen = spy(found.adapter, "lookup")
        key = found.key(TOKENS)
        hashes = found.hashes(key)
        head, tail = hashes[:12], hashes[12:]
        found.prefetch(found.key(TOKENS[12 * rig.PAGE :]), head[-1], list(head))  # 0.5.17 appends to the list
        batch = seen[0]
        assert batch.keys == bytes.fromhex("".join(tail))
        assert batch.parent(0) == bytes.fromhex(head[-1])
        assert batch.parent(1) == bytes.fromhex(tail[0])


def plugin_parses_and_passes_prefix_keys() -> None:
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    parsers: list[Callable[[str], Any]] = [HybridCacheController.parse_storage_backend_extra_config]
    if version() == (0, 5, 17):
        from sglang.srt.mem_cache.hi_mamba_radix_cache import HiMambaRadixCache
        from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

        parsers += [
            lambda text: HiRadixCache._parse_storage_backend_extra_config(None, text),
            lambda text: HiMambaRadixCache._parse_storage_backend_extra_config(None, text),
        ]
    path = ROOT / "hicache.yaml"
    path.write_text("prefetch_threshold: 32\ntiers:\n  - type: rig:SharedBackend\n")
    for parse in parsers:
        for text in (f"@{path}", json.dumps({"prefetch_threshold": 32, **rig.shared_tier()})):
            extra, threshold, *_, passed = parse(text)
            assert passed is True
            assert threshold == 32
            assert "prefetch_threshold" not in extra
            assert extra["tiers"][0]["type"] == "rig:SharedBackend"
        *_, passed = parse(json.dumps({"other": 1}))
        assert passed is False


def plugin_is_a_choice_on_the_command_line() -> None:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args(["--model-path", "m", "--hicache-storage-backend", "hicache_ext"])
    assert parsed.hicache_storage_backend == "hicache_ext"
    assert parser.parse_args(["--model-path", "m", "--hicache-storage-backend", "file"])


def plugin_attached_by_the_admin_route() -> None:
    """The tree's own attach and detach, below PUT and DELETE /hicache/storage-backend."""
    fresh_weights()
    rig.SharedMemory.pages.clear()
    found = rig.Rig(hybrid=hashes_late())
    extra = json.dumps({**rig.shared_tier(), "prefetch_threshold": 32})
    tree = _tree(found)
    for _ in range(2):
        ok, message = tree.attach("hicache_ext", extra, "served-name")
        assert ok, message
        assert tree.cache.enable_storage
        assert tree.cache.prefetch_threshold == 32
        assert tree.cache.hicache_storage_pass_prefix_keys is True
        assert is_zero_copy(found)
        # The same name again is the same backend; another is refused.
        assert tree.attach("hicache_ext", extra, "served-name")[0]
        assert not tree.attach("file", "{}", "served-name")[0]
        round_trip(found)
        ok, message = tree.detach()
        assert ok, message
        assert found.controller.storage_backend is None
    # A mistake in the configuration is an answer, not a crash.
    ok, message = tree.attach("hicache_ext", json.dumps({"tiers": [{"type": "nobody"}]}), "served-name")
    assert not ok
    assert "nobody" in message, message


def _tree(found: rig.Rig) -> Any:
    """This version's tree, as far as attaching needs it."""
    controller = found.controller
    if hashes_late():
        from sglang.srt.mem_cache.unified_cache.storage_attachment import StorageAttachment

        cache = SimpleNamespace(
            cache_controller=controller,
            token_to_kv_pool_allocator=found.allocator,
            is_write_back=False,
            prefetch_stop_policy="timeout",
            write_through_threshold=1,
            storage_prefetch_retries={},
            buffer_mode=None,
            enable_storage=False,
            page_size=rig.PAGE,
            sliding_window_size=None,
            host_memory_mode="cache",
            storage_metrics_collector=None,
            extra_metric_labels=None,
            _enable_metrics_flag=False,
            tree_core=SimpleNamespace(backfill_missing_hash_values=lambda: 0),
            drain_storage_control_queues_local=lambda: None,
            ongoing_prefetch={},
            ongoing_backup={},
        )
        attachment = StorageAttachment(cache)
        return SimpleNamespace(cache=cache, attach=attachment.attach, detach=attachment.detach)
    from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

    tree = HiRadixCache.__new__(HiRadixCache)
    tree.cache_controller, tree.page_size, tree.root_node = controller, rig.PAGE, SimpleNamespace(children={})
    tree.enable_storage, tree._enable_metrics_flag, tree.extra_metric_labels = False, False, None
    tree.ongoing_prefetch, tree.ongoing_backup, tree.storage_metrics_collector = {}, {}, None
    tree._get_hybrid_storage_attach_kwargs = dict
    tree._drain_storage_control_queues_local = lambda: None
    return SimpleNamespace(cache=tree, attach=tree.attach_storage_backend, detach=tree.detach_storage_backend)


def plugin_a_tree_that_grew_without_storage_is_hashed() -> None:
    """0.5.17 does not do it: a page below an unhashed node would go by the name of a page that begins a sequence."""
    if hashes_late():
        return
    from sglang.srt.mem_cache.radix_cache import TreeNode

    found = rig.Rig()
    tree = _tree(found)
    root = TreeNode()
    root.key, root.hash_value = found.key([]), []
    head, tail = TreeNode(), TreeNode()
    head.key, tail.key = found.key(TOKENS[:160], "salt"), found.key(TOKENS[160:], "salt")
    head.parent, tail.parent = root, head
    root.children, head.children = {1: head}, {2: tail}
    assert head.hash_value is tail.hash_value is None
    tree.cache.root_node = root
    assert tree.attach("hicache_ext", json.dumps(rig.shared_tier()))[0]
    assert head.hash_value + tail.hash_value == found.hashes(found.key(TOKENS, "salt"))
    tree.detach()


def plugin_host_pool_in_memory_of_ours() -> None:
    """With our backend on the command line, a pool that is large enough is allocated by us; else by SGLang."""
    from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator

    allocator = HostTensorAllocator()
    args = {
        "model_path": str(ROOT / "model"),
        "hicache_storage_backend": "hicache_ext",
        "hicache_storage_backend_extra_config": json.dumps(rig.shared_tier()),
    }
    for changes, ours in (({}, True), ({"hicache_storage_backend": "file"}, False)):
        identity.use_server_args(SimpleNamespace(**{**args, **changes}))
        try:
            with logged() as lines:
                tensor = allocator.allocate((3, 1 << 20), dtype=torch.bfloat16, device="cpu")
        finally:
            identity.use_server_args(None)
        assert tensor.shape == (3, 1 << 20)
        assert tensor.dtype == torch.bfloat16
        assert not tensor.any()
        assert (tensor.data_ptr() % (2 << 20) == 0) >= ours
        assert lines.count("host pool of") == ours
        tensor.fill_(1)

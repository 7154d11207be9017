"""Weight updates through SGLang's real managers and updaters, with stubs for model and loader underneath."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import rig
import torch
from server import Loader, Server
from support import ROOT, TOKENS, attached, current, fresh_weights, hashes_late, logged, refused, round_trip

from hicache_ext.sglang import identity, weights


def plugin_update_from_disk() -> None:
    fresh_weights()
    rig.SharedMemory.pages.clear()
    new = rig.model_folder(ROOT, "new", fill=9)
    with attached() as found:
        server = Server(found)
        key = found.key(TOKENS)
        old = found.backup(key, 1)[0]
        before = current(found)
        assert found.prefetch(key) == old
        assert server.from_disk(new).success
        assert server.seen == [True], "not frozen while the weights were loaded"
        assert server.flushes == 1
        assert not weights.STATE.frozen
        after = current(found)
        assert after.digest != before.digest
        assert found.prefetch(key) == b"", "a page of the old weights was served"
        content = found.backup(key, 2)[0]
        assert found.prefetch(key) == content
        # A server that starts on the new folder has the same weights.
        assert after.weights == identity.weights_of(new, None)
        # And the old ones are still there under the old name.
        assert server.from_disk(ROOT / "model").success
        assert current(found).digest == before.digest
        assert found.prefetch(key) == old


def plugin_update_from_disk_of_a_part_is_of_this_run_only() -> None:
    fresh_weights()
    part = rig.model_folder(ROOT, "part", fill=3, tensors=("a",))
    with attached() as found:
        server = Server(found)
        assert server.from_disk(part).success
        assert current(found).weights.startswith("update:")
        # What the config says now is not what the model has: a second part must not pass for the whole.
        assert server.from_disk(part).success
        assert current(found).weights.startswith("update:")


def plugin_update_that_fails_is_an_update() -> None:
    fresh_weights()
    new = rig.model_folder(ROOT, "bad", fill=4)
    with attached() as found:
        server = Server(found)
        before = current(found)
        Loader.fails = True
        assert not server.from_disk(new).success
        assert weights.STATE.frozen, "nothing was flushed"
        found.controller.reset()
        assert not weights.STATE.frozen
        assert current(found).weights not in (before.weights, identity.weights_of(new, None))


def plugin_nothing_old_is_stored_under_the_new_name() -> None:
    """Backups that wait while the weights change, and those that come before the flush, are dropped."""
    fresh_weights()
    rig.SharedMemory.pages.clear()
    with attached() as found:
        server = Server(found)
        key = found.key(TOKENS)
        indices = found.host_pool.alloc(len(TOKENS))
        found.fill(indices, 1)
        assert server.from_disk(rig.model_folder(ROOT, "later", fill=8), flush_cache=False).success
        assert weights.STATE.frozen
        # SGLang still holds pages of the old weights, and backs them up.
        found.controller.write_storage(indices, key, found.hashes(key), None)
        operation = found.controller.ack_backup_queue.get(timeout=30)
        assert operation.completed_tokens == len(TOKENS), "REJECTED must not look like a failure"
        assert not rig.SharedMemory.pages
        assert found.prefetch(key) == b""
        counted = found.adapter.details()
        assert counted["frozen"]
        assert counted["adapter"]["write_frozen"] == 20
        found.controller.reset()
        assert found.prefetch(key) == b""
        assert not rig.SharedMemory.pages
        round_trip(found)


def plugin_update_from_tensor() -> None:
    fresh_weights()
    with attached() as found:
        server = Server(found)
        if server.has_sessions:
            assert server.manager.begin_weight_update(server.request()).success
            assert weights.STATE.frozen
        names = [current(found)]
        assert server.from_tensor(flush_cache=False).success
        assert server.from_tensor().success
        assert server.seen == [True, True]
        assert server.flushes == 1
        if server.has_sessions:
            assert weights.STATE.frozen, "the session is still open"
            assert server.manager.end_weight_update(server.request()).success
        assert not weights.STATE.frozen
        names.append(current(found))
        assert names[1].weights.startswith("update:")
        round_trip(found)


def plugin_session_that_leaves_pages_stays_frozen() -> None:
    fresh_weights()
    with attached() as found:
        server = Server(found)
        if not server.has_sessions:
            return
        server.manager.begin_weight_update(server.request())
        server.tree.root_node.children["x"] = object()
        # Weights that a peer wrote: no call in between.
        server.manager.end_weight_update(server.request())
        assert weights.STATE.frozen
        found.controller.reset()
        assert not weights.STATE.frozen
        assert current(found).weights.startswith("update:")


def plugin_update_from_distributed_and_ipc() -> None:
    fresh_weights()
    with attached() as found:
        server = Server(found)
        server.updater._model_update_group["g"] = torch.distributed.group.WORLD
        request = server.request(names=["a"], dtypes=["bfloat16"], shapes=[[2]], group_name="g")
        if server.has_sessions:
            server.manager.begin_weight_update(server.request())
        before = weights.STATE.updates
        assert server.manager.update_weights_from_distributed(request).success
        assert server.seen == [True]
        assert weights.STATE.updates > before
        if server.has_sessions:
            server.manager.end_weight_update(server.request())
        assert not weights.STATE.frozen
        name = current(found)
        # The checkpoint engine is not installed here: the update fails, and counts.
        server.manager.update_weights_from_ipc(server.request(zmq_handles={}))
        assert weights.STATE.frozen
        found.controller.reset()
        assert current(found).weights != name.weights


def plugin_update_before_attach_counts() -> None:
    fresh_weights()
    found = rig.Rig()
    server = Server(found)
    assert server.from_tensor is not None
    server.from_disk(rig.model_folder(ROOT, "partly", tensors=("b",)))
    assert not weights.STATE.frozen
    found.attach("hicache_ext", rig.shared_tier())
    assert current(found).weights.startswith("update:")
    found.close()
    server.from_disk(rig.model_folder(ROOT, "partly"), flush_cache=False)
    found.attach("hicache_ext", rig.shared_tier())
    assert current(found) is None, "pages of older weights may be in the cache"
    found.controller.reset()
    round_trip(found)
    found.close()


def plugin_released_weights_are_unknown() -> None:
    fresh_weights()
    with attached() as found:
        server = Server(found)
        before = current(found)
        with contextlib.suppress(Exception):  # a CPU build cannot really release anything
            server.manager.release_memory_occupation(SimpleNamespace(tags=["weights"]))
        assert weights.STATE.frozen
        found.controller.reset()
        assert current(found).weights != before.weights
    fresh_weights()


def plain_update_detaches_with_one_line() -> None:
    fresh_weights()
    rig.SharedMemory.pages.clear()
    found = rig.Rig()
    server = Server(found)  # its bound methods are older than our wrappers
    if hashes_late():
        found.attach("dynamic", rig.dynamic(rig.shared_tier()))
    else:
        found = rig.Rig(storage_backend="dynamic", storage_backend_extra_config=rig.dynamic(rig.shared_tier()))
    key = found.key(TOKENS)
    content = found.backup(key, 1)[0]
    assert found.prefetch(key) == content
    pages = len(rig.SharedMemory.pages)
    with logged() as lines:
        assert server.from_disk(rig.model_folder(ROOT, "plain-new", fill=2)).success
        server.from_disk(ROOT / "model")
    assert server.seen[0] is True
    assert lines.count("without the plugin") == 1, lines.lines
    assert found.prefetch(key) == b""
    found.backup(found.key(TOKENS[::-1]), 2)
    assert len(rig.SharedMemory.pages) == pages, "a page was stored after the update"
    found.close()
    extra = rig.dynamic(rig.shared_tier())
    line = refused(lambda: rig.Rig(storage_backend="dynamic", storage_backend_extra_config=extra))
    assert "weights were updated" in line, line
    fresh_weights()


def plain_attached_at_run_time_is_kept_apart() -> None:
    fresh_weights()
    if not hashes_late():
        line = refused(lambda: rig.Rig().attach("dynamic", rig.dynamic(rig.shared_tier())))
        assert "does not hash what its cache already holds" in line, line
        return
    with logged() as lines, attached("dynamic") as found:
        assert current(found).weights.startswith("update:")
    assert lines.count("attached at run time without its plugin") == 1
    fresh_weights()
    with attached("dynamic", {**rig.shared_tier(), "model": {"revision": "r"}}) as found:
        assert current(found).weights == "revision:r"
    fresh_weights()


def plugin_checker_that_resets_weights_counts() -> None:
    fresh_weights()
    with attached() as found:
        server = Server(found)
        with contextlib.suppress(Exception):  # nothing is left to check in a stub
            server.manager.check_weights(server.request(action="checksum", allow_quant_error=False))
        assert not weights.STATE.frozen
        with contextlib.suppress(Exception):
            server.manager.check_weights(server.request(action="reset_tensors", allow_quant_error=False))
        assert weights.STATE.frozen
    fresh_weights()

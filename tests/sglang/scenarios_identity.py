"""Namespaces that must differ, and do; salts and LoRA in page hashes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rig
from support import ROOT, TOKENS, attached, logged, refused, version

from hicache_ext.sglang import identity, weights


def _space(extra: dict[str, Any] | None = None, args: dict[str, Any] | None = None, **options: Any) -> Any:
    base = {"model_path": str(ROOT / "model"), "dtype": "bfloat16", "kv_cache_dtype": "auto"}
    identity.use_server_args(SimpleNamespace(**{**base, **(args or {})}))
    try:
        with attached(extra={**rig.shared_tier(), **(extra or {})}, **options) as found:
            return found.adapter._namespace(found.adapter._pools["kv"])
    finally:
        identity.use_server_args(None)


def plugin_namespaces_are_distinct() -> None:
    other = rig.model_folder(ROOT, "other")
    (other / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "rope_theta": 5}))
    weights_only = rig.model_folder(ROOT, "weights-only", fill=7)
    spaces = {
        "base": _space(),
        "model": _space(args={"model_path": str(other)}),
        "weights": _space(args={"model_path": str(weights_only)}),
        "revision": _space({"model": {"revision": "r1"}}),
        "revision 2": _space({"model": {"revision": "r2"}}),
        "override": _space(args={"json_model_override_args": '{"rope_scaling": {"factor": 2}}'}),
        "context": _space(args={"context_length": 8192}),
        "quantization": _space(args={"quantization": "fp8"}),
        "kv dtype": _space(args={"kv_cache_dtype": "fp8_e5m2"}),
        "dummy": _space(args={"load_format": "dummy"}),
        "salt": _space({"salt": "tenant"}),
        "layer_first": _space(layout="layer_first"),
        "page_head": _space(layout="page_head"),
        "mla": _space(mla=True),
        "draft": _space(args={"speculative_draft_model_path": str(other)}),
    }
    digests = {name: space.digest for name, space in spaces.items()}
    assert len(set(digests.values())) == len(digests), digests
    assert _space().digest == digests["base"]
    # Another served name is the same model; a default that is spelled out is the default.
    assert _space(args={"served_model_name": "alias", "quantization": None}).digest == digests["base"]
    assert not any("served-name" in space.description.decode() for space in spaces.values())


def plugin_shards() -> None:
    def config(**values: Any) -> Any:
        base = {"tp_rank": 0, "tp_size": 2, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
        return SimpleNamespace(**{**base, "is_mla_model": False, **values})

    mha, mla = rig._host_pool(rig._device_pool(False), "page_first", False), None
    mla = rig._host_pool(rig._device_pool(True), "page_first", True)
    of = identity.shard
    assert of(config(tp_rank=1), identity.is_replicated(config(), "kv", mha)).tp_rank == 1
    one = config(tp_rank=1, is_mla_model=True)
    assert identity.is_replicated(one, "kv", mla)
    assert of(one, True) == of(config(tp_rank=0, is_mla_model=True), True)
    assert not identity.is_replicated(one, "draft", mha)
    assert not identity.is_replicated(one, "mamba", mla)
    assert of(config(pp_rank=1, pp_size=2), False) != of(config(pp_size=2), False)
    assert of(config(attn_cp_rank=1, attn_cp_size=2), False) != of(config(attn_cp_size=2), False)
    assert of(config(dcp_rank=1, dcp_size=2), False) != of(config(dcp_size=2), False)
    # DP ranks are equals.
    assert of(config(dp_rank=1), False) == of(config(), False)


def plugin_real_ranks_reach_the_namespace() -> None:
    from sglang.srt.runtime_context import get_parallel

    found = {}
    for rank in (0, 1):
        sizes = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), 2)
        with get_parallel().override(tp_rank=rank, attn_tp_rank=rank, **sizes):
            for mla in (False, True):
                found[rank, mla] = _space(mla=mla)
    assert found[0, False].shard != found[1, False].shard
    assert found[0, True] == found[1, True]


def plugin_salts_never_meet() -> None:
    rig.SharedMemory.pages.clear()
    with attached() as found:
        keys = [found.key(TOKENS), found.key(TOKENS, "a"), found.key(TOKENS, "b")]
        if version() > (0, 5, 17):
            keys += [found.key(TOKENS, cache_salt="a"), found.key(TOKENS, "a", cache_salt="b")]
        assert len({found.hashes(key)[0] for key in keys}) == len(keys)
        contents = []
        for seed, key in enumerate(keys):
            assert found.prefetch(key) == b"", "found before it was stored"
            contents.append(found.backup(key, seed)[0])
        for key, content in zip(keys, contents, strict=True):
            assert found.prefetch(key) == content


def plugin_plain_hashes_stay_as_they_are() -> None:
    from sglang.srt.mem_cache.utils import get_hash_str

    with attached() as found:
        assert found.hashes(found.key(TOKENS)) == get_hash_str(TOKENS, None, page_size=rig.PAGE)


def _lora_folder(name: str, fill: int) -> Path:
    folder = ROOT / name
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(bytes([fill]) * 100)
    return folder


def plugin_lora_is_known_by_content() -> None:
    from hicache_ext.sglang import plugin, seeds

    folder = _lora_folder("lora", 1)
    if version() > (0, 5, 17):
        # Startup adapters keep their id when their files change: the namespace must tell.
        ref = SimpleNamespace(lora_id="f" * 32, lora_name="l", lora_path=str(folder))
        assert not plugin.maps_adapters()
        one = _space(args={"lora_paths": [ref]})
        same = _space(args={"lora_paths": [ref]})
        _lora_folder("lora", 2)
        other = _space(args={"lora_paths": [ref]})
        assert one == same
        assert one != other
        assert one.lora
        assert _space().lora == ""
        return
    assert plugin.maps_adapters()
    from sglang.srt.lora.lora_manager import LoRAManager

    manager = LoRAManager.__new__(LoRAManager)
    manager.lora_refs = {}

    def load(lora_id: str) -> None:
        # The real, hooked method: it reports that the adapter cannot be loaded here, and that is no matter.
        with contextlib.suppress(Exception):
            manager._load_lora_adapter(SimpleNamespace(lora_id=lora_id, lora_name="l", lora_path=str(folder)))
        if lora_id not in seeds._contents:
            seeds.after_load_adapter(None, manager, SimpleNamespace(lora_id=lora_id, lora_path=str(folder)))

    with attached() as found:
        ids = ["1" * 32, "2" * 32]
        for lora_id in ids:
            load(lora_id)
        first, again = (found.hashes(found.key(TOKENS, lora_id)) for lora_id in ids)
        assert first == again, "the same adapter under another id"
        _lora_folder("lora", 2)
        load("3" * 32)
        changed_content = found.hashes(found.key(TOKENS, "3" * 32))
        salted = found.hashes(found.key(TOKENS, "salt" + ids[0]))
        base = found.hashes(found.key(TOKENS))
        assert len({one[0] for one in (first, changed_content, salted, base)}) == 4


def plain_lora_is_refused_where_hashes_do_not_know_it() -> None:
    folder = _lora_folder("lora-plain", 1)
    ref = SimpleNamespace(lora_id="f" * 32, lora_name="l", lora_path=str(folder))
    args = {"model_path": str(ROOT / "model"), "enable_lora": True, "lora_paths": [ref]}
    identity.use_server_args(SimpleNamespace(**args))
    try:
        if version() == (0, 5, 17):
            extra = rig.dynamic(rig.shared_tier())
            line = refused(lambda: rig.Rig(storage_backend="dynamic", storage_backend_extra_config=extra))
            assert "LoRA" in line, line
            assert "plugin" in line, line
        else:
            with attached("dynamic") as found:
                assert found.adapter._namespace(found.adapter._pools["kv"]).lora
    finally:
        identity.use_server_args(None)


def plain_says_once_what_it_cannot_do() -> None:
    with logged() as lines, attached("dynamic"):
        pass
    assert lines.count("runs without its plugin") == 1
    assert lines.count("CACHE SALTS ARE NOT ISOLATED") == (1 if version() == (0, 5, 17) else 0)


def plugin_split_pools_are_backed_up_by_every_rank() -> None:
    """MLA: rank 0 writes for all, but an MHA draft on it is split over tp, and rank 1's part is nobody else's."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
    from sglang.srt.runtime_context import get_parallel

    sizes = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), 2)
    with get_parallel().override(tp_rank=1, attn_tp_rank=1, **sizes), attached(mla=True, hybrid=True) as found:
        if not hasattr(found.controller, "should_backup"):
            return
        assert found.controller.backup_skip
        found.adapter.register_mem_host_pool_v2(rig._host_pool(rig._device_pool(False), "page_first", False), "draft")
        found.adapter.register_mem_host_pool_v2(found.host_pool, "indexer")
        assert found.controller.should_backup(PoolTransfer(name=PoolName.DRAFT))
        assert not found.controller.should_backup(PoolTransfer(name=PoolName.INDEXER))


def plugin_every_launch_has_its_own_name() -> None:
    import os

    from sglang.srt.entrypoints.engine import Engine

    names = set()
    for _ in range(2):
        with contextlib.suppress(Exception):  # no arguments: nothing is launched
            Engine._launch_subprocesses(None)
        names.add(os.environ.pop(weights.RUN_VARIABLE))
    assert len(names) == 2

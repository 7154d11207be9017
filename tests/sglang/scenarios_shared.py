"""`share: engines`: canonical pages of the real host pool, whatever its layout and page size; and when not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rig
import torch
from support import LAYOUTS, ROOT, TOKENS, attached, changed, logged

from hicache_ext import chain
from hicache_ext.page import split_keys


@functools.cache
def _model() -> Path:
    folder = rig.model_folder(ROOT, "shared-model")
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": rig.HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _extra(page: int, **more: Any) -> dict[str, Any]:
    return {
        **rig.shared_tier(), "share": "engines", "share_page": page, "model": {"path": str(_model())}, **more
    }  # fmt: skip


def _canonical(logical: bytes, page: int) -> list[bytes]:
    """The canonical pages of tokens that `rig.by_token` gave."""
    tokens = torch.frombuffer(bytearray(logical), dtype=torch.int16).view(-1, rig.LAYERS, 2, rig.HEADS, rig.DIM)
    return [
        tokens[at : at + page].permute(1, 2, 0, 3, 4).contiguous().numpy().tobytes()
        for at in range(0, len(tokens) - page + 1, page)
    ]


def _stored() -> dict[bytes, bytes]:
    return {key: bytes(page[0]) for (_, key), page in rig.SharedMemory.pages.items()}


def _keep_logical(found: rig.Rig) -> None:
    """The rig compares what is in the pool by tokens, not in the layout's order."""
    found.bytes_of = lambda indices: rig.by_token(found.host_pool, indices)  # type: ignore[method-assign]


def plugin_shared_pages_are_canonical_in_every_layout() -> None:
    """Written from one layout, read into every other; the bytes and keys are those of the definition."""
    for page in (32, 16, 8):
        rig.SharedMemory.pages.clear()
        with attached(extra=_extra(page), layout="page_first") as found, logged() as lines:
            _keep_logical(found)
            content, _ = found.backup(found.key(TOKENS), 1)
            assert not lines.count("does not hold"), lines.lines
        keys = split_keys(chain.extend(chain.seed(), TOKENS, page))
        assert _stored() == dict(zip(keys, _canonical(content, page), strict=True)), page
        for layout, mla in LAYOUTS:
            if not mla:
                with attached(extra=_extra(page), layout=layout) as found:
                    _keep_logical(found)
                    arrived = found.prefetch(found.key(TOKENS))
                    assert arrived == content, (page, layout, len(arrived), len(content), found.adapter.details())


def plugin_shared_pages_have_their_namespace_whoever_asks_meanwhile() -> None:
    """The thread of KV events asks for the namespace while the pool is being registered."""
    from hicache_ext.sglang import shared

    with attached(extra=_extra(16)) as found:
        adapter, original = found.adapter, shared.shared

        def interrupted(*args: Any) -> Any:
            adapter.served_namespace()
            return original(*args)

        adapter._namespaces.clear()
        with changed(shared, shared=interrupted):
            adapter.register_mem_pool_host(found.host_pool)
        assert adapter.served_namespace() == adapter._shared.space.digest


def plugin_shared_pages_across_backups_and_batches() -> None:
    """Pages of SGLang's smaller than the shared one: parts wait for their rest, over backups and batches."""
    for hybrid in (False, True):
        rig.SharedMemory.pages.clear()
        with attached(extra=_extra(48), hybrid=hybrid, slots=512) as found:
            _keep_logical(found)
            tokens = list(range(1000, 1000 + 150 * rig.PAGE))  # more than SGLang's batches of 128 pages
            head, tail = tokens[: 5 * rig.PAGE], tokens[5 * rig.PAGE :]
            first, hashes = found.backup(found.key(head), 1)
            second, more = found.backup(found.key(tail), 2, list(hashes))
            assert len(rig.SharedMemory.pages) == 50
            assert [page for _, page in sorted(_stored().items())] == [
                page for _, page in sorted(zip(
                    split_keys(chain.extend(chain.seed(), tokens, 48)), _canonical(first + second, 48), strict=True
                ))
            ]  # fmt: skip
            assert found.prefetch(found.key(tokens)) == first + second
            # What the engine holds ends inside a shared page: only the rest of it is written to.
            got = found.prefetch(found.key(tail), hashes[-1], list(hashes))
            assert got == second, (len(got), len(second))
            assert len(more) == 145
            # A part that is not there any more: its page is left out, what follows is stored.
            rig.SharedMemory.pages.clear()
            found.adapter._shared._parts.clear()
            found.backup(found.key(tail), 2, list(hashes))
            assert len(rig.SharedMemory.pages) == 48
        with attached(extra=_extra(48), hybrid=hybrid, slots=512) as found:  # another server: nothing was learnt
            rig.SharedMemory.pages.clear()
            assert found.prefetch(found.key(tail), hashes[-1], list(hashes)) == b"", "its tokens before are not known"
            assert found.backup(found.key(tail), 2, list(hashes))
            assert not rig.SharedMemory.pages
            assert found.adapter.counters.snapshot()["write_rejected"] == 145


def plugin_shared_pages_keep_salts_adapters_and_bigrams_apart() -> None:
    rig.SharedMemory.pages.clear()
    with attached(extra=_extra(16)) as found:
        _keep_logical(found)
        salted: dict[str, Any] = {"cache_salt": "tenant"} if _has_salts() else {"extra_key": "tenant"}
        plain, _ = found.backup(found.key(TOKENS), 1)
        other, _ = found.backup(found.key(TOKENS, **salted), 2)
        assert found.prefetch(found.key(TOKENS)) == plain
        assert found.prefetch(found.key(TOKENS, **salted)) == other != plain
        salt = split_keys(chain.extend(chain.seed("tenant"), TOKENS, 16))
        assert set(salt) <= set(_stored()), "as vLLM names them"
        if _has_salts():
            before = len(rig.SharedMemory.pages)
            adapter, _ = found.backup(found.key(TOKENS, extra_key="adapter"), 3)
            assert found.prefetch(found.key(TOKENS, extra_key="adapter")) == adapter
            assert len(rig.SharedMemory.pages) == before + 20
        before = len(rig.SharedMemory.pages)
        found.backup(found.key([*TOKENS, 5], is_bigram=True), 4)
        assert len(rig.SharedMemory.pages) == before
        assert found.prefetch(found.key([*TOKENS, 5], is_bigram=True)) == b""


def _has_salts() -> bool:
    import inspect

    from sglang.srt.mem_cache.radix_cache import RadixKey

    return "cache_salt" in inspect.signature(RadixKey).parameters


def plugin_what_cannot_be_shared_is_said_and_kept_apart() -> None:
    """One line with the reason; pages of this engine's own, which work, in a namespace of their own."""
    from hicache_ext.sglang import identity

    def arguments(**values: Any) -> Any:
        base = identity.server_args()
        return SimpleNamespace(**{**{name: getattr(base, name) for name in vars(base) if name[0] != "_"}, **values})

    odd = rig.model_folder(ROOT, "odd-model")
    (odd / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"]}))
    for reason, extra, options, values in (
        ("pages of 16 tokens and `share_page: 24` do not divide", _extra(24), {}, {}),
        ("DeepseekV3ForCausalLM is not among", _extra(32, model={"path": str(odd)}), {}, {}),
        ("json_model_override_args changes", _extra(32), {}, {"json_model_override_args": '{"rope_theta": 1}'}),
        ("speculative_algorithm changes", _extra(32), {}, {"speculative_algorithm": "EAGLE"}),
        ("dummy weights", _extra(32), {}, {"load_format": "dummy"}),
        ("KV of fp8_e4m3 comes with scales", _extra(32), {}, {"kv_cache_dtype": "fp8_e4m3"}),
        ("MLATokenToKVPoolHost", _extra(32), {"mla": True}, {}),
    ):
        rig.SharedMemory.pages.clear()
        identity.use_server_args(arguments(**values) if values else None)
        try:
            with logged() as lines, attached(extra=extra, **options) as found:
                content, _ = found.backup(found.key(TOKENS), 1)
                assert found.prefetch(found.key(TOKENS)) == content
                assert found.adapter.chains is None
                said = [line for line in lines.lines if "does not hold here" in line]
                assert len(said) == 1, said
                assert reason in said[0], (reason, said)
        finally:
            identity.use_server_args(None)


def plain_route_shares_nothing() -> None:
    with logged() as lines, attached("dynamic", extra=_extra(32)) as found:
        assert found.adapter.chains is None
        assert lines.count("without the plugin no token ids reach the store") == 1


def plugin_a_part_of_older_weights_is_never_completed() -> None:
    """The first half of a page before a weight update, the second after it: that page is not stored."""
    from hicache_ext.sglang import weights

    rig.SharedMemory.pages.clear()
    with attached(extra=_extra(32)) as found:
        _, hashes = found.backup(found.key(TOKENS[:16]), 1)
        with changed(weights.STATE, override="other"):
            found.backup(found.key(TOKENS[16:64]), 2, list(hashes))
    assert len(rig.SharedMemory.pages) == 1

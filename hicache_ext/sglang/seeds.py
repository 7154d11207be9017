"""Salts and LoRA in the page hashes of SGLang versions that hash token ids alone (0.5.17).

Belongs here: the seed of a sequence's hash chain. Later versions have one of their own (`storage_namespace_seed`),
which is left as it is: it isolates salts and adapter ids.

    seed = sha256(domain, presence and length and bytes of the request's extra key)

The extra key is the caller's salt followed by the LoRA adapter's id. Ids of adapters that are known here are replaced
by a digest of the adapter's content, so that a changed adapter at the same path is another one, and the same adapter
under another id is the same.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

SEED = "sglang.srt.mem_cache.utils.storage_namespace_seed"
HASH = "sglang.srt.mem_cache.utils.get_hash_str"
LOAD_ADAPTER = "sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter"

_DOMAIN = b"hicache-ext page seed v1\0"
_ID_LENGTH = 32

_contents: dict[str, str] = {}
_lock = threading.Lock()


def seed(extra_key: str | None) -> str | None:
    """The hash (64 hex digits) before a sequence's first page; None for a plain sequence, as SGLang has it."""
    if extra_key is None or extra_key == "":
        return None
    digest = hashlib.sha256(_DOMAIN)
    for part in parts(extra_key):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def parts(extra_key: str) -> tuple[str, str]:
    """Salt and adapter's content of an extra key; the adapter is "" where none was seen to be loaded under that id."""
    with _lock:
        content = _contents.get(extra_key[-_ID_LENGTH:])
    return (extra_key, "") if content is None else (extra_key[:-_ID_LENGTH], content)


def around_hash(
    original: Callable[..., Any], token_ids: Any, prior_hash: str | None = None, page_size: int | None = None
) -> Any:
    """AROUND hook of get_hash_str: a chain that begins here begins with its seed."""
    if not prior_hash:
        prior_hash = seed(getattr(token_ids, "extra_key", None)) or prior_hash
    return original(token_ids, prior_hash, page_size)


def before_trigger_backup(
    manager: Any, req: Any, host_indices: Any, tokens: Any, start_time: Any, prior_hash: Any = ""
) -> Any:
    """BEFORE hook of the decode side's backup: its tokens are a bare list, so the seed is given as a prior hash."""
    return (manager, req, host_indices, tokens, start_time, prior_hash or seed(req.extra_key) or ""), {}


def after_load_adapter(_result: Any, _manager: Any, lora_ref: Any, *_: Any, **__: Any) -> None:
    """AFTER hook of loading an adapter: remember what its id stands for."""
    from hicache_ext.fingerprint import adapter_content

    path = getattr(lora_ref, "lora_path", None)
    if path and len(lora_ref.lora_id) == _ID_LENGTH:
        content = adapter_content(str(path))
        with _lock:
            _contents[lora_ref.lora_id] = content

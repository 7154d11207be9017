"""A request's page keys: its tokens, and what else decides its KV.

Belongs here: from vLLM's Request to the engine-independent chain. Does not belong here: the chain itself (chain), or
what is done with keys. vLLM's own block hashes are not used: their serialisation and seed are the process's affair.

Salt and LoRA adapter (by content) seed the chain; the identifiers of images and other inputs under placeholder tokens
are in the keys of the pages that they touch. Requests whose KV depends on what cannot be named have no keys at all.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hicache_ext import chain
from hicache_ext.fingerprint import adapter_content
from hicache_ext.page import KEY_BYTES

logger = logging.getLogger(__name__)


class Adapters:
    """Content ids of LoRA adapters, by id and path. An adapter whose files changed since is not cached any more: which
    content the engine has loaded cannot be told from here."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[str, tuple[tuple[str, int, int], ...]]] = {}
        self._changed: set[tuple[int, str]] = set()

    def content(self, request: Any) -> str | None:
        """The content id of this LoRARequest's adapter, None where there is none to rely on."""
        who = (int(request.lora_int_id), str(request.lora_path))
        if who in self._changed:
            return None
        stamp = _stamp(who[1])
        known = self._known.get(who)
        if known is None:
            known = self._known[who] = (adapter_content(who[1]), stamp)
        if known[1] != stamp:
            self._changed.add(who)
            logger.warning(
                "hicache_ext: the files of LoRA adapter %s changed while it is in use: its requests are not cached "
                "until the engine restarts", who[1],
            )  # fmt: skip
            return None
        return known[0]


def _stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    folder = Path(path)
    if not folder.is_dir():
        return ()  # a name in the Hugging Face cache: snapshots do not change
    stats = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


class RequestChain:
    """The keys of one request's pages, computed as they are asked for."""

    def __init__(self, request: Any, page_size: int, seed: bytes) -> None:
        self._request, self._page_size, self.seed = request, page_size, seed
        self._keys = bytearray()
        self._extra = _extra(getattr(request, "mm_features", None) or (), page_size)

    @classmethod
    def of(cls, request: Any, page_size: int, adapters: Adapters) -> RequestChain | None:
        """None where the request's KV must not be cached."""
        if getattr(request, "prompt_embeds", None) is not None or request.prompt_token_ids is None:
            return None
        lora = getattr(request, "lora_request", None)
        content = adapters.content(lora) if lora is not None else ""
        if content is None:
            return None
        return cls(request, page_size, chain.seed(str(getattr(request, "cache_salt", None) or ""), content))

    def whole_pages(self) -> int:
        """Pages all of whose tokens are known."""
        return len(self._request.all_token_ids) // self._page_size

    def keys(self, pages: int) -> bytes:
        """Packed keys of the first `pages` pages, at most as many as are whole."""
        have = len(self._keys) // KEY_BYTES
        wanted = min(pages, self.whole_pages())
        if wanted > have:
            tokens = self._request.all_token_ids[have * self._page_size : wanted * self._page_size]
            before = bytes(self._keys[-KEY_BYTES:]) if have else self.seed
            self._keys += chain.extend(before, tokens, self._page_size, have, self._extra)
        return bytes(self._keys[: wanted * KEY_BYTES])


def _extra(features: Any, page_size: int) -> dict[int, bytes]:
    """By page: the identifiers of the inputs that lie in it, and where each begins relative to the page."""
    parts: dict[int, list[str]] = {}
    for feature in sorted(features, key=lambda one: one.mm_position.offset):
        offset, length = int(feature.mm_position.offset), int(feature.mm_position.length)
        for page in range(offset // page_size, (offset + max(1, length) - 1) // page_size + 1):
            parts.setdefault(page, []).append(f"{feature.identifier}@{offset - page * page_size}")
    return {page: "\0".join(found).encode() for page, found in parts.items()}

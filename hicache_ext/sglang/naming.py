"""The event hash of a page: the name by which SGLang's KV events call the block that storage keeps under another key.

Belongs here: SGLang's rules for that name, version by version. Does not belong here: where tokens come from (tokens),
or what is announced when (announcing).

    version    a plain prompt's pages      with a cache salt or an extra key (LoRA)
    0.5.17     storage hash                storage hash, which the plugin seeds
    0.5.21     storage hash                a chain of its own: seeded with the salt, the extra key left out
    0.5.23     storage hash                that, and hashed once more with the extra key where the adapter has a name
                                           (with the format `dynamo`: with extra key and salt)

An event carries the first 8 bytes, big-endian, signed. Both chains hash the tokens as u32le after the digest before, so
the storage hash of a batch's first page tells whether the tokens are the page's: pages of which they are not (bigrams,
prompt embeddings) have no tokens and no name here, and are not announced.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hicache_ext.page import KEY_BYTES, split_keys
from hicache_ext.sglang.tokens import Space

PLAIN: Space = (None, None)
#: Digests kept, for the pages of requests with salts or adapters: about 250 bytes each.
_DIGESTS = 1 << 16

Lookup = Callable[[Sequence[bytes]], list[bytes | None]]
"""Storage keys to the tokens (u32le) of those pages, where they are known."""


class Named(NamedTuple):
    """hashes: int64[n, 2], the pages' event hashes and those before; 0 = begins a prompt. salt, lora: "" = none."""

    hashes: NDArray[np.int64]
    salt: str = ""
    lora: str = ""


class Naming:
    """Thread-safe. recorder: what collects SGLang's own KV events, None where it collects none."""

    def __init__(self, recorder: Any = None, tokens_of: Lookup | None = None) -> None:
        from hicache_ext.sglang import seeds

        utils = importlib.import_module("sglang.srt.mem_cache.utils")
        events = importlib.import_module("sglang.srt.disaggregation.kv_events")
        own = getattr(utils, "storage_namespace_seed", None)
        self._seed: Callable[[Space], str | None] = (lambda space: own(*space)) if own else (lambda s: seeds.seed(s[0]))
        self.has_own_chain = own is not None
        self._scramble: Any = getattr(events, "namespaced_block_hash", None)
        self._event_seed: Any = getattr(events, "kv_event_namespace_seed", None)
        self.recorder = recorder
        self._tokens_of = tokens_of
        self._digests: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def fits(self, first: bytes, tokens: NDArray[np.uint32], space: Space, prior: str | None) -> bool:
        """Whether `first` is the storage hash of one page's tokens after the page `prior`; None: none before."""
        before = prior or self._seed(space)
        digest = hashlib.sha256(bytes.fromhex(before) if before else b"")
        digest.update(np.ascontiguousarray(tokens, "<u4").tobytes())
        return digest.digest() == first

    def name(
        self, keys: bytes, tokens: NDArray[np.uint32], space: Space, ancestors: Sequence[str]
    ) -> Named | None:  # fmt: skip
        """Of a chain of pages: storage keys (n x 32 bytes), tokens uint32[n, page size], the keys of all pages before.

        None where it cannot be known: with a salt or an adapter, the digest of some page before is needed, and it may
        have been stored by an earlier run and its tokens be forgotten.
        """
        split = split_keys(keys)
        prior = ancestors[-1] if ancestors else None
        if space == PLAIN or not self.has_own_chain:
            hashes = np.frombuffer(keys, ">i8")[:: KEY_BYTES // 8].astype(np.int64)
            before = _number(bytes.fromhex(prior)) if prior else 0
            return Named(np.stack([hashes, np.concatenate([[before], hashes[:-1]])], 1))
        if self.recorder is None:
            return None
        above = self._above(space, ancestors)
        if above is None:
            return None
        flat = np.ascontiguousarray(tokens, "<u4").tobytes()
        width = len(flat) // len(split)
        digests = _chain(above, [flat[i * width : (i + 1) * width] for i in range(len(split))])
        self._keep(split, digests)
        publish, salt, lora = self._published(space)
        hashes = np.array([publish(_number(digest)) for digest in digests], np.int64)
        before = publish(_number(above)) if prior else 0
        return Named(np.stack([hashes, np.concatenate([[before], hashes[:-1]])], 1).astype(np.int64), salt, lora)

    def _above(self, space: Space, ancestors: Sequence[str]) -> bytes | None:
        """The digest before a page with these pages before it."""
        salt = space[1]
        start = hashlib.sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest() if salt is not None else b""
        if not ancestors:
            return start
        with self._lock:
            known = self._digests.get(bytes.fromhex(ancestors[-1]))
        if known is not None or self._tokens_of is None:
            return known
        before = [bytes.fromhex(key) for key in ancestors]
        tokens = self._tokens_of(before)
        if any(page is None for page in tokens):
            return None
        digests = _chain(start, [page for page in tokens if page is not None])
        self._keep(before, digests)
        return digests[-1]

    def _keep(self, keys: Sequence[bytes], digests: Sequence[bytes]) -> None:
        with self._lock:
            self._digests.update(zip(keys, digests, strict=True))
            while len(self._digests) > _DIGESTS:
                self._digests.popitem(last=False)

    def _published(self, space: Space) -> tuple[Callable[[int], int], str, str]:
        """What an event carries for a hash of this space; its salt and adapter name."""
        extra_key, salt = space
        if self._scramble is None:
            return (lambda block: block), salt or "", ""
        recorder = self.recorder
        names = getattr(recorder, "lora_names", None) or getattr(recorder, "_lora_names", None)
        if getattr(recorder, "dynamo_format", False) or getattr(recorder, "_dynamo_format", False):
            seed = self._event_seed(extra_key=extra_key, cache_salt=salt)
            lora = names.resolve(extra_key) if names is not None else None
        else:
            lora = names.get(extra_key) if names is not None else None
            seed = self._event_seed(extra_key=extra_key if lora is not None else None, cache_salt=None)
        scramble = self._scramble
        return (lambda block: int(scramble(block, namespace_seed=seed))), salt or "", lora or ""


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def _chain(digest: bytes, pages: Sequence[bytes]) -> list[bytes]:
    digests = []
    for tokens in pages:
        digest = hashlib.sha256(digest + tokens).digest()
        digests.append(digest)
    return digests

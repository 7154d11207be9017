"""From SGLang's page keys to canonical ones: which canonical pages cover a page, learnt from its tokens.

SGLang's keys are a chain over its own pages, and the backend sees nothing else. Its tokens come by: with a lookup of a
prompt's rest (the plugin's hook on the storage query) and with a backup (tokens). What was learnt is kept by SGLang's
key, which stands for all the tokens up to the page's end, so reads find it again, and so does whatever follows.

Belongs here: that bookkeeping. Does not belong here: the canonical chain (hicache_ext.chain), or any page's bytes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hicache_ext import chain
from hicache_ext.page import KEY_BYTES
from hicache_ext.sglang import seeds
from hicache_ext.sglang.naming import Naming
from hicache_ext.sglang.tokens import Noted, Space, space_of

#: Pages of SGLang's of which it is known what covers them: about 500 bytes each.
PAGES = 1 << 18


class Covered(NamedTuple):
    """The canonical pages that a page of SGLang's lies in. keys: n x 32 bytes. offset: tokens of the first of them
    before the page. parent: the canonical page before them, None where they begin a prompt."""

    keys: bytes
    offset: int
    parent: bytes | None


class Run(NamedTuple):
    """What a batch of SGLang's pages was found to be: the canonical pages that it is part of.

    keys: of those whose tokens are all known. lead: tokens of the first one before the batch. parent: as Covered's.
    parent_page: SGLang's page before the batch.
    """

    keys: bytes
    lead: int
    parent: bytes | None
    parent_page: bytes | None


class _State(NamedTuple):
    """After a page: the last canonical page's key, or the seed; whether it is the seed; tokens since (u32le)."""

    digest: bytes
    is_seed: bool
    tail: bytes


@dataclass
class _Asking:
    """A lookup under way in this thread. at: the next page's number. before: SGLang's key of the page before it."""

    noted: Noted
    at: int
    before: str | None


class Chains:
    """Thread-safe. page_size: SGLang's. shared_size: tokens of a canonical page."""

    def __init__(self, page_size: int, shared_size: int, limit: int = PAGES) -> None:
        self._page_size, self._shared_size, self._limit = page_size, shared_size, limit
        self._known: OrderedDict[bytes, tuple[Covered | None, _State]] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.local()

    def __len__(self) -> int:
        return len(self._known)

    def covering(self, pages: Sequence[bytes]) -> list[Covered | None]:
        """What covers each of these pages, as far as it was learnt."""
        with self._lock:
            found = [self._known.get(page) for page in pages]
            for page, known in zip(pages, found, strict=True):
                if known is not None:
                    self._known.move_to_end(page)
        return [None if known is None else known[0] for known in found]

    @contextmanager
    def asking(self, key: Any, last_hash: str | None) -> Iterator[None]:
        """While SGLang asks, in this thread, for the pages of these tokens, which follow the page `last_hash`."""
        self._thread.asking = _Asking(Noted(key, 0, space=space_of(key)), 0, last_hash or None)
        try:
            yield
        finally:
            self._thread.asking = None

    def asked(self, pages: Sequence[bytes], naming: Naming, lora: str) -> None:
        """Learn from the lookup under way, whose next pages are these."""
        asking: _Asking | None = getattr(self._thread, "asking", None)
        if asking is None or not pages:
            return
        noted = Noted(asking.noted.key, asking.at * self._page_size, space=asking.noted.space)
        self.learn(pages, noted, asking.before, naming, lora)
        asking.at += len(pages)
        asking.before = pages[-1].hex()

    def learn(
        self, pages: Sequence[bytes], noted: Noted, before: str | None, naming: Naming, lora: str
    ) -> Run | None:  # fmt: skip
        """Learn what these pages are: a batch whose tokens begin where `noted` does, after SGLang's page `before`.

        None where that cannot be told: other tokens than plain ids, or of the tokens before nothing is known.
        """
        tokens = noted.pages(len(pages), self._page_size)
        if tokens is None or noted.space is None or not naming.fits(pages[0], tokens[0], noted.space, before):
            return None
        parent_page = bytes.fromhex(before) if before else None
        with self._lock:
            known = self._known.get(parent_page) if parent_page is not None else None
        if parent_page is None:
            state = _State(seed_of(noted.space, lora, naming.has_own_chain), True, b"")
        elif known is None:
            return None
        else:
            state = known[1]
        # Tokens beyond the batch complete the canonical page that it ends in.
        beyond = self._beyond(noted, len(pages))
        raw = state.tail + np.ascontiguousarray(tokens, "<u4").tobytes() + beyond
        keys = chain.extend_raw(state.digest, raw, self._shared_size)
        lead = len(state.tail) // 4
        parent = None if state.is_seed else state.digest
        self._keep(pages, keys, raw, lead, state)
        return Run(keys, lead, parent, parent_page)

    def _beyond(self, noted: Noted, pages: int) -> bytes:
        """Tokens after the batch, as many as a canonical page may need."""
        key, start = noted.key, noted.start + pages * self._page_size
        more = min(max(0, len(key) - start), self._shared_size)
        tokens = Noted(key, start).pages(1, more) if more else None
        return b"" if tokens is None else np.ascontiguousarray(tokens, "<u4").tobytes()

    def _keep(self, pages: Sequence[bytes], keys: bytes, raw: bytes, lead: int, state: _State) -> None:
        size, shared, known = self._page_size, self._shared_size, len(keys) // KEY_BYTES
        learnt: list[tuple[Covered | None, _State]] = []
        for number in range(len(pages)):
            begin = lead + number * size
            end = begin + size
            first, last, whole = begin // shared, -(-end // shared), end // shared
            covered = None
            if last <= known:
                covered = Covered(
                    keys[first * KEY_BYTES : last * KEY_BYTES], begin % shared, self._before(keys, first, state)
                )
            digest = keys[(whole - 1) * KEY_BYTES : whole * KEY_BYTES] if whole else state.digest
            learnt.append(
                (covered, _State(digest, state.is_seed and not whole, raw[whole * shared * 4 : end * 4]))
            )  # fmt: skip
        with self._lock:
            for page, (covered, after) in zip(pages, learnt, strict=True):
                old = self._known.pop(page, None)
                self._known[page] = (covered or (old[0] if old is not None else None), after)
            while len(self._known) > self._limit:
                self._known.popitem(last=False)

    @staticmethod
    def _before(keys: bytes, first: int, state: _State) -> bytes | None:
        if first:
            return keys[(first - 1) * KEY_BYTES : first * KEY_BYTES]
        return None if state.is_seed else state.digest


def seed_of(space: Space, lora: str, has_own_chain: bool) -> bytes:
    """The canonical chain's seed of a request's extra key and salt.

    Where SGLang knows them apart the extra key is an adapter's id, which is of this server alone: its pages are shared
    with servers that started with the same adapters (`lora`, their digest). Where it does not (0.5.17), the id of an
    adapter that was seen to be loaded stands for its content, which vLLM has as well.
    """
    extra_key, salt = space
    if not has_own_chain:
        return chain.seed(*seeds.parts(extra_key or ""))
    return chain.seed(salt or "", f"sglang\0{lora}\0{extra_key}" if extra_key else "")

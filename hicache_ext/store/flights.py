"""Single flight: a page that is on its way is waited for by everybody who wants it, and travels once.

Belongs here: who leads and who follows. Does not belong here: what travels where (tiered.py).
"""

from __future__ import annotations

import threading

from hicache_ext.page import split_keys
from hicache_ext.store.copies import copy_pages
from storage_backends.base import Completion, Outcome, PageBatch


class _Lead:
    """A batch that moves pages. followers: of these keys, by key, where else they are wanted."""

    __slots__ = ("batch", "followers")

    def __init__(self, batch: PageBatch) -> None:
        self.batch = batch
        self.followers: dict[bytes, list[tuple[PageBatch, int, Completion]]] = {}


class Flights:
    """Pages of one direction that are under way. Thread-safe."""

    def __init__(self, copies: bool) -> None:
        """copies: followers get the leader's bytes (reads), not only its outcome (writes)."""
        self._copies = copies
        self._leads: dict[bytes, dict[bytes, _Lead]] = {}  # by namespace and key
        self._lock = threading.Lock()

    def begin(self, batch: PageBatch, result: Completion) -> list[int]:
        """The batch's pages that the caller has to move; `result` follows the flights of the others."""
        keys = split_keys(batch.keys)
        lead = _Lead(batch)
        with self._lock:
            leads = self._leads.setdefault(batch.namespace.digest, {})
            if leads.keys().isdisjoint(keys):
                leads.update(dict.fromkeys(keys, lead))
                return list(range(len(keys)))
            leading = []
            for page, key in enumerate(keys):
                if leads.setdefault(key, lead) is lead:
                    leading.append(page)
                else:
                    leads[key].followers.setdefault(key, []).append((batch, page, result))
            return leading

    def is_followed(self, batch: PageBatch) -> bool:
        """Whether somebody waits for pages that this batch moves."""
        with self._lock:
            leads = self._leads.get(batch.namespace.digest, {})
            return any(
                lead.batch is batch and lead.followers for lead in map(leads.get, split_keys(batch.keys)) if lead
            )

    def end(self, batch: PageBatch, pages: list[int], outcomes: bytes | bytearray) -> None:
        """These pages of a leader have arrived. Before its completion says so: its buffers are copied from here."""
        keys = split_keys(batch.keys)
        landed = []
        with self._lock:
            leads = self._leads.get(batch.namespace.digest, {})
            for page, outcome in zip(pages, outcomes, strict=True):
                key = keys[page]
                lead = leads.get(key)
                if lead is not None and lead.batch is batch:
                    del leads[key]
                    if key in lead.followers:
                        landed.append((page, outcome, lead.followers.pop(key)))
            if not leads:
                self._leads.pop(batch.namespace.digest, None)
        for page, outcome, followers in landed:
            for theirs, their_page, their_result in followers:
                copied = outcome != Outcome.HIT or not self._copies or copy_pages(batch, [page], theirs, [their_page])
                their_result.settle(their_page, Outcome(outcome) if copied else Outcome.MISS)

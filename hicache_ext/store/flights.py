"""Single flight: a page that is on its way is waited for by everybody who wants it, and travels once.

Belongs here: who leads and who follows. Does not belong here: what travels where (tiered.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from hicache_ext.store.copies import copy_pages
from storage_backends.base import Completion, Outcome, PageBatch


@dataclass
class _Flight:
    """`batch` and `page` say where the leader's bytes will be."""

    batch: PageBatch
    page: int
    followers: list[tuple[PageBatch, int, Completion]] = field(default_factory=list)


class Flights:
    """Pages of one direction that are under way. Thread-safe."""

    def __init__(self, copies: bool) -> None:
        """copies: followers get the leader's bytes (reads), not only its outcome (writes)."""
        self._copies = copies
        self._flights: dict[tuple[bytes, bytes], _Flight] = {}
        self._lock = threading.Lock()

    def begin(self, batch: PageBatch, result: Completion) -> list[int]:
        """The batch's pages that the caller has to move; `result` follows the flights of the others."""
        leading = []
        namespace = batch.namespace.digest
        with self._lock:
            for page in range(len(batch)):
                flight = self._flights.get((namespace, batch.key(page)))
                if flight is not None:
                    flight.followers.append((batch, page, result))
                else:
                    self._flights[namespace, batch.key(page)] = _Flight(batch, page)
                    leading.append(page)
        return leading

    def end(self, batch: PageBatch, pages: list[int], outcomes: bytes | bytearray) -> None:
        """These pages of a leader have arrived. Before its completion says so: its buffers are copied from here."""
        namespace = batch.namespace.digest
        with self._lock:
            landed = []
            for page, outcome in zip(pages, outcomes, strict=True):
                flight = self._flights.get((namespace, batch.key(page)))
                if flight is not None and flight.batch is batch and flight.page == page:
                    del self._flights[namespace, batch.key(page)]
                    if flight.followers:
                        landed.append((page, outcome, flight.followers))
        for page, outcome, followers in landed:
            for theirs, their_page, their_result in followers:
                copied = outcome != Outcome.HIT or not self._copies or copy_pages(batch, [page], theirs, [their_page])
                their_result.settle(their_page, Outcome(outcome) if copied else Outcome.MISS)

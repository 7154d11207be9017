"""Writes that nobody waits for: copies of pages on their way to one tier, in the background, within credits.

Belongs here: the queue of one tier and its thread. Does not belong here: which pages should go there (tiered.py), or
the engine's memory: what is queued here is ours, so that nothing reads the engine's pages after its call returned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection

import numpy as np

from hicache_ext.store.copies import CopyBudget, copy_pages
from hicache_ext.store.tier import Recent, Tier
from storage_backends.base import Completion, KeyBatch, Outcome, PageBatch

logger = logging.getLogger(__name__)

#: Batches that a tier has in hand at once: enough to hide a round trip, few enough to stop soon.
_IN_FLIGHT = 4
_WAIT_SECONDS = 0.5


class Behind:
    """The background writer of one tier.

    budget: credits; pages beyond it are refused and counted (`behind_full`). tier: its health decides whether pages
    are sent or dropped. sent: pages that are known to have arrived, which are not sent again.
    """

    def __init__(self, tier: Tier, budget: CopyBudget, remembered: int = 1 << 17) -> None:
        self.tier = tier
        self._budget = budget
        self._sent = Recent(remembered)
        self._queue: deque[tuple[PageBatch, list[int]]] = deque()
        self._cond = threading.Condition()
        self._flying = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"hicache-behind-{tier.name}", daemon=True)
        self._thread.start()

    def offer(self, batch: PageBatch, pages: list[int]) -> None:
        """Copy these pages and send them later. Never waits; what there is no room for is refused and counted."""
        if self._closed or not self.tier.writes.usable(time.monotonic()):
            self.tier.count("behind_unhealthy", len(pages))
            return
        known = self._sent.flags(batch)
        new = [page for page in pages if not known[page]]
        if not new:
            return
        chosen = batch if len(new) == len(batch) else batch.select(new)
        copy = self._budget.take(chosen)
        if copy is None:
            self.tier.count("behind_full", len(new))
            return
        copy_pages(chosen, range(len(chosen)), copy, range(len(copy)))
        self.send(copy, list(range(len(copy))))

    def send(self, copy: PageBatch, pages: list[int]) -> None:
        """As offer, for the pages of a batch that `take` gave and somebody filled. The batch is this writer's now."""
        with self._cond:
            if pages and not self._closed:
                self._queue.append((copy, pages))
                self._cond.notify_all()
                return
        self._budget.give(copy)

    def take(self, batch: PageBatch) -> PageBatch | None:
        """Memory within this writer's credits for pages that somebody will `send`; None beyond them."""
        copy = self._budget.take(batch)
        if copy is None:
            self.tier.count("behind_full", len(batch))
        return copy

    def clear(self, namespaces: Collection[bytes]) -> None:
        """Pages of these namespaces, by digest, are about to be forgotten: none that waits goes there afterwards."""
        self._sent.clear(namespaces)
        with self._cond:
            dropped = [item for item in self._queue if item[0].namespace.digest in namespaces]
            self._queue = deque(item for item in self._queue if item[0].namespace.digest not in namespaces)
        for batch, _ in dropped:
            self._budget.give(batch)

    def forget(self, namespace: bytes, key: bytes) -> None:
        """The tier does not have this page after all."""
        self._sent.drop(namespace, key)

    def unsent(self, batch: KeyBatch) -> np.ndarray:
        """bool[n]: pages that are not known to be there."""
        return ~self._sent.flags(batch)

    def idle(self) -> bool:
        """Whether nothing is queued or on its way."""
        with self._cond:
            return not self._queue and not self._flying

    def stats(self) -> dict[str, int]:
        return {"behind_pages": self._budget.pages, "behind_bytes": self._budget.bytes}

    def close(self, until: float) -> None:
        """Drop what is queued; wait for what is on its way until then (monotonic seconds)."""
        with self._cond:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._cond.notify_all()
        for batch, pages in dropped:
            self.tier.count("behind_dropped", len(pages))
            self._budget.give(batch)
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._cond:
            self._cond.wait_for(lambda: not self._flying, max(0.0, until - time.monotonic()))

    def free(self) -> None:
        """Give its memory back to the machine, where nothing uses it any more. The tier is closed by then."""
        if self.idle():
            self._budget.close()

    def _run(self) -> None:
        while True:
            with self._cond:
                while not self._closed and (not self._queue or self._flying >= _IN_FLIGHT):
                    self._cond.wait(_WAIT_SECONDS)
                if self._closed:
                    return
                batch, pages = self._queue.popleft()
                self._flying += 1
            try:
                self._write(batch, pages)
            except Exception:
                # A backend may raise only for a programming error; that too must not end the thread.
                logger.exception("tier %s: a background write raised; its pages are dropped", self.tier.name)
                self._landed(batch)

    def _write(self, batch: PageBatch, pages: list[int]) -> None:
        tier, namespace = self.tier, batch.namespace.digest
        if not tier.writes.allow(time.monotonic()):
            tier.count("behind_unhealthy", len(pages))
            self._landed(batch)
            return
        there = tier.backend.lookup(batch.only(pages)) != 0
        for page in np.flatnonzero(there).tolist():
            self._sent.add(namespace, batch.key(pages[page]))
        missing = [pages[page] for page in np.flatnonzero(~there)]
        if not missing:
            self._landed(batch)
            return
        part = batch.select(missing)

        def written(done: Completion) -> None:
            tier.account("write", done.outcomes)
            for page, outcome in enumerate(done.outcomes):
                if outcome == Outcome.HIT:
                    self._sent.add(namespace, part.key(page))
                    tier.lied.drop(namespace, part.key(page))
            self._landed(batch)

        tier.backend.write(part).on_done(written)

    def _landed(self, batch: PageBatch) -> None:
        self._budget.give(batch)
        with self._cond:
            self._flying -= 1
            self._cond.notify_all()

"""Write-behind on eviction: pages that a tier is about to evict are copied to the tier below it first.

Belongs here: asking which pages go next, and reading them back in time. Does not belong here: evicting (backends), or
the queue of the tier below (behind.py). A page that is evicted before its turn came is lost to the tier below, and
counted there as `demotion_late`: a cache may forget.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import numpy as np

from hicache_ext.page import Namespace
from hicache_ext.store.behind import Behind
from hicache_ext.store.tier import Tier
from storage_backends.base import Completion, KeyBatch, Outcome, PageBatch

logger = logging.getLogger(__name__)

#: Pages that are read at a time, and those among which are looked for that are not below yet: a burst of writes evicts
#: many at once.
_PAGES, _AHEAD = 64, 1024
_BUSY_SECONDS, _IDLE_SECONDS = 0.02, 0.25


class Demotion:
    """From one tier to the next below it, on a thread of its own."""

    def __init__(self, above: Tier, below: Behind, spaces: Mapping[bytes, Namespace]) -> None:
        """spaces: the namespaces that were met, by digest; only their pages can be moved."""
        self._above, self._below, self._spaces = above, below, spaces
        self._reads: list[Completion] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"hicache-demote-{above.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        wait = _IDLE_SECONDS
        while not self._closing.wait(wait):
            try:
                wait = _BUSY_SECONDS if self._turn() else _IDLE_SECONDS
            except Exception:
                # A backend may raise only for a programming error; that too must not end the thread.
                logger.exception("tier %s: demotion failed; tried again", self._above.name)
                wait = 10 * _IDLE_SECONDS

    def _turn(self) -> bool:
        """Move some pages, once those before them have arrived below; whether there is more to do soon."""
        self._reads = [read for read in self._reads if not read.done]
        if self._reads or not self._below.idle():
            return True
        moved = [self._move(*going) for going in self._above.backend.going(_AHEAD)]
        return any(moved)

    def _move(self, digest: bytes, keys: bytes) -> bool:
        """Read these pages and send on those that came; whether there was anything to do."""
        space = self._spaces.get(digest)
        if space is None:
            return False
        asked = KeyBatch(space, keys)
        new = np.flatnonzero(self._below.unsent(asked))[:_PAGES].tolist()
        if not new:
            return False
        wanted = asked.only(new)
        lengths = np.tile(np.array(space.layout.buffer_lengths, np.uint64), len(wanted))
        offsets = np.arange(len(wanted) + 1, dtype=np.int64) * len(space.layout.buffer_lengths)
        empty = PageBatch(space, wanted.keys, None, np.zeros_like(lengths), lengths, offsets, used=False)
        batch = self._below.take(empty)
        if batch is None:
            return False

        def arrived(done: Completion) -> None:
            good = [page for page, outcome in enumerate(done.outcomes) if outcome == Outcome.HIT]
            if len(good) < len(batch):
                self._below.tier.count("demotion_late", len(batch) - len(good))
            self._below.tier.count("demoted", len(good))
            self._below.send(batch, good)

        read = self._above.backend.read(batch)
        self._reads.append(read)
        read.on_done(arrived)
        return True

"""Write-through of pages that went past the host: the first tier took them from a device, and one below wants copies.

Belongs here: which pages a tier below still has to get, and reading them from the first tier's host side, a little at a
time. Does not belong here: the queue of copies (behind.py), or the way past the host (to_device.py, backends).

What waits here are names of pages, not their bytes: those stay where they are until the tier below has room for
copies. A page that is evicted before its turn came is lost to the tier below, and counted there as `read_back_late`: a
cache may forget.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import partial

import numpy as np

from hicache_ext.store.behind import Behind
from hicache_ext.store.copies import without_memory
from hicache_ext.store.tier import Tier
from storage_backends.base import Completion, Outcome, PageBatch

logger = logging.getLogger(__name__)

#: Pages whose names wait at once. A name with what KV events say of it is some hundred bytes.
_PAGES = 1 << 16
#: Read at a time; then nothing for as long as that took, or for so long: an engine's threads have the CPU meanwhile.
_PART_BYTES, _PART_PAGES = 8 << 20, 64
_REST_SECONDS = 0.002
_LOOK_SECONDS = 0.05
_CLOSE_SECONDS = 2.0


class ReadBack:
    """From the first tier to one below it, in the order in which pages were written. Its thread starts with its first
    page."""

    def __init__(self, above: Tier, below: Behind, most_pages: int = _PAGES) -> None:
        self._above, self._below, self.tier, self._most = above, below, below.tier, most_pages
        self._queue: deque[PageBatch] = deque()
        self._pages = 0  # in the queue
        self._moving: PageBatch | None = None  # taken out of it, not handed on yet, and still wanted
        self._busy = False  # with what was taken out of it, wanted or not
        self._cond = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, batch: PageBatch, pages: list[int]) -> None:
        """The first tier has these pages now. Never waits; the batch's memory is not used after this returns."""
        with self._cond:
            room = 0 if self._closed else self._most - self._pages
            kept = pages[: max(0, room)]
            if kept:
                self._queue.append(without_memory(batch if len(kept) == len(batch) else batch.select(kept)))
                self._pages += len(kept)
                if self._thread is None:
                    name = f"hicache-read-back-{self.tier.name}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                    self._thread.start()
                self._cond.notify_all()
        if len(kept) < len(pages):
            self._count("read_back_full", len(pages) - len(kept))

    def clear(self, namespaces: Iterable[bytes]) -> None:
        """Pages of these namespaces, by digest, do not go below any more, nor do those that are being read."""
        gone = set(namespaces)
        with self._cond:
            if self._moving is not None and self._moving.namespace.digest in gone:
                self._moving = None
            self._queue = deque(part for part in self._queue if part.namespace.digest not in gone)
            self._pages = sum(map(len, self._queue))

    def idle(self) -> bool:
        """Whether nothing waits here and nothing is being read. What was handed on before is the tier below's."""
        with self._cond:
            return not self._queue and not self._busy

    def stats(self) -> dict[str, int]:
        return {"read_back_waiting": self._pages}

    def close(self) -> None:
        """Drop what waits. What is being read goes nowhere."""
        with self._cond:
            self._closed = True
            dropped = self._pages + (len(self._moving) if self._moving is not None else 0)
            self._queue.clear()
            self._pages, self._moving = 0, None
            self._cond.notify_all()
        if dropped:
            self._count("behind_dropped", dropped)
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._cond:
                self._cond.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                part = self._moving = self._next()
                self._busy = True
            since = time.monotonic()
            try:
                self._move(part)
            except Exception:
                # A backend may raise only for a programming error; that too must not end the thread.
                logger.exception("tier %s: pages could not be read back for the next one", self._above.name)
                self._count("read_back_late", len(part))
            with self._cond:
                self._moving, self._busy = None, False
                rest = max(_REST_SECONDS, time.monotonic() - since)
                self._cond.wait_for(lambda: self._closed, min(rest, _LOOK_SECONDS))

    def _next(self) -> PageBatch:
        """The next pages that are read together. With the lock."""
        batch = self._queue.popleft()
        most = max(1, min(_PART_PAGES, _PART_BYTES // max(1, batch.namespace.layout.payload_bytes)))
        if len(batch) > most:
            self._queue.appendleft(batch.select(list(range(most, len(batch)))))
            batch = batch.select(list(range(most)))
        self._pages -= len(batch)
        return batch

    def _move(self, part: PageBatch) -> None:
        """Read these pages and hand on those that came."""
        new = np.flatnonzero(self._below.unsent(part)).tolist()
        if not new:
            return
        wanted = part if len(new) == len(part) else part.select(new)
        copy = self._room(part, wanted)
        if copy is None:
            return
        try:
            read = self._above.backend.read(copy)
        except BaseException:
            self._below.send(copy, [])
            raise
        ended = threading.Event()
        read.on_done(partial(self._arrived, part, copy, ended))
        while not ended.wait(_LOOK_SECONDS) and not self._closed:
            pass  # nothing else is read before these were handed on, so that pages keep their order

    def _room(self, part: PageBatch, wanted: PageBatch) -> PageBatch | None:
        """Memory for these pages, as soon as there is some; None where they are not wanted any more, counted."""
        while True:
            if not self.tier.writes.usable(time.monotonic()):
                self._count("behind_unhealthy", len(wanted))
                return None
            idle = self._below.idle()
            if (copy := self._below.room(wanted)) is not None:
                return copy
            if idle:  # it never fits
                self._count("behind_full", len(wanted))
                return None
            with self._cond:
                self._cond.wait_for(lambda: self._moving is not part, _LOOK_SECONDS)
                if self._moving is not part:
                    return None

    def _arrived(self, part: PageBatch, copy: PageBatch, ended: threading.Event, done: Completion) -> None:
        try:
            with self._cond:
                # Handed on with the lock: what is cleared or closed after this finds it below.
                wanted = self._moving is part
                good = [page for page, outcome in enumerate(done.outcomes) if outcome == Outcome.HIT] if wanted else []
                self._below.send(copy, good)
                if wanted:
                    self._moving = None
            if wanted:
                self._count("read_back", len(good))
                self._count("read_back_late", len(copy) - len(good))
        finally:
            ended.set()

    def _count(self, name: str, number: int) -> None:
        if number:
            self.tier.count(name, number)

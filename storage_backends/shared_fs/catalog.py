"""What this process knows of the share's pages: which segment has each, in memory and bounded.

Belongs here: the index, and which pages were reported as stored. Does not belong here: how segments are found
(discovery.py), or anything that asks the share.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable

import numpy as np

from storage_backends.base import KeyBatch, Notes, Residency

_STALE = 1000

Report = Callable[[Residency, bytes, bytes, Notes | None], None]


class Segment:
    """One segment. pages: key to slot, only those that reads take from here.

    born: when, by the share's clock, then the id: of two segments with a page the greater has it.
    paths: where it may be; several while it is renamed. touched: when we last marked it as used (monotonic seconds).
    """

    __slots__ = ("born", "mine", "name", "namespace", "pages", "paths", "touched")

    def __init__(self, namespace: bytes, name: str, path: str, born: tuple[int, bytes], mine: bool = False) -> None:
        self.namespace, self.name, self.born, self.mine = namespace, name, born, mine
        self.paths: tuple[str, ...] = (path,)
        self.pages: dict[bytes, int] = {}
        self.touched = 0.0

    @property
    def path(self) -> str:
        return self.paths[-1]


class Catalog:
    """limit: pages that are remembered. report: hears STORED for pages that we wrote, and REMOVED once we know them
    gone; other writers' pages are for them to report. Thread-safe."""

    def __init__(self, limit: int, report: Report) -> None:
        self._limit, self._report = limit, report
        self._spaces: dict[bytes, dict[bytes, Segment]] = {}
        self._told: dict[bytes, set[bytes]] = {}
        self._named: dict[str, Segment] = {}
        self._oldest: list[tuple[tuple[int, bytes], str]] = []
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether there is room for no other page, unless older ones are forgotten."""
        return self._count >= self._limit

    @property
    def segments(self) -> int:
        return len(self._named)

    def flags(self, batch: KeyBatch) -> np.ndarray:
        """uint8[n]: 1 where a segment has the page."""
        known = self._spaces.get(batch.namespace.digest)
        if not known:
            return np.zeros(len(batch), np.uint8)
        return np.array([batch.key(i) in known for i in range(len(batch))], np.uint8)

    def find(self, batch: KeyBatch) -> list[tuple[Segment, int] | None]:
        """For each page, its segment and slot."""
        with self._lock:
            known = self._spaces.get(batch.namespace.digest, {})
            found: list[tuple[Segment, int] | None] = []
            for i in range(len(batch)):
                key = batch.key(i)
                segment = known.get(key)
                found.append(None if segment is None else (segment, segment.pages[key]))
            return found

    def named(self, name: str) -> Segment | None:
        return self._named.get(name)

    def rename(self, segment: Segment, name: str) -> None:
        """Before the file is renamed: whoever finds the new name knows whose it is."""
        with self._lock:
            known = self._named.pop(segment.name, None)
            segment.name = name
            if known is not None:
                self._enter(segment)

    def adopt(self, segment: Segment, pages: Iterable[tuple[bytes, int]]) -> None:
        """A segment that another wrote: its (key, slot)s. Pages that a younger segment has stay there."""
        with self._lock:
            known = self._spaces.setdefault(segment.namespace, {})
            for key, slot in pages:
                other = known.get(key)
                if other is None or other.born < segment.born:
                    self._take(known, segment, key, slot)
            self._enter(segment)
            self._bound(None)

    def store(self, segment: Segment, pages: list[tuple[bytes, int]], notes: Notes | None = None) -> list[bytes]:
        """(key, slot)s that we have written there; the keys that were new. What was known before stays where it is.

        notes: of all these pages, for the report.
        """
        with self._lock:
            known = self._spaces.setdefault(segment.namespace, {})
            new = [i for i, (key, _) in enumerate(pages) if key not in known]
            for i in new:
                self._take(known, segment, *pages[i])
            self._enter(segment)
            told = self._told.setdefault(segment.namespace, set())
            fresh = [i for i in new if pages[i][0] not in told]
            keys = [pages[i][0] for i in fresh]
            told.update(keys)
            self._report(
                Residency.STORED, segment.namespace, b"".join(keys), None if notes is None else notes.only(fresh)
            )
            self._bound(segment)
            return [pages[i][0] for i in new]

    def forget(self, namespace: bytes, keys: Iterable[bytes], only: Segment | None = None) -> list[Segment]:
        """These pages are not there any more, or no good. only: as far as they are in this segment.

        The segments that they were in, one entry for each page that was known.
        """
        with self._lock:
            known = self._spaces.get(namespace, {})
            gone, segments = [], []
            for key in keys:
                segment = known.get(key)
                if segment is not None and (only is None or segment is only):
                    del known[key], segment.pages[key]
                    self._count -= 1
                    gone.append(key)
                    segments.append(segment)
            self._say_gone(namespace, gone)
            return segments

    def drop(self, segment: Segment) -> None:
        """The segment is gone, or no good."""
        with self._lock:
            self._drop(segment)

    def clear(self, namespace: bytes) -> list[Segment]:
        """Forget all of a namespace; the segments that were known."""
        with self._lock:
            segments = [segment for segment in self._named.values() if segment.namespace == namespace]
            for segment in segments:
                self._drop(segment)
            self._spaces.pop(namespace, None)
            self._told.pop(namespace, None)
            return segments

    # ---- under the lock

    def _enter(self, segment: Segment) -> None:
        if segment.name not in self._named:
            self._named[segment.name] = segment
            heapq.heappush(self._oldest, (segment.born, segment.name))
            if len(self._oldest) > 2 * len(self._named) + _STALE:  # most are of segments that are gone
                self._oldest = [(segment.born, name) for name, segment in self._named.items()]
                heapq.heapify(self._oldest)

    def _take(self, known: dict[bytes, Segment], segment: Segment, key: bytes, slot: int) -> None:
        other = known.get(key)
        if other is not None:
            del other.pages[key]
            self._count -= 1
        known[key] = segment
        segment.pages[key] = slot
        self._count += 1

    def _drop(self, segment: Segment) -> None:
        if self._named.get(segment.name) is segment:
            del self._named[segment.name]
        known = self._spaces.get(segment.namespace, {})
        gone = [key for key in segment.pages if known.pop(key, None) is not None]
        self._count -= len(gone)
        segment.pages = {}
        self._say_gone(segment.namespace, gone)

    def _bound(self, written: Segment | None) -> None:
        """Forget the oldest segments beyond the limit, but not the one that is being written."""
        kept = []
        while self._count > self._limit and self._oldest:
            oldest = heapq.heappop(self._oldest)
            segment = self._named.get(oldest[1])
            if segment is not None and segment is written:
                kept.append(oldest)
            elif segment is not None:
                self._drop(segment)
        for each in kept:
            heapq.heappush(self._oldest, each)

    def _say_gone(self, namespace: bytes, keys: list[bytes]) -> None:
        told = self._told.get(namespace)
        if told:
            removed = [key for key in keys if key in told]
            told.difference_update(removed)
            self._report(Residency.REMOVED, namespace, b"".join(removed), None)

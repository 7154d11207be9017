"""Other writers' segments: looked for in the background, one namespace at a time, and only new names are read.

Belongs here: when to look, what was seen already, and reading an index. Does not belong here: what is known of pages
(catalog.py), or which directories there are (directory.py).

A lookup or read that misses asks for a look; a look comes at most every `refresh` seconds for each namespace, lists the
buckets that may have changed, and reads the index of each segment that it has not seen (one small read).
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from hicache_ext.page import Namespace
from storage_backends.format import FormatError
from storage_backends.shared_fs.catalog import Catalog, Segment
from storage_backends.shared_fs.directory import buckets, is_recent, to_list
from storage_backends.shared_fs.segment import SegmentIndex, SegmentName, index_bytes
from storage_backends.shared_fs.share import Share

_NAMESPACES = 256
#: Looks that a segment gets whose index is no good: a share may have given other bytes than it has.
_TRIES = 3


class _Space:
    def __init__(self, namespace: Namespace, slot_bytes: int) -> None:
        self.namespace, self.slot_bytes = namespace, slot_bytes
        self.seen: dict[str, set[str]] = {}
        """Of each bucket, the segments that were read, or were no good."""
        self.looked = 0.0
        self.queued = False
        self.first = threading.Event()
        self.turn = 0


class Discovery:
    """One thread. failed: called with the OSError of a look that went wrong. gone: with segments that disappeared."""

    def __init__(
        self, share: Share, catalog: Catalog, refresh: float, gone: Callable[[Segment], None],
        failed: Callable[[OSError], None],
    ) -> None:  # fmt: skip
        self._share, self._catalog, self._refresh = share, catalog, refresh
        self._gone, self._failed = gone, failed
        self._spaces: OrderedDict[bytes, _Space] = OrderedDict()
        self._queue: SimpleQueue[_Space | None] = SimpleQueue()
        self._bad: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.looks = self.damaged = 0
        threading.Thread(target=self._run, name="hicache-share-look", daemon=True).start()

    def want(self, namespace: Namespace, slot_bytes: int) -> threading.Event:
        """Have a look soon, unless there was one just now. Never blocks. The event is set after the first look ever."""
        with self._lock:
            space = self._spaces.get(namespace.digest)
            if space is None:
                space = self._spaces[namespace.digest] = _Space(namespace, slot_bytes)
                while len(self._spaces) > _NAMESPACES:
                    self._spaces.popitem(last=False)
            else:
                self._spaces.move_to_end(namespace.digest)
            due = not space.first.is_set() or time.monotonic() - space.looked >= self._refresh
            if due and not space.queued and not self._closed:
                space.queued = True
                self._queue.put(space)
        return space.first

    def note(self, segment: Segment) -> None:
        """A segment of our own is on the share: from now on it is missed when it is not."""
        path = Path(segment.path)
        with self._lock:
            space = self._spaces.get(segment.namespace)
            if space is not None:
                space.seen.setdefault(path.parent.parent.name, set()).add(path.name)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._queue.put(None)

    def _run(self) -> None:
        while (space := self._queue.get()) is not None and not self._closed:
            try:
                if self._share.problem:
                    self._share.prepare()
                self._look(space)
            except OSError as error:
                self._failed(error)
            with self._lock:
                space.looked = time.monotonic()
                space.queued = False
            space.first.set()

    def _look(self, space: _Space) -> None:
        self.looks += 1
        space.turn += 1
        with self._lock:
            before = list(space.seen)
        names = buckets(self._share.listed())
        for bucket in set(before) - set(names):
            self._missing(space.seen.pop(bucket))
        for bucket in to_list(names, space.seen, self._share.now_ns(), space.turn):
            if self._closed:
                return
            if self._catalog.full and not is_recent(bucket, self._share.now_ns()):
                with self._lock:
                    space.seen.setdefault(bucket, set())  # older than what would be forgotten for it
                continue
            directory = self._share.root / bucket / space.namespace.digest.hex()
            with self._lock:
                known = set(space.seen.setdefault(bucket, set()))
            found = set(self._share.listed(bucket, space.namespace.digest.hex()))
            self._missing(known - found)
            new = set()
            for name in found - known:
                parsed = SegmentName.parse(name)
                if parsed is not None and self._learn(space, parsed, str(directory / name)):
                    new.add(name)
            with self._lock:
                space.seen[bucket] -= known - found
                space.seen[bucket] |= new

    def _missing(self, names: set[str]) -> None:
        for name in names:
            segment = self._catalog.named(name)
            if segment is not None:
                self._gone(segment)

    def _learn(self, space: _Space, name: SegmentName, path: str) -> bool:
        """Whether the segment needs no other look."""
        if self._catalog.named(str(name)) is not None:  # our own
            return True
        with self._share.call():
            try:
                index = read_index(path, name)
            except FileNotFoundError:
                return False
            except FormatError:
                return self._no_good(name)
        if index.namespace != space.namespace.digest or index.slot_bytes != space.slot_bytes:
            return self._no_good(name)
        segment = Segment(index.namespace, str(name), path, (index.born_ns, index.id))
        slots = index.slots.tolist()
        self._catalog.adopt(segment, [(index.key(i), slots[i]) for i in range(len(slots))])
        return True

    def _no_good(self, name: SegmentName) -> bool:
        tries = self._bad[str(name)] = self._bad.get(str(name), 0) + 1
        if tries < _TRIES:
            return False
        del self._bad[str(name)]
        self.damaged += 1
        return True


def read_index(path: str, name: SegmentName) -> SegmentIndex:
    """The index of the segment at `path`. Raises FormatError, OSError."""
    size = index_bytes(name.entries)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return SegmentIndex.decode(os.pread(fd, size, name.index_at), name)
    finally:
        os.close(fd)

"""Open segments for reading: few descriptors for many files, none closed while it is read.

Does not belong here: which segments there are, or what is read.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from storage_backends.shared_fs.catalog import Segment
from storage_backends.shared_fs.share import Share

_KEPT = 128
#: A descriptor keeps a removed file's room on some shares, and its bytes readable: it is opened anew after this.
_SECONDS = 5.0


class _Open:
    __slots__ = ("began", "fd", "stale", "users")

    def __init__(self, fd: int) -> None:
        self.fd, self.users, self.stale, self.began = fd, 0, False, time.monotonic()

    @property
    def old(self) -> bool:
        return time.monotonic() - self.began > _SECONDS


class OpenFiles:
    """Thread-safe."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._open: OrderedDict[Segment, _Open] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, segment: Segment) -> Iterator[int]:
        """A descriptor of the segment. OSError as open raises it: FileNotFoundError when somebody removed it."""
        idle: list[int] = []
        with self._lock:
            found = self._open.get(segment)
            if found is not None and found.old:
                idle = self._retire(self._open.pop(segment))
                found = None
            if found is not None:
                found.users += 1
                self._open.move_to_end(segment)
        self._close(idle)
        if found is None:
            found = self._opened(segment)
        try:
            yield found.fd
        finally:
            with self._lock:
                found.users -= 1
                close = found.stale and not found.users
            if close:
                os.close(found.fd)

    def drop(self, segment: Segment) -> None:
        """The segment is gone: no descriptor may hold its room."""
        with self._lock:
            found = self._open.pop(segment, None)
            idle = self._retire(found)
        self._close(idle)

    def expired(self) -> bool:
        """Whether `expire` has something to do."""
        with self._lock:
            return any(found.old for found in self._open.values())

    def expire(self) -> None:
        """Close what has been open for long. May ask the share."""
        with self._lock:
            old = [segment for segment, found in self._open.items() if found.old]
            idle = [fd for segment in old for fd in self._retire(self._open.pop(segment))]
        self._close(idle)

    def close(self) -> None:
        """What is still being read is closed by its reader."""
        with self._lock:
            idle = [fd for found in self._open.values() for fd in self._retire(found)]
            self._open.clear()
        self._close(idle)

    def _opened(self, segment: Segment) -> _Open:
        mine = _Open(self._open_somewhere(segment))
        idle: list[int] = []
        with self._lock:
            other = self._open.get(segment)
            if other is not None:  # another reader was faster
                idle, mine = [mine.fd], other
            else:
                self._open[segment] = mine
            mine.users += 1
            while len(self._open) > _KEPT:
                idle += self._retire(self._open.popitem(last=False)[1])
        self._close(idle)
        return mine

    def _open_somewhere(self, segment: Segment) -> int:
        """A segment that we write changes its name once, maybe now."""
        while True:
            paths = segment.paths
            for path in paths:
                try:
                    return self._share.open(path, os.O_RDONLY)
                except FileNotFoundError as error:
                    missing = error
            if segment.paths == paths:
                raise missing

    def _retire(self, found: _Open | None) -> list[int]:
        if found is None:
            return []
        found.stale = True
        return [] if found.users else [found.fd]

    def _close(self, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

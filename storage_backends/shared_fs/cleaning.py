"""What is on the share and what of it goes first, added up in memory.

Belongs here: sums and order, without I/O. Does not belong here: the share (cleaner.py).

What is known of a segment's last use may be old, but is never too late: a segment is looked at before it goes, and when
it was used since, it gets its new place in the order instead. So most segments are never asked for anything.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_STALE = 1000


class Known(NamedTuple):
    """One segment. used_ns: when it was last used, never later than it really was. size: bytes."""

    used_ns: int
    directory: str
    name: str
    size: int


class Ledger:
    """used: bytes of all that was entered. Directories and names are the caller's."""

    def __init__(self) -> None:
        self.used = 0
        self._known: dict[str, dict[str, Known]] = {}
        self._unfinished: dict[str, int] = {}
        self._heap: list[Known] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def directories(self) -> list[str]:
        return list(self._known.keys() | self._unfinished.keys())

    def enter(self, directory: str, sizes: Mapping[str, int], began_ns: int, unfinished: int = 0) -> list[str]:
        """What a directory holds now: segments by name, and bytes of others. Names that were there and are not.

        began_ns: no segment in it was used before that.
        """
        before = self._known.get(directory, {})
        gone = before.keys() - sizes.keys()
        for name in list(gone):
            self.forget(directory, name)
        for name, size in sizes.items():
            if name not in before:
                self._put(Known(began_ns, directory, name, size))
                self.used += size
                self._count += 1
        self.used += unfinished - self._unfinished.pop(directory, 0)
        if unfinished:
            self._unfinished[directory] = unfinished
        if not self._known.get(directory):
            self._known.pop(directory, None)
        return list(gone)

    def forget(self, directory: str, name: str) -> None:
        """A segment that is gone."""
        known = self._known.get(directory, {}).pop(name, None)
        if known is not None:
            self.used -= known.size
            self._count -= 1

    def victims(
        self, excess: Callable[[], int], expired_ns: int | None, look: Callable[[Known], int | None]
    ) -> Iterator[Known]:
        """Segments that go, least recently used first: until no bytes are in `excess`, and all that were not used since
        `expired_ns` (None: no age is too old). Each is forgotten here before it is given.

        look: when a segment was last used (ns), None if it is gone.
        """
        while self._heap:
            oldest = self._heap[0]
            if self._known.get(oldest.directory, {}).get(oldest.name) is not oldest:
                heapq.heappop(self._heap)
                continue
            if excess() <= 0 and (expired_ns is None or oldest.used_ns >= expired_ns):
                return
            used_ns = look(oldest)
            heapq.heappop(self._heap)
            if used_ns is not None and used_ns > oldest.used_ns:
                self._put(oldest._replace(used_ns=used_ns))
                continue
            self.forget(oldest.directory, oldest.name)
            yield oldest

    def _put(self, known: Known) -> None:
        self._known.setdefault(known.directory, {})[known.name] = known
        heapq.heappush(self._heap, known)
        if len(self._heap) > 2 * self._count + _STALE:
            self._heap = [each for names in self._known.values() for each in names.values()]
            heapq.heapify(self._heap)

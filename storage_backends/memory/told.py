"""The pages of which this process has said that they are stored, so that it says once that each has gone.

Any process may evict or remove any page of a region, and only the one that announced a page takes that back, since
routers count by who said it. So this looks, whenever pages have gone, which of its own are among them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from hicache_ext.page import KEY_BYTES, split_keys
from storage_backends.base import Notes, Residency

Report = Callable[[Residency, bytes, bytes, Notes | None], None]
#: uint8[n] for (namespace digest, packed keys): 1 where the page is there.
Look = Callable[[bytes, bytes], np.ndarray]


class Told:
    """Thread-safe. report: who is told. look: what is there now."""

    def __init__(self, report: Report, look: Look) -> None:
        self._report, self._look = report, look
        self._mine: dict[bytes, set[bytes]] = {}
        self._seen = 0
        self._lock = threading.Lock()

    def stored(self, namespace: bytes, keys: list[bytes], notes: Notes | None) -> None:
        """This process has stored these pages. notes: of each of them."""
        with self._lock:
            mine = self._mine.setdefault(namespace, set())
            new = [page for page, key in enumerate(keys) if key not in mine]
            mine.update(keys)
            kept = None if notes is None else notes.only(new)
            self._report(Residency.STORED, namespace, b"".join(keys[page] for page in new), kept)

    def removed(self, namespace: bytes, keys: bytes, remove: Callable[[], np.ndarray]) -> int:
        """Call `remove`, which says of each key (uint8[n]) whether it was there, and report those that were ours."""
        with self._lock:  # a page that is stored again meanwhile is reported after this
            were = remove()
            mine = self._mine.get(namespace, set())
            gone = [key for key, was in zip(split_keys(keys), were, strict=True) if was and key in mine]
            mine.difference_update(gone)
            self._report(Residency.REMOVED, namespace, b"".join(gone), None)
        return int(were.sum())

    def sweep(self, changes: int) -> None:
        """Report those of ours that have gone. changes: the region's counter; nothing is done while it stays."""
        with self._lock:
            if changes == self._seen:
                return
            self._seen = changes
            for namespace, mine in self._mine.items():
                packed = b"".join(mine)
                there = self._look(namespace, packed)
                if there.all():
                    continue
                gone = b"".join(packed[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in np.flatnonzero(there == 0))
                mine.difference_update(split_keys(gone))
                self._report(Residency.REMOVED, namespace, gone, None)

"""What was seen in a shared store lately, there or absent: all that a backend of a remote store can say without asking.

Others store and evict there without telling, so an answer is a guess of limited age and never more than a hint: a page
that is gone by now is a miss when it is read, and one that has come meanwhile is written again.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from storage_backends.base import KeyBatch


class Presence:
    """pages: how many are remembered, the latest ones. seconds: for how long. Thread-safe."""

    def __init__(self, pages: int = 1 << 16, seconds: float = 60.0) -> None:
        self._limit, self._seconds = pages, seconds
        self._seen: OrderedDict[tuple[bytes, bytes], float] = OrderedDict()
        self._lock = threading.Lock()

    def seen(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """These pages are there now."""
        until = time.monotonic() + self._seconds
        with self._lock:
            for key in keys:
                self._seen[namespace, key] = until
                self._seen.move_to_end((namespace, key))
            while len(self._seen) > self._limit:
                self._seen.popitem(last=False)

    def gone(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """These pages are not there."""
        with self._lock:
            for key in keys:
                self._seen.pop((namespace, key), None)

    def oldest(self, most: int) -> list[tuple[bytes, bytes, float]]:
        """Up to `most` of the pages for which the time has run out, those first that were seen the longest ago:
        namespace, key, and until when that was good."""
        now = time.monotonic()
        found: list[tuple[bytes, bytes, float]] = []
        with self._lock:
            for (namespace, key), until in self._seen.items():
                if until > now or len(found) == most:
                    break
                found.append((namespace, key, until))
        return found

    def drop(self, namespace: bytes, key: bytes, until: float) -> bool:
        """This page is not there, unless it was seen since `oldest` said so; whether that is so."""
        with self._lock:
            if self._seen.get((namespace, key)) != until:
                return False
            del self._seen[namespace, key]
            return True

    def forget(self, namespace: bytes) -> None:
        """Nothing is known of this namespace any more."""
        with self._lock:
            for name in [name for name in self._seen if name[0] == namespace]:
                del self._seen[name]

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        """uint8[n]: 1 where the page was seen lately."""
        return np.array(self.known(batch.namespace.digest, [batch.key(i) for i in range(len(batch))]), np.uint8)

    def known(self, namespace: bytes, keys: Iterable[bytes]) -> list[bool]:
        """Of each page, whether it was seen lately."""
        now = time.monotonic()
        with self._lock:
            return [self._seen.get((namespace, key), 0.0) > now for key in keys]

    def __len__(self) -> int:
        return len(self._seen)

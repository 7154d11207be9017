"""Memory that is taken from the kernel before a page needs it, on a thread of its own.

A write that meets memory which nobody has touched yet waits for the kernel to find and clear it, several times as long
as the page's copy takes. A region fills once, and what evicted pages leave is there already: so this thread has work
only in a region's youth.

Does not belong here: which memory is next (csrc/memory), or where it comes from (region.py).
"""

from __future__ import annotations

import threading
from typing import Any

#: Bytes that are ready for the pages to come: what an engine writes at a time, several times over.
_AHEAD_BYTES = 256 << 20
#: Bytes that are taken at once: a few milliseconds, and all that `close` waits for.
_STEP_BYTES = 4 << 20


class Ahead:
    """For one region. The thread begins with the first `look`: who never writes takes nothing."""

    def __init__(self, region: Any) -> None:
        self._region = region
        self._bytes = min(_AHEAD_BYTES, region.capacity // 4)
        self._opened = -1
        self._wanted = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def look(self) -> None:
        """After writes: have memory taken if there is less ahead than before."""
        opened = self._region.opened()
        if opened == self._opened:
            return
        self._opened = opened
        self._wanted.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._closing:
                    self._thread = threading.Thread(target=self._run, name="hicache-memory-ahead", daemon=True)
                    self._thread.start()

    def close(self) -> None:
        """Returns when nothing is being taken any more."""
        with self._lock:
            self._closing = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._wanted.wait()
            self._wanted.clear()
            while not self._closing and self._region.prepare(self._bytes, _STEP_BYTES):
                pass

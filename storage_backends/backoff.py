"""When to try a server again that could not be reached: later each time, by chance, and one caller at a time."""

from __future__ import annotations

import random
import threading
import time


class Backoff:
    """first, longest: seconds to wait after the first failure and at most. Thread-safe."""

    def __init__(self, first: float = 0.1, longest: float = 5.0) -> None:
        self.reason = ""
        self._first, self._longest = first, longest
        self._wait = 0.0
        self._until = 0.0
        self._lock = threading.Lock()

    def allow(self) -> bool:
        """Whether to try now. After a failure True for one caller, then not before another wait has passed."""
        with self._lock:
            if not self._wait:
                return True
            now = time.monotonic()
            if now < self._until:
                return False
            self._until = now + self._wait
            return True

    def good(self) -> bool:
        """The server answered. True when it had not before."""
        with self._lock:
            recovered = self._wait > 0
            self._wait, self.reason = 0.0, ""
            return recovered

    def bad(self, reason: str) -> bool:
        """The server could not be reached. True when it was reached before."""
        with self._lock:
            was_good = not self._wait
            self._wait = self._first if was_good else min(self._longest, 2 * self._wait)
            self._until = time.monotonic() + self._wait * random.uniform(0.5, 1.0)
            self.reason = reason
            return was_good

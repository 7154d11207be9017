"""Health of one direction (reads or writes) of one tier: a small circuit breaker, pure of clocks and threads.

closed: used. open: not used until a back-off has passed. half-open: one probe at a time; its success closes.
"""

from __future__ import annotations

import threading
from enum import Enum


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Health:
    """failures: consecutive bad batches that open it. backoff: seconds to the first probe, doubled up to `longest`."""

    def __init__(self, failures: int = 3, backoff: float = 1.0, longest: float = 60.0) -> None:
        self.state = State.CLOSED
        self.reason = ""
        self.opened = 0
        self._limit, self._first, self._longest = failures, backoff, longest
        self._bad = 0
        self._wait = backoff
        self._until = 0.0
        self._lock = threading.Lock()

    def usable(self, now: float) -> bool:
        """Whether `allow` would say yes, without spending the probe on a question."""
        with self._lock:
            return self.state is State.CLOSED or now >= self._until

    def allow(self, now: float) -> bool:
        """Whether a batch may be sent at `now` (monotonic seconds). True for a probe, one at a time."""
        with self._lock:
            if self.state is State.CLOSED:
                return True
            if now < self._until:
                return False
            # A probe that never answers must not close the door for ever: the next one may go after a back-off.
            self.state, self._until = State.HALF_OPEN, now + self._wait
            return True

    def good(self) -> bool:
        """A batch ended well. True when that closed the breaker again."""
        with self._lock:
            self._bad = 0
            recovered = self.state is not State.CLOSED
            if recovered:
                self.state, self._wait, self.reason = State.CLOSED, self._first, ""
            return recovered

    def bad(self, now: float, reason: str) -> bool:
        """A batch failed at `now`. True when that opened the breaker."""
        with self._lock:
            self._bad += 1
            self.reason = reason
            if self.state is State.CLOSED and self._bad < self._limit:
                return False
            was_closed = self.state is State.CLOSED
            if not was_closed:
                self._wait = min(self._longest, self._wait * 2)
            self.state, self._until = State.OPEN, now + self._wait
            self.opened += was_closed
            return was_closed

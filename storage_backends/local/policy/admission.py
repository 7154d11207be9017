"""Admission: whether a page is worth a write, asked only when the tier is full (an empty disk must not look dead).

Belongs here: rules that look at one page. Does not belong here: what follows for its descendants (tier.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from storage_backends.local.policy.order import Ghosts, Key


class Admission(ABC):
    """reason: under which a refusal is counted."""

    reason = ""

    @abstractmethod
    def admit(self, key: Key, size: int, now: float) -> bool:
        """Whether this page may be written. size: bytes (or any one unit). now: seconds, never going back."""


class Always(Admission):
    reason = "never"

    def admit(self, key: Key, size: int, now: float) -> bool:
        return True


class SecondHit(Admission):
    """A page comes in when it is offered a second time while its first offer is still remembered.

    Source: the ghost list of 2Q (T. Johnson, D. Shasha, "2Q: a low overhead high performance buffer management
    replacement algorithm", VLDB '94), with nothing behind it.
    """

    reason = "second_hit"

    def __init__(self, memory: int) -> None:
        """memory: how many refused pages are remembered."""
        self._seen = Ghosts(memory)

    def admit(self, key: Key, size: int, now: float) -> bool:
        if self._seen.take(key):
            return True
        self._seen.add(key)
        return False


class WriteBudget(Admission):
    """So many bytes a day, as a token bucket: what a drive's endurance allows. burst: what a quiet time may save up."""

    reason = "write_budget"

    def __init__(self, per_day: float, burst: float) -> None:
        self._rate = per_day / 86_400
        self._burst = burst
        self._tokens = burst
        self._then: float | None = None

    def admit(self, key: Key, size: int, now: float) -> bool:
        if self._then is not None and now > self._then:  # a clock that went back earns nothing
            self._tokens = min(self._burst, self._tokens + (now - self._then) * self._rate)
        self._then = now if self._then is None else max(now, self._then)
        if self._tokens < size:
            return False
        self._tokens -= size
        return True

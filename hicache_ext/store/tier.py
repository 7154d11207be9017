"""One tier of the cascade: a backend with its name, its rules, its health, and what is known of how it answers.

Belongs here: state of one tier. Does not belong here: choosing between tiers (tiered.py), or storing pages (backends).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from hicache_ext.page import NAMESPACE_BYTES
from hicache_ext.store.health import Health
from storage_backends.base import Backend, KeyBatch, Outcome

logger = logging.getLogger(__name__)

_BAD = frozenset({Outcome.FAILED, Outcome.TIMEOUT})
_LIED_SECONDS = 60.0
_LIED_PAGES = 1 << 16
#: Weight of a new measurement. The last fifty or so count.
_NEW = 0.02
#: Variance of the sizes, relative to their mean squared, below which they say nothing of latency.
_ALIKE = 1e-3


class Writing(StrEnum):
    """How pages reach a tier that is not the first."""

    THROUGH = "through"  # every page that is written, soon after
    EVICTED = "evicted"  # those that the tier before is about to evict
    HITS = "hits"  # those that were read a number of times


class Promotion(StrEnum):
    """Which pages that are read from a tier are written to the first one."""

    ALWAYS = "always"
    SECOND_HIT = "second_hit"
    NEVER = "never"


class Recent:
    """A bounded memory of (namespace, key) pairs: who was met the longest ago is forgotten. Thread-safe.

    `since`: seconds after which a pair counts as forgotten; None: never.
    """

    def __init__(self, most: int, since: float | None = None) -> None:
        self._most, self._since = most, since
        self._met: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, namespace: bytes, key: bytes) -> int:
        """How often this pair was met, this time included."""
        name, now = namespace + key, time.monotonic()
        with self._lock:
            count, at = self._met.pop(name, (0, now))
            if self._since is not None and now - at > self._since:
                count = 0
            self._met[name] = (count + 1, now)
            while len(self._met) > self._most:
                self._met.popitem(last=False)
            return count + 1

    def drop(self, namespace: bytes, key: bytes) -> None:
        if self._met:
            with self._lock:
                self._met.pop(namespace + key, None)

    def clear(self, namespaces: Collection[bytes]) -> None:
        """Forget all pairs of these namespaces."""
        with self._lock:
            for name in [name for name in self._met if name[:NAMESPACE_BYTES] in namespaces]:
                del self._met[name]

    def has(self, namespace: bytes, key: bytes) -> bool:
        with self._lock:
            return self._is_fresh(namespace + key, time.monotonic())

    def flags(self, batch: KeyBatch) -> np.ndarray:
        """bool[n]: which of the batch's pages are remembered. Costs nothing while nothing is."""
        flags = np.zeros(len(batch), bool)
        if not self._met:
            return flags
        namespace, now = batch.namespace.digest, time.monotonic()
        with self._lock:
            for page in range(len(batch)):
                flags[page] = self._is_fresh(namespace + batch.key(page), now)
        return flags

    def _is_fresh(self, name: bytes, now: float) -> bool:
        found = self._met.get(name)
        return found is not None and (self._since is None or now - found[1] <= self._since)

    def __len__(self) -> int:
        return len(self._met)


class Cost:
    """What a page from this tier costs, as measured: seconds that a batch takes at least, and seconds a byte.

    A line through (bytes, seconds) of the batches read, by least squares, the older ones counting less and less.
    """

    def __init__(self) -> None:
        self.batch_seconds = 0.0
        self.byte_seconds = 0.0
        self._sums = np.zeros(5)
        self._lock = threading.Lock()

    def learn(self, size: int, seconds: float) -> None:
        """A batch of `size` bytes took so long."""
        if size <= 0:
            return
        with self._lock:
            self._sums = self._sums * (1 - _NEW) + np.array([1, size, seconds, size * size, size * seconds])
            n, x, y, xx, xy = self._sums.tolist()
            spread = n * xx - x * x
            slope = (n * xy - x * y) / spread if spread > _ALIKE * x * x else -1.0
            if slope <= 0 or y < slope * x:  # batches of one size, or noise: all of it is bandwidth
                slope = y / x
            self.byte_seconds, self.batch_seconds = slope, max(0.0, (y - slope * x) / n)

    def seconds(self, pages: int, page_bytes: int) -> float:
        """Estimated seconds for so many pages together; 0 before anything was measured."""
        return self.batch_seconds + self.byte_seconds * pages * page_bytes if pages else 0.0


@dataclass
class Tier:
    """reads, writes: health apart, since a full disk still serves what it holds.

    claimed: pages that a server said it had. lied: those that it did not give, or gave damaged: not asked for a while.
    """

    name: str
    backend: Backend
    reads: Health = field(default_factory=Health)
    writes: Health = field(default_factory=Health)
    writing: Writing = Writing.THROUGH
    hits: int = 2
    promotion: Promotion = Promotion.ALWAYS
    counts: Counter[str] = field(default_factory=Counter)
    cost: Cost = field(default_factory=Cost)
    lied: Recent = field(default_factory=lambda: Recent(_LIED_PAGES, _LIED_SECONDS))
    claimed: Recent = field(default_factory=lambda: Recent(_LIED_PAGES, _LIED_SECONDS))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def claims(self, namespace: bytes, key: bytes) -> bool:
        """Whether the tier said, not long ago, that it has this page; it always does so where it knows by itself."""
        return self.backend.capabilities.knows or self.claimed.has(namespace, key)

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counts[name] += number

    def account(self, what: str, outcomes: bytes | bytearray) -> None:
        """One batch's outcomes: counters, and health: a batch with no good page and a bad one is a bad batch."""
        health = self.reads if what == "read" else self.writes
        met = {outcome: number for outcome in Outcome if (number := outcomes.count(outcome))}
        with self._lock:
            for outcome, number in met.items():
                self.counts[f"{what}_{outcome.name.lower()}"] += number
        bad = [outcome for outcome in met if outcome in _BAD]
        if bad and Outcome.HIT not in met:
            if health.bad(time.monotonic(), f"{what}: {bad[0].name.lower()}"):
                logger.warning(
                    "tier %s: unhealthy for %ss after repeated failures (%s); requests go on without it",
                    self.name, what, bad[0].name.lower(),
                )  # fmt: skip
        elif Outcome.HIT in met and health.good():
            logger.warning("tier %s: healthy again for %ss", self.name, what)

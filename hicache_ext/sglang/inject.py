"""Faults on purpose, between the adapter and its tiers: for tests, also of a running server.

Set HICACHE_EXT_ADAPTER_FAULTS to a JSON object: {"failure": 0.2, "delay_ms": 50, "seed": 1}. `failure` is the chance
that a call fails (a lookup finds nothing, a read or write is FAILED), `delay_ms` the longest random delay before one.
What was injected is counted, so that a test can assert that it was.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from hicache_ext.page import Namespace
from hicache_ext.store import NO_TIER, TieredStore
from storage_backends.base import Completion, KeyBatch, Outcome, PageBatch

logger = logging.getLogger(__name__)

VARIABLE = "HICACHE_EXT_ADAPTER_FAULTS"


class FaultyStore:
    """A TieredStore that fails and dawdles. Has the methods that the adapter calls."""

    def __init__(
        self, store: TieredStore, failure: float = 0.0, delay_ms: float = 0.0, seed: int | None = None
    ) -> None:
        self.store = store
        self.failure, self.delay = failure, delay_ms / 1000
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def injected(self) -> dict[str, int]:
        """How often what was injected: "lookup_failed", "read_delayed", ..."""
        with self._lock:
            return dict(self._counts)

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        if self._fails("lookup"):
            return np.full(len(batch), NO_TIER, np.uint8)
        return self.store.lookup(batch)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return self.store.lookup_local(batch)  # the scheduler's: never delayed

    def read(self, batch: PageBatch, deadline: float | None = None) -> Completion:
        if self._fails("read"):
            return Completion.finished(len(batch), Outcome.FAILED)
        return self.store.read(batch, deadline)

    def write(self, batch: PageBatch) -> Completion:
        if self._fails("write"):
            return Completion.finished(len(batch), Outcome.FAILED)
        return self.store.write(batch)

    def remove(self, batch: KeyBatch) -> int:
        return self.store.remove(batch)

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        self.store.clear(namespaces)

    def register_memory(self, address: int, length: int) -> None:
        self.store.register_memory(address, length)

    def on_residency(self, listener: Any) -> None:
        self.store.on_residency(listener)

    def stats(self) -> Any:
        return self.store.stats()

    def close(self) -> None:
        self.store.close()

    def _fails(self, what: str) -> bool:
        with self._lock:
            delay = self._random.uniform(0, self.delay) if self.delay else 0.0
            failed = self._random.random() < self.failure
            self._counts[f"{what}_delayed"] += delay > 0
            self._counts[f"{what}_failed"] += failed
        if delay:
            time.sleep(delay)
        return failed


def wrap(store: TieredStore) -> TieredStore | FaultyStore:
    """`store`, or a FaultyStore around it when the environment asks for one."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return store
    options = json.loads(text)
    logger.warning("%s is set: faults are injected on purpose: %s", VARIABLE, options)
    return FaultyStore(store, **options)

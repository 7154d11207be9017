"""Faults on purpose, between the adapter and its tiers: for tests, also of a running server.

Set HICACHE_EXT_ADAPTER_FAULTS to a JSON object: {"failure": 0.2, "delay_ms": 50, "seed": 1}. `failure` is the chance
that a call fails (a lookup finds nothing, a read or write is FAILED), `delay_ms` the longest random delay before one.
Or to @PATH of a file with such an object: read again when it changes, so that a test can steer a server that runs; what
was injected is then also kept in `PATH.injected-PID.json`, which `injected_counts(PATH)` sums over processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.page import Namespace
from hicache_ext.store import NO_TIER, TieredStore
from hicache_ext.store.tier import Tier
from storage_backends.base import Completion, KeyBatch, MemoryKind, Outcome, PageBatch

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
        self._path: Path | None = None
        self._stamp = 0

    @property
    def injected(self) -> dict[str, int]:
        """How often what was injected: "lookup_failed", "read_delayed", ..."""
        with self._lock:
            return dict(self._counts)

    @property
    def tiers(self) -> list[Tier]:
        return self.store.tiers

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

    @property
    def reads_to_device(self) -> int | None:
        return self.store.reads_to_device

    @property
    def writes_from_device(self) -> bool:
        return self.store.writes_from_device

    def reach_device(self, ordinal: int) -> None:
        self.store.reach_device(ordinal)

    def register_memory(self, address: int, length: int, memory: MemoryKind = "host") -> None:
        self.store.register_memory(address, length, memory)

    def on_residency(self, listener: Any) -> None:
        self.store.on_residency(listener)

    def stats(self) -> Any:
        return self.store.stats()

    def close(self) -> None:
        self.store.close()

    def follow(self, path: Path) -> None:
        """Take the options from this file from now on, whenever it changes."""
        self._path = path
        self._reload()

    def _reload(self) -> None:
        assert self._path is not None
        with contextlib.suppress(OSError, ValueError):  # half written: look again at the next call
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                options = json.loads(self._path.read_text())
                self.failure, self.delay = options.get("failure", 0.0), options.get("delay_ms", 0.0) / 1000
                self._stamp = stamp

    def _fails(self, what: str) -> bool:
        with self._lock:
            if self._path is not None:
                self._reload()
            delay = self._random.uniform(0, self.delay) if self.delay else 0.0
            failed = self._random.random() < self.failure
            self._counts[f"{what}_delayed"] += delay > 0
            self._counts[f"{what}_failed"] += failed
            if self._path is not None and (delay or failed):
                report = Path(f"{self._path}.injected-{os.getpid()}.json")
                fresh = report.with_suffix(".new")
                fresh.write_text(json.dumps(self._counts))
                os.replace(fresh, report)  # whoever reads meanwhile finds a whole one
        if delay:
            time.sleep(delay)
        return failed


def wrap(store: TieredStore) -> TieredStore | FaultyStore:
    """`store`, or a FaultyStore around it when the environment asks for one."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return store
    logger.warning("%s is set: faults are injected on purpose: %s", VARIABLE, text)
    if text.startswith("@"):
        faulty = FaultyStore(store)
        faulty.follow(Path(text[1:]))
        return faulty
    return FaultyStore(store, **json.loads(text))


def injected_counts(path: str | Path) -> Counter[str]:
    """What was injected in every process that follows the file at `path`."""
    path = Path(path)
    total: Counter[str] = Counter()
    for report in path.parent.glob(f"{path.name}.injected-*.json"):
        total.update(json.loads(report.read_text()))
    return total

"""Counters of the adapter, and their translation to what SGLang's storage metrics take.

SGLang asks `get_stats()` every few steps when storage metrics are on, and takes what happened since it last asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from typing import Any

logger = logging.getLogger(__name__)

_KEPT = 4096


class AdapterStats:
    """Counts by name, and per batch pages and GB/s for SGLang. Thread-safe."""

    def __init__(self, per_batch: bool) -> None:
        """per_batch: whether SGLang will ever collect the per-batch numbers."""
        self._per_batch = per_batch
        self._counts: Counter[str] = Counter()
        self._batches: dict[str, deque[tuple[int, float]]] = {
            kind: deque(maxlen=_KEPT) for kind in ("prefetch", "backup")
        }
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def batch(self, kind: str, pages: int, size: int, since: float) -> None:
        """One transfer ("prefetch" or "backup") of good pages and their bytes, begun at `since` (monotonic seconds)."""
        took = max(time.monotonic() - since, 1e-9)
        with self._lock:
            self._counts[f"{kind}_pages"] += pages
            self._counts[f"{kind}_bytes"] += size
            if self._per_batch and pages:
                self._batches[kind].append((pages, size / took / 1e9))

    def once(self, kind: str, level: int, message: str, *args: Any) -> None:
        """Log this kind of thing once; count it always."""
        with self._lock:
            self._counts[kind] += 1
            new = kind not in self._said
            self._said.add(kind)
        if new:
            logger.log(level, message + " (said once; counted as %s)", *args, kind)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def storage_metrics(self) -> Any:
        """SGLang's StorageMetrics of what happened since the last call."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._lock:
            drained = {kind: list(batches) for kind, batches in self._batches.items()}
            for batches in self._batches.values():
                batches.clear()
        metrics = StorageMetrics()
        for pages, speed in drained["prefetch"]:
            metrics.prefetch_pgs.append(pages)
            metrics.prefetch_bandwidth.append(speed)
        for pages, speed in drained["backup"]:
            metrics.backup_pgs.append(pages)
            metrics.backup_bandwidth.append(speed)
        return metrics

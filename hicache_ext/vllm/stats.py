"""Counters of the connector in vLLM's own log lines and Prometheus metrics.

Belongs here: names and sums. Does not belong here: what is counted (scheduler, worker).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

#: Every count there is, and what it says.
HELP = {
    "queried_tokens": "Tokens that the tiers were asked for.",
    "hit_tokens": "Tokens that the tiers said they hold.",
    "load_hit": "Pages loaded.",
    "load_miss": "Pages that were gone when they were to be loaded; recomputed.",
    "load_corrupt": "Pages that failed their verification; recomputed.",
    "load_timeout": "Pages that did not arrive in time; recomputed.",
    "load_rejected": "Pages that were not loaded for want of memory; recomputed.",
    "load_failed": "Pages lost to an error of a disk or server; recomputed.",
    "load_bytes": "Bytes loaded.",
    "load_us": "Microseconds of loads, from start to end.",
    "load_batches": "Loads.",
    "load_past_host": "Pages loaded that came past host memory.",
    "load_again": "Pages that did not come past host memory and were read once more, through it.",
    "load_device_us": "Microseconds of copies to blocks on a GPU.",
    "save_hit": "Pages stored, or found there.",
    "save_miss": "Pages of a write that ended as a miss.",
    "save_corrupt": "Pages of a write that ended as corrupt.",
    "save_timeout": "Pages whose write was given up.",
    "save_rejected": "Pages that the first tier chose not to store.",
    "save_failed": "Pages not stored because of an error.",
    "save_no_room": "Pages not stored because too many were on their way.",
    "save_past_host": "Pages that were sent to be stored past host memory.",
    "save_given_up": "Pages not stored because their blocks were wanted, or the cache was reset, while they waited.",
    "save_bytes": "Bytes stored.",
    "save_us": "Microseconds of saves, from copy to stored.",
    "save_batches": "Saves.",
    "save_copy_us": "Microseconds of the forward's thread, copying blocks to be stored, or having them copied.",
    "save_device_us": "Microseconds of copies from blocks on a GPU.",
}


@dataclass
class Stats(KVConnectorStats):
    """data: counts by name, of one interval."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, number in other.data.items():
            self.data[name] = self.data.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        """What one log line says."""
        line: dict[str, int | float] = {
            name: number for name, number in self.data.items() if number and not name.endswith(("_us", "_bytes"))
        }
        for what in ("load", "save"):
            if us := self.data.get(f"{what}_us"):
                line[f"{what}_gb_per_s"] = round(self.data.get(f"{what}_bytes", 0) / us / 1e3, 3)
        return line

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PromStats(KVConnectorPromMetrics):
    """`vllm:hicache_ext_<count>_total`, a counter for each count and engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters = {
            name: {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }
            for name, text in HELP.items()
            for counter in [make(name=f"vllm:hicache_ext_{name}", documentation=text, labelnames=labelnames)]
        }  # fmt: skip

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, number in transfer_stats_data.items():
            if name in self._counters and number:
                self._counters[name][engine_idx].inc(number)

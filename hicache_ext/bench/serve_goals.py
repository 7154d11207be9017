"""What `bench serve` should show of our tiers: the goals, and what rows say of them.

Belongs here: goals over rows. Does not belong here: measuring, tables.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hicache_ext.bench.io_goals import Verdict
from hicache_ext.bench.serve_matrix import STORAGE, Tier
from hicache_ext.bench.serve_summary import computing, curves

#: A hit on a disk, without what a host hit takes, of its bytes at the disk's plain speed.
OVER_DISK = 1.2
#: A hit in memory that stands in for a fast array, of recomputing, from so many tokens on.
OF_RECOMPUTE, LONG = 0.4, 32_768


def goals(
    found: Sequence[Mapping[str, Any]], bounds: Sequence[Mapping[str, Any]], in_memory: Collection[str]
) -> Iterator[Verdict]:
    """The goals that these rows and disk bounds can speak of. in_memory: subjects whose storage lies there."""
    for bound in bounds:
        name = bound["subject"]
        if _ours(name) and name not in in_memory:
            disk_ms = bound["disk_ms"]
            beyond_host = bound["ttft_ms"] - (bound["disk_and_host_hit_ms"] - disk_ms)
            what = f"{name}, {bound['prompt_tokens']:,} tokens from the disk: a host hit and {{}} of plain reads"
            yield Verdict(what, beyond_host / disk_ms, OVER_DISK, False)
    measured = curves(found)
    for (name, tier, concurrency), curve in measured.items():
        if not (_ours(name) and tier == Tier.LOCAL and name in in_memory):
            continue
        against, alone = computing(measured, name, concurrency)
        for tokens in sorted(curve.keys() & alone.keys()):
            if tokens >= LONG:
                what = f"{name}, {tokens:,} tokens from memory in place of a disk: {{}} of computing them ({against})"
                yield Verdict(what, curve[tokens] / alone[tokens], OF_RECOMPUTE, False)
    hits = (Tier.HOST, *STORAGE)
    for name in dict.fromkeys(row["subject"] for row in found if _ours(row["subject"])):
        compared = [
            row for row in found if row["subject"] == name and row["tier"] in hits and row["identical"] is not None
        ]
        if compared:
            what = f"{name}: {{}} of {sum(row['requests'] for row in compared)} outputs differ from a device hit's"
            yield Verdict(what, sum(row["different"] for row in compared), 0, False)


def _ours(subject: str) -> bool:
    return subject.startswith("ours")

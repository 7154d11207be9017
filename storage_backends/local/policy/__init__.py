"""Which page goes when the local tier is full, and which page may come in: as plain Python, the models to test against.

Belongs here: orders of eviction, admission, and a tier that is nothing but those two and a capacity. They are written
to be read: a native index is property-tested against them, and `hicache-ext bench policy` replays traces over them.
Does not belong here: files, slots, locks (storage_backends.local), reading traces (hicache_ext.bench).

All orders are suffix first. An engine can use a page only with all its ancestors, so a page with resident children is
never a victim, and what is said of a page is said of its resident ancestors as well.
"""

from __future__ import annotations

from collections.abc import Callable

from storage_backends.local.policy.admission import Admission, Always, SecondHit, WriteBudget
from storage_backends.local.policy.order import Credit, Fifo, Lru, Order
from storage_backends.local.policy.s3fifo import S3Fifo
from storage_backends.local.policy.tier import Tier

#: name -> order for a capacity in pages.
ORDERS: dict[str, Callable[[int], Order]] = {"lru": Lru, "fifo": Fifo, "s3fifo": S3Fifo, "credit": Credit}
DEFAULT = "credit"

__all__ = [
    "DEFAULT",
    "ORDERS",
    "Admission",
    "Always",
    "Credit",
    "Fifo",
    "Lru",
    "Order",
    "S3Fifo",
    "SecondHit",
    "Tier",
    "WriteBudget",
]

"""Pages in device memory: which tier may read them and write them, past the host.

Belongs here: the rule, and such a read. Does not belong here: how a tier reaches a device (storage_backends), or whose
memory that is (adapters).

Whatever the store does with pages besides handing them on (promotion, copies for other tiers, following another's
flight) it does in host memory. So a page goes past the host only where none of that is called for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from hicache_ext.store.behind import Behind
from hicache_ext.store.tier import Promotion, Tier, Writing
from storage_backends.base import Completion, Outcome, PageBatch

logger = logging.getLogger(__name__)


def reading_tier(tiers: Sequence[Tier]) -> int | None:
    """Number of the tier whose pages can be read into device memory; None where there is none now."""
    for index, tier in enumerate(tiers):
        if "device" in tier.backend.capabilities.memory:
            promoted = index and tier.promotion is not Promotion.NEVER
            wanted = any(other.writing is Writing.HITS for other in tiers[1:] if other is not tier)
            return None if promoted or wanted else index
    return None


def can_write(tiers: Sequence[Tier]) -> bool:
    """Whether pages in device memory can be written: the first tier takes them, and no other wants them as well."""
    through = any(tier.writing is Writing.THROUGH for tier in tiers[1:])
    return "device" in tiers[0].backend.capabilities.memory and not through


def read(tiers: Sequence[Tier], behind: Sequence[Behind], batch: PageBatch) -> Completion:
    """From the one tier that can; what it does not have is a miss. ValueError: there is none."""
    index = reading_tier(tiers)
    if index is None:
        raise ValueError("no tier reads into device memory here, see reads_to_device")
    tier, since, namespace = tiers[index], time.monotonic(), batch.namespace
    if not tier.reads.allow(since):
        return Completion.finished(len(batch), Outcome.MISS)
    try:
        sent = tier.backend.read(batch)
    except Exception:
        # A backend may raise only for a programming error; that too must not cost a request.
        logger.exception("%s: read raised; the pages count as failed", tier.name)
        sent = Completion.finished(len(batch), Outcome.FAILED)

    def arrived(done: Completion) -> None:
        if not done.cancelled.is_set():
            tier.account("read", done.outcomes)
        if good := done.outcomes.count(Outcome.HIT):
            tier.cost.learn(good * namespace.layout.payload_bytes, time.monotonic() - since)
        for page, outcome in enumerate(done.outcomes if behind else b""):
            if outcome in (Outcome.MISS, Outcome.CORRUPT):
                tier.lied.add(namespace.digest, batch.key(page))
                behind[index].forget(namespace.digest, batch.key(page))

    sent.on_done(arrived)
    return sent

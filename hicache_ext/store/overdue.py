"""Reads that a caller with a deadline of its own has given up: the tiers' health must know, though the reads go on.

Belongs here: that one report. Does not belong here: deadlines that the store keeps itself (staging).
"""

from __future__ import annotations

import numpy as np

from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.tiered import NO_TIER, TieredStore
from storage_backends.base import KeyBatch, Outcome


def account_overdue(store: TieredStore | FaultyStore, batch: KeyBatch) -> None:
    """These pages did not arrive in time. From memory only."""
    found = store.lookup_local(batch)
    for index in np.unique(found[found != NO_TIER]).tolist():
        store.tiers[index].account("read", bytes([Outcome.TIMEOUT]) * int((found == index).sum()))

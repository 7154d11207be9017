"""Memory of the store's own that tiers are told of: what lies there then reaches them without one more copy.

Belongs here: who is told, and when. Does not belong here: the memory (copies.py), or what telling does (backends).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from hicache_ext.store.copies import CopyBudget
from hicache_ext.store.tier import Tier


class Registered:
    """Budgets of one store. shared: other processes can map memory that anybody is told of."""

    def __init__(self, tiers: Sequence[Tier], shared: bool) -> None:
        self._tiers = [tier for tier in tiers if tier.backend.bounces]
        self._shared = shared
        self._telling = ThreadPoolExecutor(1, "hicache-register") if self._tiers else None

    def budget(self, most_bytes: int, most_pages: int | None = None, only: Tier | None = None) -> CopyBudget:
        """Copies for all tiers, or for only this one; tiers that do not ask to be told are not."""
        tiers = [tier for tier in self._tiers if only is None or tier is only]
        if not tiers:
            return CopyBudget(most_bytes, most_pages)
        return CopyBudget(most_bytes, most_pages, partial(self._tell, tiers), self._shared)

    def close(self) -> None:
        if self._telling is not None:
            self._telling.shutdown(wait=False, cancel_futures=True)

    def _tell(self, tiers: list[Tier], address: int, length: int) -> None:
        """Later: pages there are copied once more until they know it."""
        assert self._telling is not None
        with suppress(RuntimeError):  # closed meanwhile
            for tier in tiers:
                self._telling.submit(tier.backend.register_memory, address, length)

"""Watches a store's tiers and lets an announcer know what they hold.

Belongs here: the store's reports to the announcer, and asking, a slice at a time, for what nobody reports. Does not
belong here: what must be said (announcer.py), the thread on which the slices run, an engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from hicache_ext.events.announcer import Announcer
from hicache_ext.events.model import LoadCost, Medium
from hicache_ext.store.health import State
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.tier import Tier
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Notes, Residency

#: Pages that are looked over in a turn.
_LOOKED_OVER = 1024


class Watch:
    """Between a store and an announcer, from now to `close`. The store must not have served pages before.

    served: digest of the namespace whose pages can be had, None while there is none; pages of others are not announced.
    wake: called when there may be something to say. costs: whether stores say what loading costs, where it is measured.
    """

    def __init__(
        self,
        store: TieredStore | FaultyStore,
        announcer: Announcer,
        served: Callable[[], bytes | None],
        wake: Callable[[], None],
        costs: bool = False,
    ) -> None:
        self.store = store
        self.namespace: bytes | None = None
        """The one served last."""
        self._announcer, self._served, self._wake, self._costs = announcer, served, wake, costs
        self._numbers: dict[int, int | None] = {}  # by tier; None where its medium is not announced
        self._names: list[bytes] = []
        self._closed = False
        self._lock = threading.Lock()
        store.on_residency(self.hear)

    def close(self) -> None:
        """Nothing of the store can be had any more."""
        with self._lock:
            self._closed = True
            numbers = [number for number in self._numbers.values() if number is not None]
        for number in numbers:
            self._announcer.drop(number)

    def turn(self) -> bool:
        """Ask for what nobody reports, a slice of it; whether more of it is there now."""
        namespace = self._served()
        if namespace is not None:
            self.namespace = namespace
        self._announcer.serve(() if namespace is None else (namespace,))
        more = False
        tiers = self.store.tiers
        for index, tier in enumerate(tiers):
            number = self._numbers.get(index)
            if number is not None:
                self._announcer.show(number, tier.reads.state is State.CLOSED)
                if self._costs:
                    self._announcer.price(number, _cost_of(tier))
            if namespace is not None and not self._closed:
                more |= tier.backend.tell(namespace)
        if not self._names:
            self._names = self._announcer.names()
        looked, self._names = self._names[-_LOOKED_OVER:], self._names[:-_LOOKED_OVER]
        for index, tier in enumerate(tiers):
            number = self._numbers.get(index)
            if number is not None and not self._closed:
                for space, keys in self._announcer.held(number, looked):
                    tier.backend.recheck(space, keys)
        return more

    def hear(self, index: int, change: Residency, namespace: bytes, keys: bytes, notes: Notes | None) -> None:
        """A tier, by its number, has gained or lost these pages: this store's report, or that of another process."""
        with self._lock:
            if self._closed:
                return
            if index not in self._numbers:
                medium = self.store.tiers[index].backend.capabilities.medium
                announced = medium in (Medium.DISK, Medium.EXTERNAL)
                self._numbers[index] = self._announcer.add(medium) if announced else None
            number = self._numbers[index]
        if number is None:
            return
        if change is Residency.STORED:
            self._announcer.stored(number, namespace, keys, notes)
        else:
            self._announcer.removed(number, namespace, keys)
        self._wake()


def _cost_of(tier: Tier) -> LoadCost | None:
    """As measured by the reads so far, to two digits, so that it does not change with each of them."""
    if tier.cost.byte_seconds <= 0:
        return None
    return LoadCost(float(f"{1 / tier.cost.byte_seconds:.1e}"), float(f"{tier.cost.batch_seconds:.1e}"))

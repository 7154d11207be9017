"""The two ways between device pools and tiers: through slots in host memory, and through slots on the device.

Belongs here: memory and copies that go together, and which of the two pages take. Does not belong here: slots and
copies themselves, how much of it there is, or when pages move (adapters).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hicache_ext.cuda import CopyError, CudaUnavailable
from hicache_ext.device.copies import Copies
from hicache_ext.device.slots import PageSlots
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from storage_backends.base import KeyBatch

logger = logging.getLogger(__name__)

Store = TieredStore | FaultyStore


@dataclass(frozen=True)
class Side:
    """Slots by pool, and the copies between them and the pools."""

    staging: Mapping[str, PageSlots]
    copies: Copies

    def close(self) -> None:
        for staging in self.staging.values():
            staging.close()


@dataclass(frozen=True)
class Sides:
    """Of one direction. device: None where pages never go past the host."""

    host: Side
    device: Side | None = None

    @property
    def all(self) -> list[Side]:
        return [self.host] if self.device is None else [self.device, self.host]

    @property
    def ways(self) -> str:
        """How pages are copied, the preferred way first; for people."""
        return "; else ".join(side.copies.name for side in self.all)

    def past_host(self, store: Store, batch: KeyBatch) -> NDArray[np.bool_]:
        """bool[n]: which of these pages can come past the host: those in the tier that reaches the device. From memory
        only."""
        tier = None if self.device is None else store.reads_to_device
        return np.zeros(len(batch), bool) if tier is None else store.lookup_local(batch) == tier

    def for_read(self, store: Store, batch: KeyBatch) -> Side:
        """Through which slots these pages come together."""
        if self.device is None or not self.past_host(store, batch).all():
            return self.host
        return self.device

    def for_write(self, store: Store) -> Side:
        return self.device if self.device is not None and store.writes_from_device else self.host

    def part(self, pool: str) -> int:
        """Pages that are moved at once, whichever way they go."""
        return min(side.staging[pool].part for side in self.all)

    def close(self) -> None:
        for side in self.all:
            side.close()


def on_device(store: Store, ordinal: int, make: Callable[[], Side], who: str) -> tuple[Side | None, Side | None]:
    """For loads and for saves, in this device's memory, where a tier reaches it now; None: not so, or no room, which is
    said. make: one of them; CudaUnavailable, CopyError: it cannot be had. who: for people."""
    store.reach_device(ordinal)
    if not (store.writes_from_device or store.reads_to_device is not None):
        return None, None
    try:
        sides = make(), make()
    except (CudaUnavailable, CopyError) as error:
        logger.warning("%s: pages go through host memory, not straight to the device: %s", who, error)
        return None, None
    for side in sides:
        for slots in side.staging.values():
            store.register_memory(slots.address, slots.size, "device")
    return sides

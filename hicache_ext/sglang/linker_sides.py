"""Slots between device pools and tiers: in host memory, and on the device for a tier that reaches that.

Belongs here: memory and copies that go together, how much of it there is, which of the two pages take. Does not belong
here: slots and copies themselves (hicache_ext.device), or when pages move (linker_loads, linker_offloads).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from hicache_ext.cuda import CopyError, CudaUnavailable
from hicache_ext.device.copies import BlockCopies, Copies, choose
from hicache_ext.device.slots import DeviceStaging, PageSlots, Staging
from hicache_ext.sglang.linker_planes import DevicePool
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from storage_backends.base import KeyBatch

logger = logging.getLogger(__name__)

#: Pages of each pool that have room in the memory of one direction at the least.
_LEAST_SLOTS = 2

Store = TieredStore | FaultyStore
Pools = Mapping[str, DevicePool]


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

    def for_read(self, store: Store, batch: KeyBatch) -> Side:
        """Through which slots these pages come: past the host where all of them lie in the tier that can do that."""
        if self.device is None:
            return self.host
        tier = store.reads_to_device
        past = tier is not None and bool((store.lookup_local(batch) == tier).all())
        return self.device if past else self.host

    def for_write(self, store: Store) -> Side:
        return self.device if self.device is not None and store.writes_from_device else self.host

    def part(self, pool: str) -> int:
        """Pages that are moved at once, whichever way they go."""
        return min(side.staging[pool].part for side in self.all)

    def close(self) -> None:
        for side in self.all:
            side.close()


def is_on_gpu(pools: Pools) -> bool:
    return any(plane.buffer.device.type == "cuda" for pool in pools.values() for plane in pool.planes)


def host_sides(pools: Pools, total: int) -> tuple[Side, Side]:
    """For loads and for offloads, in `total` bytes of host memory together."""
    on_gpu = is_on_gpu(pools)
    staging = [{name: _host_slots(pool, pools, total // 2, on_gpu) for name, pool in pools.items()} for _ in range(2)]
    incoming, outgoing = (Side(slots, copies) for slots, copies in zip(staging, choose(pools, staging), strict=True))
    return incoming, outgoing


def _host_slots(pool: DevicePool, pools: Pools, size: int, on_gpu: bool) -> Staging:
    made = Staging(pool.layout, _slots(pool, pools, size), on_gpu)
    if on_gpu and made.not_pinned:
        logger.warning(
            "hicache_ext linker: staging memory of pool %s (%s bytes a page) is not pinned (%s): copies go "
            "through the driver's own, and wait", pool.name, pool.layout.payload_bytes, made.not_pinned,
        )  # fmt: skip
    return made


def device_sides(pools: Pools, store: Store, total: int) -> tuple[Side | None, Side | None]:
    """As host_sides, in device memory, where a tier reaches it now; None: not so, or no room, which is said."""
    if not is_on_gpu(pools):
        return None, None
    device = next(plane.buffer.device for pool in pools.values() for plane in pool.planes)
    store.reach_device(device.index or 0)
    if not (store.writes_from_device or store.reads_to_device is not None):
        return None, None
    sides: list[Side] = []
    try:
        for _ in range(2):
            staging = {
                name: DeviceStaging(pool.layout, _slots(pool, pools, total // 2), device.index or 0)
                for name, pool in pools.items()
            }
            sides.append(Side(staging, BlockCopies(pools, staging, device)))
    except (CudaUnavailable, CopyError) as error:
        logger.warning("hicache_ext linker: pages go through host memory, not straight to the device: %s", error)
        return None, None
    for side in sides:
        for slots in side.staging.values():
            store.register_memory(slots.address, slots.size, "device")
    return sides[0], sides[1]


def _slots(pool: DevicePool, pools: Pools, size: int) -> int:
    """Pages of this pool in `size` bytes for all of them, shared out by the size of pages."""
    whole = sum(one.layout.payload_bytes for one in pools.values())
    return min(pool.pages, max(_LEAST_SLOTS, size // max(1, whole)))

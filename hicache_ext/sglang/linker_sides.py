"""The linker's slots between device pools and tiers: how much memory, shared out by pool.

Belongs here: sizes, and what is said when memory is not what it should be. Does not belong here: slots, copies and
which of them pages take (hicache_ext.device), or when pages move (linker_loads, linker_offloads).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from hicache_ext.device.copies import BlockCopies, choose
from hicache_ext.device.sides import Side, Store, on_device
from hicache_ext.device.slots import DeviceStaging, Staging
from hicache_ext.sglang.linker_planes import DevicePool

logger = logging.getLogger(__name__)

#: Pages of each pool that have room in the memory of one direction at the least.
_LEAST_SLOTS = 2

Pools = Mapping[str, DevicePool]


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

    def make() -> Side:
        staging = {
            name: DeviceStaging(pool.layout, _slots(pool, pools, total // 2), device.index or 0)
            for name, pool in pools.items()
        }
        return Side(staging, BlockCopies(pools, staging, device))

    return on_device(store, device.index or 0, make, "hicache_ext linker")


def _slots(pool: DevicePool, pools: Pools, size: int) -> int:
    """Pages of this pool in `size` bytes for all of them, shared out by the size of pages."""
    whole = sum(one.layout.payload_bytes for one in pools.values())
    return min(pool.pages, max(_LEAST_SLOTS, size // max(1, whole)))

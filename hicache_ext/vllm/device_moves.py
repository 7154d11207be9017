"""Pages between blocks on a device and the store: slots, two threads, and the copies between slots and blocks.

Belongs here: putting these together. Does not belong here: loading (device_loads), saving (device_saves), addresses
(device_blocks), which slots pages go through (hicache_ext.device.sides).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from hicache_ext.device.copies import BlockCopies, choose
from hicache_ext.device.sides import Side, Sides, on_device
from hicache_ext.device.slots import PageSlots
from hicache_ext.page import Namespace
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.vllm.device_blocks import DeviceBlocks
from hicache_ext.vllm.device_loads import DeviceLoads
from hicache_ext.vllm.device_saves import DeviceSaves
from hicache_ext.vllm.moves import Loaded, Saved
from hicache_ext.vllm.pages import Pages

logger = logging.getLogger(__name__)


class DeviceMoves:
    """As Moves. copies: what copies, for people, the preferred way first."""

    def __init__(
        self, store: TieredStore | FaultyStore, blocks: Sequence[DeviceBlocks], spaces: Sequence[Namespace],
        load_bytes: int, save_bytes: int, device_bytes: int, count: Callable[[str, int], None],
        mark: Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        """blocks, spaces: of each group. load_bytes, save_bytes: pinned memory for each direction. device_bytes: of the
        device, for both, where a tier reaches that. count: of a statistic by name. mark: an event (`synchronize`) of
        all that the device was given so far, by this thread."""
        device = blocks[0].planes[0].buffer.device
        self._count, self._mark = count, mark or _marker(device)
        named = {str(group): one for group, one in enumerate(blocks)}
        layouts = {str(group): space.layout for group, space in enumerate(spaces)}

        def by_units(staging: dict[str, Any]) -> dict[str, Any]:
            return {name: named[name].slots(slots) for name, slots in staging.items()}

        pinned = [
            {
                name: one.staging(layouts[name], size // len(blocks), device.type == "cuda")
                for name, one in named.items()
            }
            for size in (load_bytes, save_bytes)
        ]
        host = [
            Side(slots, copies)
            for slots, copies in zip(pinned, choose(named, list(map(by_units, pinned))), strict=True)
        ]
        every = [slots for staging in pinned for slots in staging.values()]
        if device.type == "cuda" and (why := next((slots.not_pinned for slots in every if slots.not_pinned), "")):
            logger.warning(
                "hicache_ext: memory for pages on their way is not pinned (%s): copies go through the driver's own, "
                "and wait", why,
            )  # fmt: skip
        for slots in every:
            store.register_memory(slots.address, slots.size)

        @cache
        def room() -> int:
            free = _free(device)  # vLLM captures its CUDA graphs after this, and does not start without room for them
            if device_bytes > free // 4:
                logger.warning(
                    "hicache_ext: device_staging_bytes = %s is more than a quarter of the %s bytes that vLLM left "
                    "free, which its CUDA graphs may need: %s are taken. For more, lower --gpu-memory-utilization",
                    device_bytes, free, free // 4,
                )  # fmt: skip
            return min(device_bytes, free // 4)

        def past() -> Side:
            ordinal, each = device.index or 0, room() // 2 // len(blocks)
            staging: dict[str, PageSlots] = {
                name: one.device_staging(layouts[name], each, ordinal) for name, one in named.items()
            }
            return Side(staging, BlockCopies(named, by_units(staging), device))

        wanted = device.type == "cuda" and device_bytes
        reached = on_device(store, device.index or 0, past, "hicache_ext") if wanted else (None, None)
        self._sides = [Sides(*pair) for pair in zip(host, reached, strict=True)]
        self.copies = self._sides[0].ways
        self._loads = DeviceLoads(store, blocks, self._sides[0], count)
        self._saves = DeviceSaves(store, blocks, self._sides[1], count)

    def load(self, pages: Pages, space: Namespace, deadline: float, loaded: Loaded) -> None:
        # A save of these blocks may be under way, and kernels of whoever had them before.
        self._saves.make_way(pages.blocks)
        self._loads.put(pages, space, self._mark(), deadline, loaded)

    def save(self, pages: Sequence[Pages], spaces: Sequence[Namespace], saved: Saved) -> int:
        since, sent = time.monotonic(), 0
        ready = self._mark()
        for group, some in groupby(sorted(pages, key=lambda one: one.group), lambda one: one.group):
            found = list(some)
            try:
                sent += self._saves.put(found, spaces[group], ready, saved)
            except Exception:
                logger.exception("hicache_ext: pages could not be stored")
                self._count("save_failed", sum(one.count for one in found))
        self._count("save_copy_us", int((time.monotonic() - since) * 1e6))
        return sent

    def make_way(self, blocks: Sequence[int]) -> None:
        self._saves.make_way(blocks)

    @property
    def lent(self) -> int:
        """Slots that a tier may still touch."""
        return sum(slots.lent for sides in self._sides for side in sides.all for slots in side.staging.values())

    def close(self) -> None:
        self._loads.close()
        self._saves.close()
        for sides in self._sides:
            sides.close()


def objection(vllm_config: Any) -> str:
    """Why blocks on a device cannot be used under this configuration, and the fix; "" where they can."""
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        # Between two steps, with pages on their way; the device would meet addresses that are nobody's.
        return (
            "enable_sleep_mode: vLLM's sleep discards blocks that pages may be copied from or to at that moment. "
            "Fix: start vLLM without --enable-sleep-mode"
        )
    return ""


def _free(device: Any) -> int:
    """Bytes of the device that nobody has taken."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


class _Nothing:
    """Of a device that is host memory: whatever was asked of it has happened."""

    def synchronize(self) -> None: ...


def _marker(device: Any) -> Callable[[], Any]:
    if device.type == "cpu":
        return _Nothing
    import torch

    module = torch.get_device_module(device)

    def mark() -> Any:
        event = module.Event(blocking=True)  # whoever waits leaves the processor alone
        event.record(module.current_stream(device))
        return event

    return mark

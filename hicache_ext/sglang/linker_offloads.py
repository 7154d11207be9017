"""Offloads: pages of device pools on their way to the tiers, on one thread of their own.

Belongs here: the order in which they end, how much may wait, when a tier is not waited for. Does not belong here: what
is offloaded (linker), or how pages are copied (hicache_ext.device).

SGLang keeps the device pages of an offload locked until its result was taken, and takes results in the order of the
calls. So: device pages are read once, into slots, before the result; and what would lock too much of the pool is
turned down at once, with a result like any other, since every rank must see as many results in the same order.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hicache_ext.device.copies import Part
from hicache_ext.device.sides import Sides
from hicache_ext.device.slots import PageSlots
from hicache_ext.page import Namespace, chain_parents, pack_keys
from hicache_ext.sglang.linker_planes import DevicePool
from hicache_ext.sglang.stats import AdapterStats
from hicache_ext.store import NO_TIER, TieredStore
from hicache_ext.store.inject import FaultyStore
from storage_backends.base import Completion, KeyBatch, Outcome

logger = logging.getLogger(__name__)

#: Of a pool's pages, so many may be locked by offloads that wait.
LOCKED_SHARE = 0.25
#: Seconds that a tier has for what it was given, and that a page waits for a slot.
WRITE_SECONDS = 30.0
#: Seconds that a flush waits for offloads that have not read their device pages yet.
RESET_SECONDS = 5.0


@dataclass
class Leaving:
    """Pages of one pool. space: None, they may not be stored. indices: SGLang's device indices of them."""

    space: Namespace | None
    keys: list[str]
    indices: Any


@dataclass
class Offload:
    """result: None while it is under way. until: after which it counts as failed, set once the device is not read any
    more."""

    leaving: dict[str, Leaving]
    ready: list[Any]
    pages: dict[str, int] = field(default_factory=dict)
    result: bool | None = None
    until: float | None = None
    open: int = 1
    good: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)


class Offloads:
    """Runs offloads in the order in which they are put."""

    def __init__(
        self, store: TieredStore | FaultyStore, pools: Mapping[str, DevicePool], sides: Sides, counters: AdapterStats
    ) -> None:
        self._store, self._pools, self._sides = store, pools, sides
        self._counters = counters
        self._ordered: deque[Offload] = deque()
        self._dropping = False
        self._queue: queue.Queue[Offload | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hicache-linker-offload", daemon=True)
        self._thread.start()

    # --- the scheduler's thread

    def put(self, offload: Offload) -> None:
        offload.pages = {name: len(leaving.keys) for name, leaving in offload.leaving.items()}
        full = any(self._is_full(name, pages) for name, pages in offload.pages.items())
        self._ordered.append(offload)
        if full:
            self._counters.add("offload_refused_full")
            self._end(offload, False)
        elif any(leaving.space is None for leaving in offload.leaving.values()):
            self._counters.add("offload_refused_frozen")
            self._end(offload, False)
        else:
            self._queue.put(offload)

    def _is_full(self, name: str, pages: int) -> bool:
        """Whether so many pages more would lock too much of a pool. A single offload may have any size."""
        locked = sum(offload.pages.get(name, 0) for offload in self._ordered)
        return bool(locked) and locked + pages > LOCKED_SHARE * self._pools[name].pages

    def skip(self, result: bool) -> None:
        """One more result in the order, with nothing to do for it."""
        self._ordered.append(Offload({}, [], result=result))

    def completed(self) -> int:
        """How many of the oldest offloads are over."""
        now = time.monotonic()
        for number, offload in enumerate(self._ordered):
            if offload.result is None and offload.until is not None and now > offload.until:
                self._counters.once("offload_late", logging.WARNING, "a tier did not end an offload in time")
                self._end(offload, False)
            if offload.result is None:
                return number
        return len(self._ordered)

    def pop(self) -> bool:
        return bool(self._ordered.popleft().result)

    def reset(self) -> None:
        """No device page is read any more, and no result is left. What waits has a moment left, and is dropped then."""
        until = time.monotonic() + RESET_SECONDS
        while self._queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.001)
        self._dropping = True
        try:
            self._queue.join()
        finally:
            self._dropping = False
        self._ordered.clear()

    def close(self) -> None:
        self.reset()
        self._queue.put(None)
        self._thread.join()

    # --- the thread

    def _work(self) -> None:
        while (offload := self._queue.get()) is not None:
            try:
                self._run(offload)
            except Exception as error:
                offload.good = False
                self._counters.once(
                    f"error_offload_{type(error).__name__}", logging.ERROR, "an offload failed: %r", error
                )
            finally:
                offload.until = time.monotonic() + WRITE_SECONDS
                self._ended(offload)
                self._queue.task_done()
        self._queue.task_done()

    def _run(self, offload: Offload) -> None:
        for event in offload.ready:
            event.synchronize()
        for name, leaving in offload.leaving.items():
            if leaving.keys:
                self._leave(offload, name, leaving)

    def _leave(self, offload: Offload, name: str, leaving: Leaving) -> None:
        keys = pack_keys(leaving.keys)
        space = leaving.space
        assert space is not None
        parents = chain_parents(keys, None)
        whole = KeyBatch(space, keys, parents)
        absent = np.flatnonzero(self._store.lookup_local(whole) == NO_TIER)
        self._counters.add("offload_resident", len(whole) - len(absent))
        if not len(absent):
            return
        pages = self._pools[name].page_numbers(leaving.indices)
        if len(pages) != len(whole):
            raise ValueError(f"{len(whole)} keys of pool {name} for {len(pages)} pages")
        side = self._sides.for_write(self._store)
        staging = side.staging[name]
        for first in range(0, len(absent), staging.part):
            chosen = absent[first : first + staging.part]
            slots = self._slots(staging, len(chosen))
            if slots is None:
                offload.good = False
                self._counters.add("offload_dropped", len(absent) - first)
                return
            try:
                side.copies.store(Part(name, np.array(slots, np.int64), pages[chosen]))
                part = whole.only(chosen.tolist())
                done = self._store.write(staging.batch(space, part.keys, part.parents, slots))
            except BaseException:
                staging.give(slots)
                raise
            with offload.lock:
                offload.open += 1
            done.on_done(lambda done, slots=slots: self._written(offload, staging, slots, done))  # type: ignore[misc]

    def _slots(self, staging: PageSlots, count: int) -> list[int] | None:
        """None: no slots come free, or a reset does not want to wait for them."""
        until = time.monotonic() + WRITE_SECONDS
        while not self._dropping and time.monotonic() < until:
            slots = staging.take(count, 0.1)
            if slots is not None:
                return slots
        return None

    def _written(self, offload: Offload, staging: PageSlots, slots: list[int], done: Completion) -> None:
        staging.give(slots)
        outcomes = bytes(done.outcomes)
        for outcome in Outcome:
            if count := outcomes.count(outcome):
                self._counters.add(f"offload_{outcome.name.lower()}", count)
        if outcomes.count(Outcome.HIT) < len(outcomes):
            offload.good = False
        self._ended(offload)

    def _ended(self, offload: Offload) -> None:
        with offload.lock:
            offload.open -= 1
            over = offload.open == 0
        if over:
            self._end(offload, offload.good)

    def _end(self, offload: Offload, good: bool) -> None:
        with offload.lock:
            if offload.result is None:
                offload.result = good
                offload.leaving = {}

"""Loads into blocks on a device: from the tiers into slots, and from the slots into the blocks, on one thread.

Belongs here: parts, deadlines, what becomes of late and bad pages. Does not belong here: which pages (scheduler), or
how they are copied (hicache_ext.device).

    read     the tiers fill slots, as many parts of a load at a time as there are slots for; each page is verified there
    copy     a part as soon as it has arrived, once the device is done with what used its blocks before

Only this thread writes into blocks, and it does so before it says that a load has ended. A load ends at its deadline:
a tier that is late keeps its slots then, and has never known a block.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.device.copies import Copies, Part
from hicache_ext.page import KEY_BYTES, Namespace, chain_parents
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.overdue import account_overdue
from hicache_ext.vllm.device_blocks import DeviceBlocks, Numbers, UnitSlots
from hicache_ext.vllm.moves import Loaded
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Completion, KeyBatch, Outcome

logger = logging.getLogger(__name__)

#: Seconds after which a load that waits for slots looks again.
_LOOK_SECONDS = 0.05

Count = Callable[[str, int], None]


@dataclass
class _Load:
    """ready: an event of the device after which the blocks may be written. open: pages without an outcome."""

    pages: Pages
    blocks: DeviceBlocks
    space: Namespace
    ready: Any
    deadline: float
    ended: Loaded
    outcomes: bytearray
    open: int

    # A load has up to a hundred parts, so: once.

    @cached_property
    def units(self) -> Numbers:
        return self.blocks.units(self.pages)

    @cached_property
    def wanted(self) -> NDArray[np.bool_]:
        return self.blocks.wanted(self.pages)


@dataclass(eq=False)
class _Part:
    """Some pages of a load: from number `first` on."""

    load: _Load
    first: int
    last: int
    slots: list[int] = field(default_factory=list)
    read: Completion | None = None
    late: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def keys(self) -> bytes:
        return self.load.pages.keys[self.first * KEY_BYTES : self.last * KEY_BYTES]

    @property
    def parents(self) -> bytes:
        pages, start = self.load.pages, self.first * KEY_BYTES
        return chain_parents(self.keys, pages.keys[start - KEY_BYTES : start] if start else pages.parent)


class DeviceLoads:
    """One for each worker."""

    def __init__(
        self, store: TieredStore | FaultyStore, blocks: Sequence[DeviceBlocks], slots: Sequence[UnitSlots],
        copies: Copies, count: Count,
    ) -> None:  # fmt: skip
        """blocks, slots: of each group. count: of a statistic by name."""
        self._store, self._blocks, self._slots, self._copies, self._count = store, blocks, slots, copies, count
        self._queue: queue.SimpleQueue[_Load | _Part | None] = queue.SimpleQueue()
        self._waiting: deque[_Part] = deque()
        self._flying: set[_Part] = set()
        self._thread = threading.Thread(target=self._work, name="hicache-vllm-load", daemon=True)
        self._thread.start()

    def put(self, pages: Pages, space: Namespace, ready: Any, deadline: float, ended: Loaded) -> None:
        """Load these pages. Never blocks."""
        blocks = self._blocks[pages.group]
        self._queue.put(_Load(pages, blocks, space, ready, deadline, ended, bytearray(pages.count), pages.count))

    def close(self) -> None:
        """The thread is over when this returns; what is still on its way has ended as late."""
        self._queue.put(None)
        self._thread.join()

    # --- the thread

    def _work(self) -> None:
        while True:
            try:
                told = self._queue.get(timeout=self._patience())
            except queue.Empty:
                told = _NOTHING
            if told is None:
                for part in [part for part in (*self._waiting, *self._flying) if not part.late]:
                    self._expire(part)
                for part in self._flying:
                    self._give_later(part)
                return
            try:
                if isinstance(told, _Load):
                    self._begin(told)
                elif isinstance(told, _Part):
                    self._arrived(told)
                self._look()
            except Exception:  # of our own making: whatever was on its way still ends by its deadline
                logger.exception("hicache_ext: a turn of the loads failed")

    def _patience(self) -> float | None:
        """Seconds until something must be looked at though nobody says so."""
        parts = [*self._waiting, *(part for part in self._flying if not part.late)]
        if not parts:
            return None
        left = max(0.0, min(part.load.deadline for part in parts) - time.monotonic())
        return min(left, _LOOK_SECONDS) if self._waiting else left

    def _begin(self, load: _Load) -> None:
        most = self._slots[load.pages.group].staging.part
        for first in range(0, load.pages.count, most):
            self._waiting.append(_Part(load, first, min(first + most, load.pages.count)))

    def _look(self) -> None:
        """Late parts end, and reads begin where there are slots."""
        now = time.monotonic()
        for part in [part for part in (*self._waiting, *self._flying) if not part.late and now >= part.load.deadline]:
            self._expire(part)
        while self._waiting and self._read(self._waiting[0]):
            self._waiting.popleft()

    def _read(self, part: _Part) -> bool:
        """Begin to read; False where there are no slots for now."""
        load = part.load
        staging = self._slots[load.pages.group].staging
        slots = staging.take(part.last - part.first)
        if slots is None:
            return False
        part.slots = slots
        try:
            part.read = self._store.read(staging.batch(load.space, part.keys, part.parents, slots))
        except Exception:
            logger.exception("hicache_ext: a load could not be started; its pages are recomputed")
            part.read = Completion.finished(len(slots), Outcome.FAILED)
        self._flying.add(part)
        part.read.on_done(lambda _: self._queue.put(part))
        return True

    def _arrived(self, part: _Part) -> None:
        """The tiers do not touch the slots any more."""
        self._flying.discard(part)
        assert part.read is not None
        staging = self._slots[part.load.pages.group].staging
        try:
            if not part.late:
                outcomes = self._copy(part, bytes(part.read.outcomes))
        finally:
            staging.give(part.slots)
        if not part.late:
            self._settle(part, outcomes)

    def _copy(self, part: _Part, outcomes: bytes) -> bytes:
        """Good pages go to their blocks; the outcomes after that."""
        load, group = part.load, part.load.pages.group
        good = np.frombuffer(outcomes, np.uint8) == Outcome.HIT
        if not good.any():
            return outcomes
        try:
            chosen = load.wanted[part.rows] & good[:, None]
            targets, sources = load.units[part.rows][chosen], self._slots[group].units(part.slots)[chosen]
            load.ready.synchronize()
            since = time.monotonic()
            self._copies.load(Part(str(group), sources, targets))
            self._count("load_device_us", int((time.monotonic() - since) * 1e6))
        except Exception:
            logger.exception("hicache_ext: loaded pages could not be put into their blocks; they are recomputed")
            return bytes(np.where(good, Outcome.FAILED, np.frombuffer(outcomes, np.uint8)).astype(np.uint8))
        return outcomes

    def _expire(self, part: _Part) -> None:
        if part.read is None:
            self._waiting.remove(part)
        else:
            part.late = True
            part.read.cancel()
            account_overdue(self._store, KeyBatch(part.load.space, part.keys))
        self._settle(part, bytes([Outcome.TIMEOUT]) * (part.last - part.first))

    def _give_later(self, part: _Part) -> None:
        """Nobody here sees the end of this read."""
        staging, slots = self._slots[part.load.pages.group].staging, part.slots
        assert part.read is not None
        part.read.on_done(lambda _: staging.give(slots))

    def _settle(self, part: _Part, outcomes: bytes) -> None:
        load = part.load
        load.outcomes[part.rows] = outcomes
        load.open -= len(outcomes)
        if load.open:
            return
        bad = np.frombuffer(load.outcomes, np.uint8) != Outcome.HIT
        missing: Sequence[int] = ()
        if bad.any():
            try:
                missing = np.unique(load.blocks.blocks_in(load.pages)[load.wanted & bad[:, None]]).tolist()
            except IndexError:
                missing = load.pages.blocks
        load.ended(missing, bytes(load.outcomes))


_NOTHING: Any = object()

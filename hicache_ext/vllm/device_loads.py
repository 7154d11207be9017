"""Loads into blocks on a device: from the tiers into slots, and from the slots into the blocks, on one thread.

Belongs here: parts, deadlines, what becomes of late and bad pages. Does not belong here: which pages (scheduler), or
how they are copied (hicache_ext.device).

    read     the tiers fill slots, as many parts of a load at a time as there are slots for; each page is verified there
    copy     a part as soon as it has arrived, once the device is done with what used its blocks before

A part all of whose pages lie in the tier that reaches the device comes through slots there, past the host. What it does
not bring is read once more, through the host, where all tiers are asked: a page that was evicted meanwhile has often
moved one tier down, and reading it costs less than computing it.

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

from hicache_ext.device.copies import Part
from hicache_ext.device.sides import Side, Sides
from hicache_ext.page import KEY_BYTES, Namespace, chain_parents
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.overdue import account_overdue
from hicache_ext.vllm.device_blocks import DeviceBlocks, Numbers
from hicache_ext.vllm.moves import Loaded
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Completion, KeyBatch, Outcome

logger = logging.getLogger(__name__)

#: Seconds after which a load that waits for slots looks again.
_LOOK_SECONDS = 0.05

Count = Callable[[str, int], None]


@dataclass
class _Load:
    """ready: an event of the device after which the blocks may be written, None once it has happened. outcomes:
    uint8[pages]. open: pages without one."""

    pages: Pages
    blocks: DeviceBlocks
    space: Namespace
    ready: Any
    deadline: float
    ended: Loaded
    outcomes: NDArray[np.uint8]
    open: int

    # A load has up to a hundred parts, so: once.

    @cached_property
    def units(self) -> Numbers:
        return self.blocks.units(self.pages)

    @cached_property
    def wanted(self) -> NDArray[np.bool_]:
        return self.blocks.wanted(self.pages)

    @cached_property
    def whole(self) -> KeyBatch:
        """All of its pages."""
        return KeyBatch(self.space, self.pages.keys, chain_parents(self.pages.keys, self.pages.parent))


@dataclass(eq=False)
class _Part:
    """Pages `numbers` of a load, ascending. past: they come past the host."""

    load: _Load
    numbers: Numbers
    past: bool
    slots: list[int] = field(default_factory=list)
    read: Completion | None = None
    late: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def name(self) -> str:
        return str(self.load.pages.group)

    @cached_property
    def batch(self) -> KeyBatch:
        """A run of pages, nearly always: then two slices."""
        whole, first, last = self.load.whole, int(self.numbers[0]), int(self.numbers[-1]) + 1
        if last - first > len(self):
            return whole.only(self.numbers.tolist())
        assert whole.parents is not None
        at = slice(first * KEY_BYTES, last * KEY_BYTES)
        return KeyBatch(whole.namespace, whole.keys[at], whole.parents[at])


class DeviceLoads:
    """One for each worker."""

    def __init__(
        self, store: TieredStore | FaultyStore, blocks: Sequence[DeviceBlocks], sides: Sides, count: Count
    ) -> None:
        """blocks: of each group. sides: their slots have its number as a name. count: of a statistic by name."""
        self._store, self._blocks, self._sides, self._count = store, blocks, sides, count
        self._queue: queue.SimpleQueue[_Load | _Part | None] = queue.SimpleQueue()
        self._waiting: dict[bool, deque[_Part]] = {True: deque(), False: deque()}  # by `past`
        self._flying: set[_Part] = set()
        self._thread = threading.Thread(target=self._work, name="hicache-vllm-load", daemon=True)
        self._thread.start()

    def put(self, pages: Pages, space: Namespace, ready: Any, deadline: float, ended: Loaded) -> None:
        """Load these pages. Never blocks."""
        blocks = self._blocks[pages.group]
        outcomes = np.zeros(pages.count, np.uint8)
        self._queue.put(_Load(pages, blocks, space, ready, deadline, ended, outcomes, pages.count))

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
                for part in self._open():
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

    def _open(self) -> list[_Part]:
        """Parts whose pages have no outcome."""
        return [part for parts in (*self._waiting.values(), self._flying) for part in parts if not part.late]

    def _patience(self) -> float | None:
        """Seconds until something must be looked at though nobody says so."""
        parts = self._open()
        if not parts:
            return None
        left = max(0.0, min(part.load.deadline for part in parts) - time.monotonic())
        return min(left, _LOOK_SECONDS) if any(self._waiting.values()) else left

    def _begin(self, load: _Load) -> None:
        past = self._sides.past_host(self._store, load.whole)
        numbers, most = np.arange(load.pages.count), self._sides.part(str(load.pages.group))
        for first in range(0, load.pages.count, most):
            self._wait(_Part(load, numbers[first : first + most], bool(past[first : first + most].all())))

    def _wait(self, part: _Part) -> None:
        self._waiting[part.past].append(part)

    def _look(self) -> None:
        """Late parts end, and reads begin where there are slots."""
        now = time.monotonic()
        for part in self._open():
            if now >= part.load.deadline:
                self._expire(part)
        for waiting in self._waiting.values():  # past the host first: what cannot go there then joins the others
            while waiting and self._read(waiting[0]):
                waiting.popleft()

    def _side(self, part: _Part) -> Side:
        return self._sides.device if part.past and self._sides.device is not None else self._sides.host

    def _read(self, part: _Part) -> bool:
        """Begin to read; False where there are no slots for now."""
        if part.past and self._store.reads_to_device is None:  # not any more
            part.past = False
            self._wait(part)
            return True
        staging = self._side(part).staging[part.name]
        slots = staging.take(len(part))
        if slots is None:
            return False
        part.slots, keys = slots, part.batch
        try:
            part.read = self._store.read(staging.batch(keys.namespace, keys.keys, keys.parents, slots))
        except Exception:
            logger.exception("hicache_ext: a load could not be started")
            part.read = Completion.finished(len(slots), Outcome.FAILED)
        self._flying.add(part)
        part.read.on_done(lambda _: self._queue.put(part))
        return True

    def _arrived(self, part: _Part) -> None:
        """The tiers do not touch the slots any more."""
        self._flying.discard(part)
        assert part.read is not None
        staging = self._side(part).staging[part.name]
        try:
            if part.late:
                return
            read = np.frombuffer(bytes(part.read.outcomes), np.uint8)
            outcomes = self._copy(part, read)
        finally:
            staging.give(part.slots)
        missed = read != Outcome.HIT
        if not part.past or not missed.any():
            self._settle(part.load, part.numbers, outcomes)
            return
        self._count("load_again", int(missed.sum()))
        self._waiting[False].appendleft(_Part(part.load, part.numbers[missed], False))
        self._settle(part.load, part.numbers[~missed], outcomes[~missed])

    def _copy(self, part: _Part, outcomes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Good pages go to their blocks; the outcomes after that."""
        load, side = part.load, self._side(part)
        good = outcomes == Outcome.HIT
        if not good.any():
            return outcomes
        try:
            chosen = load.wanted[part.numbers] & good[:, None]
            slots = load.blocks.slots(side.staging[part.name]).units(part.slots)
            targets, sources = load.units[part.numbers][chosen], slots[chosen]
            if load.ready is not None:
                load.ready.synchronize()
                load.ready = None
            since = time.monotonic()
            side.copies.load(Part(part.name, sources, targets))
            self._count("load_device_us", int((time.monotonic() - since) * 1e6))
        except Exception:
            logger.exception("hicache_ext: loaded pages could not be put into their blocks; they are recomputed")
            return np.where(good, Outcome.FAILED, outcomes).astype(np.uint8)
        if part.past:
            self._count("load_past_host", int(good.sum()))
        return outcomes

    def _expire(self, part: _Part) -> None:
        if part.read is None:
            self._waiting[part.past].remove(part)
        else:
            part.late = True
            part.read.cancel()
            account_overdue(self._store, part.batch)
        self._settle(part.load, part.numbers, np.full(len(part), Outcome.TIMEOUT, np.uint8))

    def _give_later(self, part: _Part) -> None:
        """Nobody here sees the end of this read."""
        staging, slots = self._side(part).staging[part.name], part.slots
        assert part.read is not None
        part.read.on_done(lambda _: staging.give(slots))

    def _settle(self, load: _Load, numbers: Numbers, outcomes: NDArray[np.uint8]) -> None:
        load.outcomes[numbers] = outcomes
        load.open -= len(numbers)
        if load.open:
            return
        bad = load.outcomes != Outcome.HIT
        missing: Sequence[int] = ()
        if bad.any():
            try:
                missing = np.unique(load.blocks.blocks_in(load.pages)[load.wanted & bad[:, None]]).tolist()
            except IndexError:
                missing = load.pages.blocks
        load.ended(missing, load.outcomes.tobytes())


_NOTHING: Any = object()

"""Saves from blocks on a device: from the blocks into slots, and from the slots to the tiers, on one thread.

Belongs here: when blocks are read, and until when they may be. Does not belong here: which pages (scheduler), or how
they are copied (hicache_ext.device).

A step's pages are copied once the device has computed them, and the forward does not wait for that. vLLM may meanwhile
give their blocks to somebody else, and tells which ones before a step writes into them (`make_way`): what has not been
copied by then is not stored, and a part that is being copied at that moment is waited for, which takes a millisecond.

Where the tiers take pages from the device, the slots lie there, and blocks are free again after a copy within it.
Such a copy is short, but it may have to wait for a kernel of the forward: so one copy fills up to half of all slots,
whose parts are stored while the next waits. Where further tiers want copies as well, the store makes them in host
memory, and pages go through that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.device.copies import Part
from hicache_ext.device.sides import Side, Sides
from hicache_ext.device.slots import PageSlots
from hicache_ext.page import KEY_BYTES, Namespace, chain_parents
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.vllm.device_blocks import DeviceBlocks
from hicache_ext.vllm.moves import Saved
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Completion, Notes, Outcome

logger = logging.getLogger(__name__)

#: Seconds that a page waits for a slot: the tiers are slower than the device for so long.
_SLOT_SECONDS = 30.0
_LOOK_SECONDS = 0.1

Count = Callable[[str, int], None]


@dataclass(eq=False)
class _Save:
    """Pages of one group, each key once. units: int64[pages, units of a page]. blocks: of each. ready: an event of the
    device after which they may be read. first: pages before it are copied. dropped: nothing more of it may be read."""

    group: int
    space: Namespace
    keys: bytes
    parents: bytes
    units: NDArray[np.int64]
    blocks: NDArray[np.int64]
    notes: Notes | None
    ready: Any
    ended: Saved
    first: int = 0
    dropped: bool = False

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES


class DeviceSaves:
    """One for each worker."""

    def __init__(
        self, store: TieredStore | FaultyStore, blocks: Sequence[DeviceBlocks], sides: Sides, count: Count
    ) -> None:
        """blocks: of each group. sides: their slots have its number as a name. count: of a statistic by name."""
        self._store, self._blocks, self._sides, self._count = store, blocks, sides, count
        self._saves: deque[_Save] = deque()  # the first is being worked on
        self._copying: NDArray[np.int64] | None = None
        self._cond = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="hicache-vllm-save", daemon=True)
        self._thread.start()

    def put(self, pages: Sequence[Pages], space: Namespace, ready: Any, ended: Saved) -> int:
        """Store these pages of one group, of any requests, once `ready` has happened; how many they are. Never blocks.

        A page that several requests have is stored once.
        """
        save = self._of(pages, space, ready, ended)
        with self._cond:
            self._saves.append(save)
            self._cond.notify_all()
        return len(save)

    def make_way(self, numbers: Sequence[int]) -> None:
        """The device is about to write into these blocks: nothing reads them any more when this returns."""
        if not self._saves or not numbers:
            return
        taken = np.asarray(numbers, np.int64)
        with self._cond:
            for save in self._saves:
                if not save.dropped and np.isin(save.blocks[save.first :], taken).any():
                    save.dropped = True
            self._cond.notify_all()
            while self._copying is not None and np.isin(self._copying, taken).any():
                self._cond.wait()

    def close(self) -> None:
        """No block is read any more when this returns."""
        with self._cond:
            self._closing = True
            self._cond.notify_all()
        self._thread.join()

    def _of(self, pages: Sequence[Pages], space: Namespace, ready: Any, ended: Saved) -> _Save:
        group = pages[0].group
        blocks = self._blocks[group]
        keys = b"".join(one.keys for one in pages)
        parents = b"".join(chain_parents(one.keys, one.parent) for one in pages)
        units = np.concatenate([blocks.units(one) for one in pages])
        numbers = np.concatenate([blocks.blocks_in(one) for one in pages])
        notes = _joined([one.notes for one in pages], [one.count for one in pages])
        if len(pages) > 1:
            where = {keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in reversed(range(len(units)))}
            if len(where) < len(units):
                rows = sorted(where.values())
                keys, parents = (
                    b"".join(packed[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in rows) for packed in (keys, parents)
                )
                units, numbers = units[rows], numbers[rows]
                notes = None if notes is None else notes.only(rows)
        return _Save(group, space, keys, parents, units, numbers, notes, ready, ended)

    # --- the thread

    def _work(self) -> None:
        while True:
            with self._cond:
                self._cond.wait_for(lambda: self._saves or self._closing)
                if self._closing:
                    for save in self._saves:
                        save.ended(save.group, b"", len(save) - save.first)
                    return
                save = self._saves[0]
            try:
                self._run(save)
            except Exception:
                logger.exception("hicache_ext: pages could not be stored")
            with self._cond:
                self._saves.popleft()
            if save.first < len(save):
                save.ended(save.group, b"", len(save) - save.first)

    def _run(self, save: _Save) -> None:
        save.ready.synchronize()
        while save.first < len(save):
            side = self._sides.for_write(self._store)
            staging = side.staging[str(save.group)]
            left, step = len(save) - save.first, staging.part
            most = max(step, staging.slots // 2) if side is self._sides.device else step
            taken = self._take(save, staging, min(step, left), min(most, left))
            if taken is None:
                return
            rows = slice(save.first, save.first + len(taken))
            try:
                if not self._copy(save, rows, side, taken):
                    staging.give(taken)
                    return
            except BaseException:
                staging.give(taken)
                raise
            for at in range(0, len(taken), step):
                part = taken[at : at + step]
                self._send(save, slice(rows.start + at, rows.start + at + len(part)), staging, part)
            if side is self._sides.device:
                self._count("save_past_host", len(taken))

    def _take(self, save: _Save, staging: PageSlots, count: int, most: int) -> list[int] | None:
        until = time.monotonic() + _SLOT_SECONDS
        while not save.dropped and not self._closing and time.monotonic() < until:
            if (taken := staging.take(count, _LOOK_SECONDS, most)) is not None:
                return taken
        return None

    def _copy(self, save: _Save, rows: slice, side: Side, taken: list[int]) -> bool:
        """Whether these pages could still be copied."""
        name = str(save.group)
        slots = self._blocks[save.group].slots(side.staging[name]).units(taken)
        with self._cond:
            if save.dropped:
                return False
            self._copying, save.first = save.blocks[rows], rows.stop
        since = time.monotonic()
        try:
            side.copies.store(Part(name, slots.ravel(), save.units[rows].ravel()))
        except BaseException:
            save.first = rows.start
            raise
        finally:
            with self._cond:
                self._copying = None
                self._cond.notify_all()
        self._count("save_device_us", int((time.monotonic() - since) * 1e6))
        return True

    def _send(self, save: _Save, rows: slice, staging: PageSlots, taken: list[int]) -> None:
        keys, parents = (packed[rows.start * KEY_BYTES : rows.stop * KEY_BYTES] for packed in (save.keys, save.parents))
        batch = staging.batch(save.space, keys, parents, taken)
        if save.notes is not None:
            batch = replace(batch, tokens=save.notes.tokens[rows], event_hashes=save.notes.hashes[rows])
        try:
            done = self._store.write(batch)
        except Exception:
            logger.exception("hicache_ext: pages could not be stored")
            done = Completion.finished(len(taken), Outcome.FAILED)
        done.on_done(partial(_stored, save, staging.give, taken))


def _stored(save: _Save, give: Callable[[list[int]], None], taken: list[int], done: Completion) -> None:
    give(taken)
    save.ended(save.group, bytes(done.outcomes), 0)


def _joined(notes: Sequence[Notes | None], counts: Sequence[int]) -> Notes | None:
    """Of all these runs of pages; a run of which nothing is known has hashes of 0."""
    known = next((one for one in notes if one is not None), None)
    if known is None:
        return None
    width = known.tokens.shape[1]
    parts = [
        one if one is not None else Notes(np.zeros((count, width), np.uint32), np.zeros((count, 2), np.int64))
        for one, count in zip(notes, counts, strict=True)
    ]
    return Notes(np.concatenate([one.tokens for one in parts]), np.concatenate([one.hashes for one in parts]))

"""Loads: pages from the tiers into device pools, layer by layer, on one thread of their own.

Belongs here: the order of reading and copying, deadlines, what becomes of a load that fails. Does not belong here: what
may be loaded (linker), or how pages are copied (hicache_ext.device).

    read      the tiers fill slots, in host memory or past it, several parts at a time, while the forward before may
              still run; every page is verified there, or the whole load fails before its first byte reaches a pool
    copy      once nothing on the device uses the target pages any more: whole parts as they arrive, and the last part
              of each pool layer by layer, so that the forward begins with layer 0 while the others are on their way

A part is copied only when all of its pages are hits. A load ends by its deadline: a tier that is late then keeps its
slots, and has never known the device's pages.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hicache_ext.device.copies import Part
from hicache_ext.device.sides import Side, Sides
from hicache_ext.page import KEY_BYTES, Namespace, pack_keys, split_keys
from hicache_ext.sglang.linker_planes import DevicePool
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.overdue import account_overdue
from storage_backends.base import Completion, KeyBatch, Outcome

logger = logging.getLogger(__name__)


class LoadFailed(Exception):
    """This load's pages are not all there. trouble: the tiers are to be left alone for a while."""

    def __init__(self, message: str, trouble: bool = False) -> None:
        super().__init__(message)
        self.trouble = trouble


@dataclass
class Wanted:
    """Pages of one pool that requests of one batch want. indices: SGLang's device indices, a tensor for each request,
    in the order of the keys."""

    space: Namespace | None
    keys: list[str] = field(default_factory=list)
    indices: list[Any] = field(default_factory=list)


@dataclass
class Load:
    """index: its number at the layer counter. ready: events after which the device pages may be written."""

    index: int
    wanted: dict[str, Wanted]
    ready: list[Any]
    deadline: float


@dataclass
class _Piece:
    """Unique pages of one pool, and which slot (by position) of which side becomes which of the load's device pages."""

    pool: str
    space: Namespace
    keys: bytes
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    last: bool
    side: Side | None = None
    slots: list[int] = field(default_factory=list)
    read: Completion | None = None

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES


class Loads:
    """Runs loads in the order in which they are put."""

    def __init__(
        self, store: TieredStore | FaultyStore, pools: Mapping[str, DevicePool], sides: Sides, layers: int,
        counter: Any, on_end: Callable[[Load, Exception | None], None],
    ) -> None:  # fmt: skip
        """counter: SGLang's LayerWiseLoadCounter. on_end: called on the thread when a load is over."""
        self._store, self._pools, self._sides = store, pools, sides
        self._layers, self._counter, self._on_end = layers, counter, on_end
        self._queue: queue.Queue[Load | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hicache-linker-load", daemon=True)
        self._thread.start()

    def put(self, load: Load) -> None:
        self._queue.put(load)

    def join(self) -> None:
        """Wait until every load that was put is over."""
        self._queue.join()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (load := self._queue.get()) is not None:
            error: Exception | None = None
            try:
                self._run(load)
            except Exception as raised:
                error = raised
            try:
                self._on_end(load, error)
            finally:
                if error is not None:
                    self._counter.fail(load.index, error)
                self._queue.task_done()
        self._queue.task_done()

    def _run(self, load: Load) -> None:
        waiting = deque(piece for name, wanted in load.wanted.items() for piece in self._pieces(name, wanted))
        flying: deque[_Piece] = deque()
        held: list[_Piece] = []
        pages: dict[str, NDArray[np.int64]] = {}
        try:
            while waiting or flying:
                while waiting and self._read(waiting[0], load, wait=not flying):
                    flying.append(waiting.popleft())
                piece = flying[0]
                self._arrived(piece, load)
                if piece.last:
                    held.append(flying.popleft())
                    continue
                _side_of(piece).copies.load(self._part(piece, load, pages))
                self._release(flying.popleft())
            # Layer by layer by one way at a time: pools whose last part came the other way are there before.
            by_layers = _side_of(held[-1]) if held else self._sides.host
            for piece in held:
                if _side_of(piece) is not by_layers:
                    _side_of(piece).copies.load(self._part(piece, load, pages))
            parts = [self._part(piece, load, pages) for piece in held if _side_of(piece) is by_layers]
            by_layers.copies.load_layers(parts, self._layers, partial(self._counter.complete, load.index))
        finally:
            for piece in (*flying, *held):
                self._release(piece)

    def _pieces(self, name: str, wanted: Wanted) -> list[_Piece]:
        """The load's pages of one pool, each key once, in parts."""
        if wanted.space is None:
            raise LoadFailed("the weights are being changed")
        packed = split_keys(pack_keys(wanted.keys))
        numbers: dict[bytes, int] = {}
        position = np.array([numbers.setdefault(key, len(numbers)) for key in packed], np.int64)
        keys = list(numbers)
        most = self._sides.part(name)
        pieces = []
        for first in range(0, len(keys), most):
            targets = np.flatnonzero((position >= first) & (position < first + most))
            some = b"".join(keys[first : first + most])
            last = first + most >= len(keys)
            pieces.append(_Piece(name, wanted.space, some, position[targets] - first, targets, last))
        return pieces

    def _read(self, piece: _Piece, load: Load, wait: bool) -> bool:
        """Begin to read; False when there are no slots for now."""
        if piece.side is None:
            piece.side = self._sides.for_read(self._store, KeyBatch(piece.space, piece.keys))
        staging = piece.side.staging[piece.pool]
        slots = staging.take(len(piece), max(0.0, load.deadline - time.monotonic()) if wait else 0.0)
        if slots is None:
            if wait:
                raise LoadFailed(f"no slots of pool {piece.pool} came free in time", trouble=True)
            return False
        piece.slots = slots
        try:
            piece.read = self._store.read(staging.batch(piece.space, piece.keys, None, slots))
        except BaseException:
            staging.give(slots)
            raise
        return True

    def _arrived(self, piece: _Piece, load: Load) -> None:
        read = piece.read
        assert read is not None
        if not read.wait(max(0.0, load.deadline - time.monotonic())):
            read.cancel()
            account_overdue(self._store, KeyBatch(piece.space, piece.keys))
            raise LoadFailed(f"a tier did not give its pages of pool {piece.pool} in time", trouble=True)
        outcomes = bytes(read.outcomes)
        good = outcomes.count(Outcome.HIT)
        if good < len(outcomes):
            told = ", ".join(
                f"{outcomes.count(outcome)} {outcome.name.lower()}"
                for outcome in Outcome
                if outcome is not Outcome.HIT and outcomes.count(outcome)
            )
            trouble = bool(outcomes.count(Outcome.FAILED) or outcomes.count(Outcome.TIMEOUT))
            raise LoadFailed(f"{told} of {len(outcomes)} pages of pool {piece.pool}", trouble)

    def _part(self, piece: _Piece, load: Load, pages: dict[str, NDArray[np.int64]]) -> Part:
        """Where the piece goes, once it may go there."""
        if load.ready:
            for event in load.ready:
                event.synchronize()
            load.ready = []
        if piece.pool not in pages:
            wanted = load.wanted[piece.pool]
            numbers = [self._pools[piece.pool].page_numbers(indices) for indices in wanted.indices]
            pages[piece.pool] = found = np.concatenate(numbers)
            if len(found) != len(wanted.keys):
                raise LoadFailed(f"{len(wanted.keys)} pages of pool {piece.pool} were to go to {len(found)}")
        slots = np.array(piece.slots, np.int64)[piece.positions]
        return Part(piece.pool, slots, pages[piece.pool][piece.targets])

    def _release(self, piece: _Piece) -> None:
        """Nobody here uses these slots any more; the tier may, until its completion."""
        staging, slots = _side_of(piece).staging[piece.pool], piece.slots
        assert piece.read is not None
        piece.read.on_done(lambda _: staging.give(slots))


def _side_of(piece: _Piece) -> Side:
    assert piece.side is not None  # it is being read
    return piece.side

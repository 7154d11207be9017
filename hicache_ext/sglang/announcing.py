"""KV events of the storage tiers in SGLang's own event stream: one process's, whatever is attached to it.

Belongs here: what follows from SGLang's side (a publisher, flushes, attach and detach) and from the store's, and the
thread that brings both together. Does not belong here: what must be said (events.announcer), or the names of blocks
(naming).

    backends' reports -> announcer -> [thread] -> ready events -> SGLang's publisher, on the scheduler thread

SGLang's publisher takes its events from the radix cache; it gets ours with the same call, after them. So the scheduler
thread does no more than look for AllBlocksCleared among SGLang's events and move ready ones over. Everything else runs
on a thread of its own, in slices: composing events, asking tiers for what they hold from before, looking over what is
believed, following health, namespaces and weights.

AllBlocksCleared (a flush) wipes every tier of the rank in the consumers' view, so all that storage holds is announced
again after it.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hicache_ext.events.announcer import Announcer
from hicache_ext.events.model import AnyEvent, BlockRemoved, BlockStored, CostedBlockStored, LoadCost
from hicache_ext.events.watch import Watch
from hicache_ext.sglang.naming import Naming
from storage_backends.base import Notes

logger = logging.getLogger(__name__)

#: Blocks in ready events, beyond which no more are made; and those that one call of the scheduler's moves.
_READY_BLOCKS, _MOVED_BLOCKS = 16384, 2048
#: Blocks that are composed at a time.
_COMPOSED = 128
_TURN_SECONDS, _BUSY_SECONDS = 0.2, 0.02


class TierEvents:
    """One per process. Off, and without a thread, until SGLang has a publisher that publishes."""

    def __init__(self) -> None:
        self.announcer = Announcer()
        self.naming: Naming | None = None
        self._convert: Callable[[AnyEvent], Any] | None = None
        self._ready: deque[tuple[int, Any]] = deque()  # blocks, and SGLang's event of them
        self._made = self._moved = 0  # blocks that were ever made ready, and taken or thrown away again
        self._full = False
        self._composing = threading.Lock()
        self._attached: Watch | None = None
        self._adapter: weakref.ref[Any] | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._look = False  # whether the tiers are to be asked at once, and not when their turn comes
        self._thread: threading.Thread | None = None
        self._said = False
        self.moved = self.clears = 0  # blocks that SGLang's publisher got; flushes

    @property
    def active(self) -> bool:
        """Whether this process publishes KV events."""
        return self._convert is not None

    # -- SGLang's side -------------------------------------------------------------------------------------------

    def publishes(self, publisher: Any) -> None:
        """SGLang made its publisher; from now on it gets our events with those of the radix cache."""
        if not publisher.enable_kv_cache_events:
            return
        events = importlib.import_module("sglang.srt.disaggregation.kv_events")
        publisher.tree_cache = _WithTiers(publisher.tree_cache, self, events.AllBlocksCleared)
        with self._lock:
            self.naming = Naming(_recorder(publisher.tree_cache), self._tokens_of)
            self._convert = _converter(events)
        adapter = self._adapter() if self._adapter is not None else None
        if adapter is not None:
            self.attach(adapter)

    def move(self, events: list[Any], cleared: bool) -> None:
        """Add ready events to SGLang's. The scheduler thread: constant work per event.

        cleared: SGLang's say that every block of the rank is gone.
        """
        if cleared:
            with self._composing:
                self._ready.clear()
                self._moved = self._made
                self.announcer.clear()
            self.clears += 1
            self._wake.set()
            return
        if not self._ready:
            return
        until = self._moved + _MOVED_BLOCKS
        before = self._moved
        while self._ready and self._moved < until:
            blocks, event = self._ready.popleft()
            events.append(event)
            self._moved += blocks
        self.moved += self._moved - before
        if self._full and self._made - self._moved < _READY_BLOCKS // 2:
            self._full = False
            self._wake.set()

    def attach(self, adapter: Any) -> None:
        """Storage is attached: what it holds is announced, and what becomes of it."""
        self._adapter = weakref.ref(adapter)
        with self._lock:
            if self._convert is None:
                return
            self._detach()
            costs = adapter.config.event_costs
            self._attached = Watch(adapter.store, self.announcer, adapter.served_namespace, self._wake.set, costs)
            self._start()
        self._look = True
        self._wake.set()

    def detach(self, adapter: Any) -> None:
        """Storage is gone, and all that it held."""
        with self._lock:
            if self._attached is not None and self._attached.store is adapter.store:
                self._detach()
        if self._adapter is not None and self._adapter() is adapter:
            self._adapter = None
        self._wake.set()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hicache-events", daemon=True)
            self._thread.start()

    def know(self, namespace: bytes, keys: bytes, notes: Notes) -> None:
        """SGLang told what these pages are, whether or not they had to be stored."""
        if self.active:
            self.announcer.know(namespace, keys, notes)

    def stats(self) -> dict[str, int]:
        """moved: blocks given to SGLang's publisher. clears: flushes after which all was announced again."""
        return {"moved": self.moved, "clears": self.clears, **self.announcer.stats()} if self.active else {}

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        turn = 0.0
        while True:
            self._wake.wait(max(0.0, turn - time.monotonic()))
            self._wake.clear()
            try:
                # What a tier reports is said at once; the tiers are asked when their turn comes, however much they say.
                if self._look or time.monotonic() >= turn:
                    self._look = False
                    turn = time.monotonic() + _TURN_SECONDS
                    attached = self._attached
                    if attached is not None and attached.turn():
                        turn = time.monotonic() + _BUSY_SECONDS
                self._compose()
            except Exception:
                if not self._said:
                    self._said = True
                    logger.exception("KV events of the storage tiers: a turn failed (said once)")

    def _compose(self) -> None:
        """Make events ready, as many as there is room for."""
        convert = self._convert
        assert convert is not None
        while self._made - self._moved < _READY_BLOCKS:
            with self._composing:  # so that a flush comes before or after all of this
                for event in self.announcer.take(_COMPOSED):
                    blocks = len(event.block_hashes) if isinstance(event, BlockStored | BlockRemoved) else 1
                    self._made += blocks
                    self._ready.append((blocks, convert(event)))
            if self.announcer.quiet:
                return
            time.sleep(0)  # the engine's threads first
        self._full = True

    def _tokens_of(self, keys: Sequence[bytes]) -> list[bytes | None]:
        attached = self._attached
        namespace = None if attached is None else attached.namespace
        return [None] * len(keys) if namespace is None else self.announcer.tokens(namespace, keys)


class _WithTiers:
    """SGLang's radix cache as its publisher sees it: the events that it takes are followed by ours."""

    def __init__(self, tree: Any, ours: TierEvents, cleared: type) -> None:
        self._tree, self._ours, self._cleared = tree, ours, cleared

    def take_events(self) -> list[Any]:
        events: list[Any] = self._tree.take_events()
        self._ours.move(events, self._cleared in map(type, events))
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tree, name)


def _recorder(tree: Any) -> Any:
    """What collects the radix cache's own events, from the version on that has such a thing; else the cache."""
    for path in (("tree_core", "kv_events"), ("inner", "tree_core", "kv_events"), ("kv_events",)):
        found = tree
        for name in path:
            found = getattr(found, name, None)
        if found is not None:
            return found
    return tree


def _converter(events: Any) -> Callable[[AnyEvent], Any]:
    """Our events to SGLang's own classes, with the fields that this version has.

    A store that says its cost is a class of SGLang's with one field more, where events are maps: readers pass it over.
    """
    kinds = {BlockStored: events.BlockStored, BlockRemoved: events.BlockRemoved, CostedBlockStored: events.BlockStored}
    if not events.BlockStored.__struct_config__.array_like:
        kinds[CostedBlockStored] = msgspec.defstruct(
            "CostedBlockStored", [("load_cost", LoadCost | None, None)], bases=(events.BlockStored,), tag="BlockStored"
        )
    fields = {
        ours: [f for f in theirs.__struct_fields__ if f in ours.__struct_fields__] for ours, theirs in kinds.items()
    }

    def convert(event: AnyEvent) -> Any:
        ours = type(event)
        return kinds[ours](**{name: getattr(event, name) for name in fields[ours]})

    return convert


EVENTS = TierEvents()

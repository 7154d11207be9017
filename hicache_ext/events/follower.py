"""Follows a store, and lets its announcer know what each tier holds: for streams that are not the engine's.

Belongs here: the store's reports to the announcer, and asking for what nobody reports. Does not belong here: what must
be said (announcer.py), sending it (publisher.py), an engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hicache_ext.events.announcer import Announcer
from hicache_ext.events.model import Medium
from hicache_ext.store.health import State
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Notes, Residency

logger = logging.getLogger(__name__)

_TURN_SECONDS, _BUSY_SECONDS = 0.2, 0.005
#: Pages that are looked over in a turn.
_LOOKED_OVER = 1024


class Follower:
    """Between a store and an announcer, from now to `close`. The store must not have served pages before.

    namespace: digest; pages of others are not announced. wake: called when there may be something to say.
    """

    def __init__(self, store: TieredStore, announcer: Announcer, namespace: bytes, wake: Callable[[], None]) -> None:
        self._store, self._announcer, self._namespace, self._wake = store, announcer, namespace, wake
        self._numbers = [
            announcer.add(medium)
            if (medium := tier.backend.capabilities.medium) in (Medium.DISK, Medium.EXTERNAL)
            else None
            for tier in store.tiers
        ]
        announcer.serve((namespace,))
        self._names: list[bytes] = []
        self._closed = threading.Event()
        store.on_residency(self._hear)
        self._thread = threading.Thread(target=self._run, name="hicache-follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing of the store can be had any more."""
        self._closed.set()
        self._thread.join()
        for number in self._numbers:
            if number is not None:
                self._announcer.drop(number)
        self._wake()

    def _turn(self) -> bool:
        """Follow what nobody reports, a slice of it; whether more of it is there now."""
        more = False
        if not self._names:
            self._names = self._announcer.names()
        looked, self._names = self._names[-_LOOKED_OVER:], self._names[:-_LOOKED_OVER]
        for tier, number in zip(self._store.tiers, self._numbers, strict=True):
            if number is None:
                continue
            self._announcer.show(number, tier.reads.state is State.CLOSED)
            more |= tier.backend.tell(self._namespace)
            for space, keys in self._announcer.held(number, looked):
                tier.backend.recheck(space, keys)
        return more

    def _run(self) -> None:
        busy = said = False
        while not self._closed.wait(_BUSY_SECONDS if busy else _TURN_SECONDS):
            try:
                busy = self._turn()
            except Exception:
                busy = False
                if not said:
                    said = True
                    logger.exception("following the store's tiers failed (said once)")
            if not self._announcer.quiet:
                self._wake()

    def _hear(self, index: int, change: Residency, namespace: bytes, keys: bytes, notes: Notes | None) -> None:
        number = self._numbers[index]
        if number is None or self._closed.is_set():
            return
        if change is Residency.STORED:
            self._announcer.stored(number, namespace, keys, notes)
        else:
            self._announcer.removed(number, namespace, keys)
        self._wake()

"""Follows a store on a thread of its own: for streams that are not an engine's.

Belongs here: that thread. Does not belong here: what is watched (watch.py), what must be said (announcer.py), sending
it (publisher.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hicache_ext.events.announcer import Announcer
from hicache_ext.events.watch import Watch
from hicache_ext.store.tiered import TieredStore

logger = logging.getLogger(__name__)

_TURN_SECONDS, _BUSY_SECONDS = 0.2, 0.005


class Follower:
    """From now to `close`. The store must not have served pages before.

    namespace: digest; pages of others are not announced. wake: called when there may be something to say.
    """

    def __init__(self, store: TieredStore, announcer: Announcer, namespace: bytes, wake: Callable[[], None]) -> None:
        self._announcer, self._wake = announcer, wake
        self._watch = Watch(store, announcer, lambda: namespace, wake)
        announcer.serve((namespace,))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hicache-follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nothing of the store can be had any more."""
        self._closed.set()
        self._thread.join()
        self._watch.close()
        self._wake()

    def _run(self) -> None:
        busy = said = False
        while not self._closed.wait(_BUSY_SECONDS if busy else _TURN_SECONDS):
            try:
                busy = self._watch.turn()
            except Exception:
                busy = False
                if not said:
                    said = True
                    logger.exception("following the store's tiers failed (said once)")
            if not self._announcer.quiet:
                self._wake()

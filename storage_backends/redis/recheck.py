"""What a server has evicted by itself is noticed, though nobody asks for it: pages seen there are asked for again.

Belongs here: how often, and what follows. Does not belong here: the question (backend.py).
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from storage_backends.presence import Presence

logger = logging.getLogger(__name__)

_SECONDS = 1.0


class Recheck:
    """Asks for up to `rate` pages a second, those first that were seen the longest ago, on a thread of its own.

    there: of some pages of a namespace (its digest), which the server has; None where it does not answer. gone: told of
    those that it has no more.
    """

    def __init__(
        self, rate: int, presence: Presence, there: Callable[[bytes, list[bytes]], list[bool] | None],
        gone: Callable[[bytes, list[bytes]], None],
    ) -> None:  # fmt: skip
        self._rate, self._presence, self._there, self._gone = rate, presence, there, gone
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="redis-recheck", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(_SECONDS):
            try:
                self._turn()
            except Exception:
                logger.exception("redis: looking for evicted pages failed; tried again")

    def _turn(self) -> None:
        stale: defaultdict[bytes, dict[bytes, float]] = defaultdict(dict)
        for namespace, key, until in self._presence.oldest(self._rate):
            stale[namespace][key] = until
        for namespace, pages in stale.items():
            keys = list(pages)
            there = self._there(namespace, keys)
            if there is None:
                return
            self._presence.seen(namespace, [key for key, found in zip(keys, there, strict=True) if found])
            missing = [key for key, found in zip(keys, there, strict=True) if not found]
            # Not those that were seen again since: somebody has stored them meanwhile.
            gone = [key for key in missing if self._presence.drop(namespace, key, pages[key])]
            if gone:
                self._gone(namespace, gone)

"""What the tiers hold of a chain, without ever keeping the scheduler waiting.

Belongs here: asking memory at once and servers in the background. Does not belong here: what is asked for, or loading.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hicache_ext.page import KEY_BYTES, Namespace, chain_parents, split_keys
from hicache_ext.store import NO_TIER, TieredStore
from hicache_ext.store.inject import FaultyStore
from storage_backends.base import KeyBatch

logger = logging.getLogger(__name__)

_THREADS = 4


@dataclass(frozen=True)
class _Asked:
    keys: bytes
    answer: Future[NDArray[np.uint8]]
    until: float


class Lookups:
    """Lookups by request. spaces: one namespace for each worker, all of which must hold a page for it to count.

    Not thread-safe: the scheduler's thread only.
    """

    def __init__(self, store: TieredStore | FaultyStore, timeout: float) -> None:
        """timeout: seconds after which a server's answer is not waited for any more."""
        self._store, self._timeout = store, timeout
        self._asked: dict[str, _Asked] = {}
        self._pool: ThreadPoolExecutor | None = None

    def tiers(self, request: str, spaces: Sequence[Namespace], keys: bytes, parent: bytes) -> NDArray[np.uint8] | None:
        """uint8[n]: the slowest tier that a page must come from, NO_TIER where a worker would miss it.

        None while a server has not answered: ask again.
        """
        found = _together([self._store.lookup_local(batch) for batch in _batches(spaces, keys, parent)])
        if self._knows() or not (found == NO_TIER).any():
            self._asked.pop(request, None)
            return found
        asked = self._asked.get(request)
        if asked is None:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="hicache-lookup")
            answer = self._pool.submit(self._ask, list(spaces), keys, parent)
            self._asked[request] = _Asked(keys, answer, time.monotonic() + self._timeout)
            return None
        if not asked.answer.done() and time.monotonic() < asked.until:
            return None
        del self._asked[request]
        if not asked.answer.done():
            asked.answer.cancel()
            return found  # what memory knows
        told = asked.answer.result()
        if asked.keys != keys:  # the engine itself holds more, or less, than it did
            by_key = dict(zip(split_keys(asked.keys), told.tolist(), strict=True))
            told = np.array([by_key.get(key, NO_TIER) for key in split_keys(keys)], np.uint8)
        return np.minimum(found, told)

    def forget(self, request: str) -> None:
        """The request is gone."""
        asked = self._asked.pop(request, None)
        if asked is not None:
            asked.answer.cancel()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _knows(self) -> bool:
        return all(tier.backend.capabilities.knows for tier in self._store.tiers)

    def _ask(self, spaces: list[Namespace], keys: bytes, parent: bytes) -> NDArray[np.uint8]:
        try:
            return _together([self._store.lookup(batch) for batch in _batches(spaces, keys, parent)])
        except Exception:  # of a store that closes
            logger.debug("a lookup failed", exc_info=True)
            return np.full(len(keys) // KEY_BYTES, NO_TIER, np.uint8)


def _batches(spaces: Sequence[Namespace], keys: bytes, parent: bytes) -> list[KeyBatch]:
    parents = chain_parents(keys, parent)
    return [KeyBatch(space, keys, parents) for space in spaces]


def _together(found: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """NO_TIER is the largest number, so the maximum is the slowest, or none."""
    return np.maximum.reduce(found)

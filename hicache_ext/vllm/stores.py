"""One store for each configuration in a process: vLLM's two halves of a connector often live in the same one.

Belongs here: sharing and its end. Does not belong here: what a store does.
"""

from __future__ import annotations

import os
import threading

from hicache_ext.config import Config
from hicache_ext.store import TieredStore, inject

_lock = threading.Lock()
_open: dict[tuple[int, str], tuple[TieredStore | inject.FaultyStore, int]] = {}


def acquire(config: Config) -> TieredStore | inject.FaultyStore:
    """The process's store of this configuration. Raises as TieredStore.open. `release` it."""
    name = (os.getpid(), config.model_dump_json())
    with _lock:
        store, users = _open.get(name, (None, 0))
        if store is None:
            store = inject.wrap(TieredStore.open(config))
        _open[name] = (store, users + 1)
        return store


def release(config: Config) -> None:
    """Who acquired it does not use it any more; the last one closes it."""
    name = (os.getpid(), config.model_dump_json())
    with _lock:
        found = _open.pop(name, None)
        if found is None:
            return
        store, users = found
        if users > 1:
            _open[name] = (store, users - 1)
            return
    store.close()

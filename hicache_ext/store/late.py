"""A tier that could not be opened at the start: absent until it can be, and nobody's trouble meanwhile.

Belongs here: trying again. Does not belong here: a configuration that is wrong (an OptionError is the user's to mend,
and stops the start), or a server that goes away later (the backend's own business, and Health's).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from hicache_ext.page import Namespace
from storage_backends.base import (
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
    ResidencyListener,
)

logger = logging.getLogger(__name__)

_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 60.0


class LateBackend(Backend):
    """Answers that nothing is there and takes nothing, until `opening` succeeds; from then on it is that backend."""

    def __init__(
        self, name: str, opening: Callable[[], Backend], error: Exception, dispatcher: Dispatcher,
        first: float = _FIRST_SECONDS,
    ) -> None:  # fmt: skip
        """error: why the first attempt failed. first: seconds to the second, doubled each time."""
        super().__init__(BackendOptions(), dispatcher)
        self._name, self._opening, self._error = name, opening, error
        self._inner: Backend | None = None
        self._capabilities = Capabilities(persistent=False, shared=False)
        self._memory: list[tuple[int, int]] = []
        self._device: int | None = None
        self._wait = first
        self._closing = threading.Event()
        self._lock = threading.Lock()
        logger.error("tier %s: cannot be opened: %s; the others serve, and this one is tried again", name, error)
        self._thread = threading.Thread(target=self._try, name=f"hicache-late-{name}", daemon=True)
        self._thread.start()

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        return self._capabilities if self._inner is None else self._inner.capabilities

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        return np.zeros(len(batch), np.uint8) if self._inner is None else self._inner.lookup(batch)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return np.zeros(len(batch), np.uint8) if self._inner is None else self._inner.lookup_local(batch)

    def read(self, batch: PageBatch) -> Completion:
        return Completion.finished(len(batch), Outcome.MISS) if self._inner is None else self._inner.read(batch)

    def write(self, batch: PageBatch) -> Completion:
        return Completion.finished(len(batch), Outcome.REJECTED) if self._inner is None else self._inner.write(batch)

    def remove(self, batch: KeyBatch) -> int:
        return 0 if self._inner is None else self._inner.remove(batch)

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        if self._inner is not None:
            self._inner.clear(namespaces)

    def going(self, most: int) -> list[tuple[bytes, bytes]]:
        return [] if self._inner is None else self._inner.going(most)

    def register_memory(self, address: int, length: int) -> None:
        with self._lock:
            self._memory.append((address, length))
            if self._inner is not None:
                self._inner.register_memory(address, length)

    def reach_device(self, ordinal: int) -> None:
        with self._lock:
            self._device = ordinal
            if self._inner is not None:
                self._inner.reach_device(ordinal)

    def on_residency(self, listener: ResidencyListener | None) -> None:
        with self._lock:
            self._listener = listener
            if self._inner is not None:
                self._inner.on_residency(listener)

    def tell(self, namespace: bytes) -> bool:
        return self._inner is not None and self._inner.tell(namespace)

    def recheck(self, namespace: bytes, keys: bytes) -> None:
        if self._inner is not None:
            self._inner.recheck(namespace, keys)

    def stats(self) -> Mapping[str, int | float | str]:
        return {"state": f"not open: {self._error}"} if self._inner is None else self._inner.stats()

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            inner = self._inner
        if inner is not None:
            inner.close()

    def _try(self) -> None:
        while not self._closing.wait(self._wait):
            self._wait = min(_LONGEST_SECONDS, self._wait * 2)
            try:
                opened = self._opening()
            except Exception as error:
                self._error = error
                continue
            with self._lock:
                if self._closing.is_set():
                    opened.close()
                    return
                if self._device is not None:
                    opened.reach_device(self._device)
                for address, length in self._memory:
                    opened.register_memory(address, length)
                self._capabilities = opened.capabilities  # first: who hears of a page asks in which medium it is
                opened.on_residency(self._listener)
                self._inner = opened
            logger.warning("tier %s: open now", self._name)
            return

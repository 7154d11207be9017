"""Reads that may not wait: into memory of our own, copied to the caller's pages only once verified and in time.

This is how a deadline and the rule of quiescence (storage_backends.base) go together: whatever the device does
after the deadline, it does to memory that the engine never sees.
"""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import replace

import numpy as np

from storage_backends.base import Backend, Completion, Dispatcher, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory

ALIGNMENT = 4096


class StagingBudget:
    """Bytes of staging memory that may be in flight at once; a read beyond it is REJECTED, not queued."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            if self.used + size > self.limit:
                return False
            self.used += size
            return True

    def give(self, size: int) -> None:
        with self._lock:
            self.used -= size


def read_staged(
    backend: Backend, batch: PageBatch, deadline: float, budget: StagingBudget, dispatcher: Dispatcher
) -> Completion:
    """Read `batch` until `deadline` (time.monotonic() seconds): what is verified by then is copied, the rest TIMEOUT.

    The returned completion is done at the deadline at the latest, and from then on no byte of the batch's buffers
    changes.
    """
    pages = len(batch)
    starts = np.zeros(len(batch.lengths) + 1, np.uint64)
    rounded = (batch.lengths + np.uint64(ALIGNMENT - 1)) & ~np.uint64(ALIGNMENT - 1)
    np.cumsum(rounded, out=starts[1:])
    size = int(starts[-1])
    if not budget.take(size):
        return Completion.finished(pages, Outcome.REJECTED)
    memory = OwnedMemory(max(size, ALIGNMENT))
    staged = replace(batch, addresses=starts[:-1] + np.uint64(memory.address), owner=memory)

    result = Completion(pages, dispatcher)
    lock = threading.Lock()
    inner = backend.read(staged)

    def publish(late: bool) -> None:
        with lock:
            if result.done:
                return
            outcomes = bytearray(inner.outcomes)  # a page's byte is set only after its buffers are verified
            for page, outcome in enumerate(outcomes):
                if outcome == Outcome.HIT:
                    for j in range(int(batch.offsets[page]), int(batch.offsets[page + 1])):
                        ctypes.memmove(int(batch.addresses[j]), int(staged.addresses[j]), int(batch.lengths[j]))
                elif outcome == 0:
                    outcomes[page] = Outcome.TIMEOUT
            if late:
                inner.cancel()
            result.settle_many(range(pages), outcomes)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), publish, (True,))
    timer.daemon = True

    def arrived(_: Completion) -> None:
        timer.cancel()
        publish(False)
        budget.give(size)
        memory.close()

    timer.start()
    inner.on_done(arrived)
    return result

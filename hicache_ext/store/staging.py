"""Reads that may not wait: into memory of our own, copied to the caller's pages only once verified and in time.

This is how a deadline and the rule of quiescence (storage_backends.base) go together: whatever the device does
after the deadline, it does to memory that the engine never sees.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from hicache_ext.store.copies import CopyBudget, copy_pages
from storage_backends.base import Backend, Completion, Dispatcher, Outcome, PageBatch


def read_staged(
    backend: Backend, batch: PageBatch, deadline: float, budget: CopyBudget, dispatcher: Dispatcher
) -> Completion:
    """Read `batch` until `deadline` (time.monotonic() seconds), or until it is cancelled: what is verified by then is
    copied, the rest TIMEOUT.

    The returned completion is done at the deadline at the latest, and from then on no byte of the batch's buffers
    changes. Beyond the budget everything is REJECTED.
    """
    pages = len(batch)
    staged = budget.take(batch)
    if staged is None:
        return Completion.finished(pages, Outcome.REJECTED)
    result = Completion(pages, dispatcher)
    lock = threading.Lock()
    try:
        inner = backend.read(staged)
    except BaseException:
        budget.give(staged)
        raise

    def publish(late: bool) -> None:
        with lock:
            if result.done:
                return
            outcomes = bytearray(inner.outcomes)  # a page's byte is set only after its buffers are verified
            good = [page for page, outcome in enumerate(outcomes) if outcome == Outcome.HIT]
            copy_pages(staged, good, batch, good)
            if late:
                inner.cancel()
            result.settle_many(range(pages), [outcome or Outcome.TIMEOUT for outcome in outcomes])

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), publish, (True,))
    timer.daemon = True

    def arrived(_: Completion) -> None:
        timer.cancel()
        publish(False)
        budget.give(staged)

    timer.start()
    result.on_cancel(partial(publish, True))
    inner.on_done(arrived)
    return result

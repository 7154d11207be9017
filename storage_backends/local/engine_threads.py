"""The engine that works everywhere: preadv and pwritev on a bounded set of threads.

Belongs here: the threads. Does not belong here: the system calls (storage_backends.vectored), accounting and close
(engine_common).

`done` runs on the thread that moved the bytes, while they are warm in its cache.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from storage_backends.local.engine import EngineUnavailable, Transfer
from storage_backends.local.engine_common import CountedEngine
from storage_backends.vectored import WORKS, move


class ThreadsEngine(CountedEngine):
    """workers: threads, and so transfers in flight at a time."""

    name = "threads"
    option_names = frozenset({"workers"})

    def __init__(self, workers: int = 16) -> None:
        super().__init__()
        if not WORKS:
            raise EngineUnavailable("needs preadv of a 64-bit Linux")
        self.depth = workers
        self._queue: SimpleQueue[Transfer | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"hicache-io-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def _enqueue(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            self._queue.put(transfer)

    def _withdraw(self) -> list[Transfer]:
        waiting = []
        try:
            while True:
                transfer = self._queue.get_nowait()
                if transfer is not None:
                    waiting.append(transfer)
        except Empty:
            return waiting

    def _stop(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _work(self) -> None:
        while (transfer := self._queue.get()) is not None:
            cancelled = transfer.cancelled is not None and transfer.cancelled.is_set()
            self._finish(
                transfer,
                -errno.ECANCELED if cancelled else move(transfer.fd, transfer.offset, transfer.iov, transfer.write),
            )

"""The engine that works everywhere: preadv and pwritev on a bounded set of threads.

Belongs here: the two system calls and the threads. Does not belong here: accounting and close (engine_common).

The calls go through ctypes straight on the transfer's array of buffers: no Python object per buffer, and the GIL is
released while the kernel works. `done` runs on the thread that moved the bytes, while they are warm in its cache.
"""

from __future__ import annotations

import ctypes
import errno
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from storage_backends.local.engine import EngineUnavailable, Transfer
from storage_backends.local.engine_common import IOV_MAX, CountedEngine, outcome, rest_of

_libc = ctypes.CDLL(None, use_errno=True)

#: Seconds before a call that gave EAGAIN is repeated.
_PAUSE = 0.001


class ThreadsEngine(CountedEngine):
    """workers: threads, and so transfers in flight at a time."""

    name = "threads"
    option_names = frozenset({"workers"})

    def __init__(self, workers: int = 16) -> None:
        super().__init__()
        if ctypes.sizeof(ctypes.c_void_p) != 8 or not hasattr(_libc, "preadv"):
            raise EngineUnavailable("needs preadv of a 64-bit Linux")
        self._calls = {False: _libc.preadv, True: _libc.pwritev}
        for call in self._calls.values():
            call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
            call.restype = ctypes.c_ssize_t
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
            self._finish(transfer, -errno.ECANCELED if cancelled else self._move(transfer))

    def _move(self, transfer: Transfer) -> int:
        call, length, moved, stalls = self._calls[transfer.write], transfer.length, 0, 0
        while moved < length:
            rest = rest_of(transfer.iov, moved)
            result = call(transfer.fd, rest.ctypes.data, min(len(rest), IOV_MAX), transfer.offset + moved)
            if result < 0:
                result = -ctypes.get_errno()
            ended = outcome(result, moved, length, transfer.write, stalls)
            if ended is not None:
                return ended
            if result == -errno.EAGAIN:
                time.sleep(_PAUSE)
            moved += max(result, 0)
            stalls = 0 if result > 0 else stalls + 1
        return moved

"""What the engines written in Python share: accounting of transfers, refusal, close.

Does not belong here: how bytes are moved (engine_threads, engine_liburing, storage_backends.vectored), or which engine
is used (engine).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from storage_backends.local.engine import IoEngine, Transfer

logger = logging.getLogger(__name__)


class CountedEngine(IoEngine):
    """Counts transfers from `submit` until their `done` has returned, so that `close` knows when memory is quiet.

    A subclass moves bytes and ends every transfer that it was given through `_finish`, exactly once.
    """

    def __init__(self) -> None:
        self.passed_over = {}
        self._changed = threading.Condition()
        self._unfinished = 0
        self._closed = False
        self._pid = os.getpid()

    @abstractmethod
    def _enqueue(self, transfers: Sequence[Transfer]) -> None:
        """Take these over; must not block and is called under the engine's lock, so that their order is kept."""

    @abstractmethod
    def _withdraw(self) -> list[Transfer]:
        """Give back every transfer that has not begun."""

    @abstractmethod
    def _stop(self) -> None:
        """Let the threads end once nothing is in flight."""

    def submit(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            check_iov(transfer.iov)
        # A forked child has none of the threads, and must not touch a ring that it shares with its parent.
        # Asked before the lock, which another thread may have held at the time of the fork.
        accepted = os.getpid() == self._pid
        if accepted:
            with self._changed:
                accepted = not self._closed
                if accepted:
                    self._unfinished += len(transfers)
                    self._enqueue(transfers)
        if not accepted:
            on_a_thread_of_its_own(transfers)

    def close(self, timeout: float) -> bool:
        if os.getpid() != self._pid:
            return True
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            waiting = self._withdraw()
        for transfer in waiting:
            self._finish(transfer, -errno.ECANCELED)
        with self._changed:
            quiet = self._changed.wait_for(lambda: not self._unfinished, max(0.0, deadline - time.monotonic()))
        self._stop()
        return quiet

    def _finish(self, transfer: Transfer, result: int) -> None:
        end(transfer, result)
        with self._changed:
            self._unfinished -= 1
            if not self._unfinished:
                self._changed.notify_all()


def end(transfer: Transfer, result: int) -> None:
    """Give the transfer its result; what its owner raises is logged and stops no thread of the engine."""
    try:
        transfer.done(result)
    except Exception:
        logger.exception("the end of a transfer failed")


def on_a_thread_of_its_own(transfers: Sequence[Transfer], result: int = -errno.ECANCELED) -> None:
    """End these transfers with `result` without calling `done` on the caller's thread."""

    def run() -> None:
        for transfer in transfers:
            end(transfer, result)

    if not transfers:
        return
    try:
        threading.Thread(target=run, name="hicache-io-refused", daemon=True).start()
    except RuntimeError:  # the interpreter is going down and starts no threads any more
        run()


def check_iov(iov: np.ndarray) -> None:
    """Raise for an array that the kernel would read as other addresses than the caller meant."""
    if iov.dtype != np.uint64 or iov.ndim != 2 or iov.shape[1] != 2:
        raise TypeError(f"iov must be uint64[k, 2], not {iov.dtype}{list(iov.shape)}")

"""The io_uring engine for installs without the compiled one: liburing's C functions, called from one Python thread.

Belongs here: the ring thread and what it does with transfers. Does not belong here: liburing's functions
(_liburing_abi), accounting and close (engine_common).

One thread owns the ring, since the kernel's cheapest mode wants a single issuer: it takes transfers from a queue, in
order, submits all that fit in one call, and sleeps in that call until something completes. Other threads wake it
through an eventfd that the ring itself reads. `done` runs on a few threads of its own, so that a checksum never delays
the ring.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from storage_backends.local._liburing_abi import SQE_ASYNC, Ring
from storage_backends.local.engine import EngineUnavailable, Transfer
from storage_backends.local.engine_common import CountedEngine
from storage_backends.vectored import IOV_MAX, outcome, rest_of

logger = logging.getLogger(__name__)

#: Keeps the GIL, unlike os.eventfd_write: getting it back from busy threads takes a thousand times the call.
_libc = ctypes.PyDLL(None)
_libc.eventfd_write.argtypes = (ctypes.c_int, ctypes.c_uint64)

#: User data of the eventfd's read; transfers count from 1.
_WAKE = 0

#: Seconds before a refused submission (no memory, completion queue full) is repeated.
_PAUSE = 0.001


@dataclass(slots=True)
class _Flight:
    """A transfer that has begun. `iov` is what the kernel was given, and is kept until it says that it is done."""

    transfer: Transfer
    length: int
    moved: int
    iov: np.ndarray
    flags: int = 0
    stalls: int = 0


class LiburingEngine(CountedEngine):
    """depth: transfers in flight at a time. completion_threads: threads on which `done` runs."""

    name = "liburing"
    option_names = frozenset({"depth", "completion_threads"})

    def __init__(self, depth: int = 64, completion_threads: int = 2) -> None:
        super().__init__()
        self.depth = depth
        self._waiting: deque[Transfer] = deque()
        self._again: deque[_Flight] = deque()
        self._flying: dict[int, _Flight] = {}
        self._number = _WAKE
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._wake_count = ctypes.c_uint64()
        self._ended: SimpleQueue[tuple[Transfer, int] | None] = SimpleQueue()
        opened: SimpleQueue[Exception | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="hicache-io-ring", daemon=True)
        self._thread.start()
        if (problem := opened.get()) is not None:
            os.close(self._wake_fd)
            raise problem
        self._completers = [
            threading.Thread(target=self._complete, name=f"hicache-io-done-{i}", daemon=True)
            for i in range(completion_threads)
        ]
        for thread in self._completers:
            thread.start()

    def _enqueue(self, transfers: Sequence[Transfer]) -> None:
        self._waiting.extend(transfers)
        self._wake()

    def _withdraw(self) -> list[Transfer]:
        waiting = []
        try:
            while True:
                waiting.append(self._waiting.popleft())
        except IndexError:
            return waiting

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._wake()

    def _wake(self) -> None:
        _libc.eventfd_write(self._wake_fd, 1)

    def _complete(self) -> None:
        while (ended := self._ended.get()) is not None:
            self._finish(*ended)

    # The ring thread.

    def _run(self, opened: SimpleQueue[Exception | None]) -> None:
        try:
            ring = Ring(self.depth + 1)  # and one for the eventfd
        except Exception as error:
            opened.put(error if isinstance(error, EngineUnavailable) else EngineUnavailable(repr(error)))
            return
        opened.put(None)
        self._listen(ring)
        while not (self._stopping and not self._flying and not self._again):
            self._begin(ring)
            result = ring.submit_and_wait()
            if result < 0 and result != -errno.EINTR:
                time.sleep(_PAUSE)
            for data, moved in ring.reap():
                if data == _WAKE:
                    self._listen(ring)
                else:
                    self._landed(data, moved)
        ring.close()
        os.close(self._wake_fd)
        for _ in self._completers:
            self._ended.put(None)

    def _listen(self, ring: Ring) -> None:
        ring.prepare_read(self._wake_fd, ctypes.addressof(self._wake_count), 8, _WAKE)

    def _begin(self, ring: Ring) -> None:
        """Prepare what fits: first the rest of what has begun, then what waits, in order."""
        while len(self._flying) < self.depth:
            if self._again:
                flight = self._again.popleft()
            else:
                try:
                    transfer = self._waiting.popleft()
                except IndexError:
                    return
                if transfer.cancelled is not None and transfer.cancelled.is_set():
                    self._ended.put((transfer, -errno.ECANCELED))
                    continue
                flight = _Flight(transfer, transfer.length, 0, np.ascontiguousarray(transfer.iov))
            transfer = flight.transfer
            self._number += 1
            count = min(len(flight.iov), IOV_MAX)
            offset = transfer.offset + flight.moved
            ring.prepare(transfer.write, transfer.fd, flight.iov.ctypes.data, count, offset, self._number, flight.flags)
            self._flying[self._number] = flight

    def _landed(self, number: int, result: int) -> None:
        flight = self._flying.pop(number)
        transfer = flight.transfer
        ended = outcome(result, flight.moved, flight.length, transfer.write, flight.stalls)
        if ended is not None:
            self._ended.put((transfer, ended))
            return
        if result == -errno.EAGAIN:
            flight.flags = SQE_ASYNC  # the kernel's own worker may block where the submission may not
        flight.moved += max(result, 0)
        flight.stalls = 0 if result > 0 else flight.stalls + 1
        flight.iov = rest_of(transfer.iov, flight.moved)
        self._again.append(flight)

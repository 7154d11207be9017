"""cuFile open in this process, for one tier: registered memory, lanes, and whether it still serves.

Belongs here: what outlives a single transfer. Does not belong here: slots (slots.py), whether it is used (decision.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from hicache_ext.cuda import CudaUnavailable, open_device
from storage_backends.gds.decision import Decision, Way

if TYPE_CHECKING:
    from hicache_ext import _cuda

logger = logging.getLogger(__name__)

#: Parts in a row that failed on the device's side, after which it is not asked any more.
FAILURES = 4
#: Thread blocks of a checksum kernel: this many multiprocessors at most.
CHECKSUM_BLOCKS = 16
NUMBERS = {Way.CALLS: 0, Way.BATCH: 1, Way.STREAM: 2}
#: Threads that move parts, each with a lane of its own.
THREADS = {Way.CALLS: 8, Way.BATCH: 4, Way.STREAM: 4}

#: Libraries that forbid compatibility mode in this process: said before their driver opens, which it does once.
_strict: set[str] = set()


class Route:
    """Thread-safe. out: why device memory is not served any more, "" while it is."""

    def __init__(self, decision: Decision, on_out: Callable[[str], None]) -> None:
        """on_out: called once, when it goes out of use. CudaUnavailable: not here after all."""
        self.decision, self._on_out = decision, on_out
        self.device = open_device(decision.device)
        from hicache_ext import _cuda

        self._cuda = _cuda
        try:
            # In stream order nothing may fall back to compatibility mode, not for one file either (decision.NO_STREAM).
            strict = decision.way is Way.STREAM and decision.library not in _strict
            self.library = _cuda.cufile(self.device, decision.library, strict)
            if strict:
                _strict.add(decision.library)
        except _cuda.Unavailable as error:
            raise CudaUnavailable(str(error)) from error
        self.way = NUMBERS[decision.way]
        self.threads = THREADS[decision.way]
        self.out = ""
        self.unregistered = ""
        self._failures = 0
        self._lock = threading.Lock()
        self._buffers: list[_cuda.CuFileBuffer] = []
        self._starts = self._ends = np.empty(0, np.uint64)

    def is_on_device(self, address: int, length: int) -> bool:
        return self.device.memory_kind(address, length) == "device"

    def register(self, address: int, length: int) -> None:
        """Device memory that many transfers will use."""
        try:
            made = self._cuda.cufile_buffer(self.library, address, length)
        except (self._cuda.Unavailable, self._cuda.Failed) as error:
            if not self.unregistered:
                self.unregistered = str(error)
                logger.warning("gds tier: device memory is used unregistered, at one more copy: %s", error)
            return
        with self._lock:
            self._buffers = sorted([*self._buffers, made], key=lambda one: one.address)
            self._starts = np.array([one.address for one in self._buffers], np.uint64)
            self._ends = np.array([one.address + one.length for one in self._buffers], np.uint64)

    def bases(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint64[n]: where the registered memory begins that each piece lies in; its own address where it does not."""
        with self._lock:
            starts, ends = self._starts, self._ends
        if not len(starts):
            return addresses
        at = np.searchsorted(starts, addresses, side="right") - 1
        inside = (at >= 0) & (addresses + lengths <= ends[at])
        return np.where(inside, starts[at], addresses)

    def lane(self) -> _cuda.CuFileLane:
        """CudaUnavailable: none to be had."""
        try:
            return self._cuda.cufile_lane(self.library)
        except (self._cuda.Unavailable, self._cuda.Failed) as error:
            raise CudaUnavailable(str(error)) from error

    def file(self, fd: int) -> _cuda.CuFileFile:
        """CudaUnavailable: cuFile does not take it."""
        try:
            return self._cuda.cufile_file(self.library, fd)
        except (self._cuda.Unavailable, self._cuda.Failed) as error:
            raise CudaUnavailable(str(error)) from error

    def well(self) -> None:
        self._failures = 0

    def failed(self, why: str, for_good: bool = False) -> None:
        """A part failed for what is on the device's side. for_good: as will all others."""
        with self._lock:
            self._failures += 1
            if self._failures == 1:
                logger.warning("gds tier: device memory: %s", why)
            if self.out or not (for_good or self._failures >= FAILURES):
                return
            self.out = why
        logger.error("gds tier: GPU-direct storage is out of use, pages go through host memory: %s", why)
        self._on_out(why)

    @property
    def failures(self) -> tuple[type[Exception], type[Exception]]:
        """What the compiled module raises: nothing was begun; something failed that all others will meet."""
        return self._cuda.Unavailable, self._cuda.Failed

    def close(self) -> None:
        """Let go of registered memory: nothing is under way any more."""
        with self._lock:
            self._buffers = []
            self._starts = self._ends = np.empty(0, np.uint64)

"""The native engine: io_uring in C++ (csrc/io), one ring per thread, checksums of slots on those threads.

Belongs here: handing work to the compiled module and bringing its ends back, a group at a time, on one Python thread.
Does not belong here: what rings do with pages, or what a slot is.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from storage_backends.buffers import OwnedMemory
from storage_backends.local.engine import EngineUnavailable, IoEngine, Transfer
from storage_backends.local.engine_common import check_iov, end, on_a_thread_of_its_own
from storage_backends.local.slots import CancelFlag, Ended, SlotEngine, SlotGroup

try:
    import hicache_ext._io as _io
except ModuleNotFoundError:
    raise  # not built
except ImportError as error:  # built for another machine than this one
    raise EngineUnavailable(f"cannot be loaded: {error}") from error

logger = logging.getLogger(__name__)

_NO_COPIES = np.empty(0, np.uint64)
_PROBE_BYTES = 4096
_PROBE_SECONDS = 5.0


class _Job:
    """One call of the module. alive: what must not be freed before its pages have ended."""

    __slots__ = ("alive", "ended", "open")

    def __init__(self, pages: int, ended: Ended, alive: object) -> None:
        self.open, self.ended, self.alive = pages, ended, alive


def rings_for(processors: int) -> int:
    """Rings for an engine on a machine with so many processors.

    A ring's thread verifies what it reads, at a few GB/s; an array of disks gives more than two of them can. But every
    ring pins the host pool once more, and a tensor-parallel server has an engine in each of its processes.
    """
    return max(2, min(6, processors // 4))


class NativeEngine(IoEngine, SlotEngine):
    """rings: rings, and threads for them; None: as many as this machine can use. depth: pages in flight in each.

    sqpoll: a kernel thread takes the requests (it spins: CPU for latency). iopoll: completions are polled (only for
    devices with polled queues, and direct I/O); tried first on a file in `directory`, or on the device that it is,
    where that is given, and left off, with a line, where it does not work. direct: whether the files will do O_DIRECT;
    without it reads and writes copy to and from the page cache, which more threads than these do better.
    """

    name = "native"
    option_names = frozenset({"rings", "depth", "sqpoll", "iopoll", "direct", "directory"})

    def __init__(
        self, rings: int | None = None, depth: int = 32, sqpoll: bool = False, iopoll: bool = False,
        direct: bool = True, directory: Path | None = None,
    ) -> None:  # fmt: skip
        if not direct:
            raise EngineUnavailable("the file system does no direct I/O")
        if iopoll and directory is not None and (problem := polling_refused(directory)):
            logger.warning("I/O engine native: completions are not polled: %s", problem)
            iopoll = False
        rings = rings_for(len(os.sched_getaffinity(0))) if rings is None else rings
        try:
            self._io = _io.Engine(rings, depth, sqpoll, iopoll)
        except _io.Unavailable as error:
            raise EngineUnavailable(str(error)) from error
        self.passed_over = {}
        self.depth = rings * depth
        self.unregistered = ""  # why memory is used as it is, when it is
        self._jobs: dict[int, _Job] = {}
        self._token = 0
        self._closed = False
        self._changed = threading.Condition()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=_bring_ends, args=(self._io, self._jobs, self._changed), daemon=True)
        self._thread.name = "hicache-io-ends"
        self._thread.start()
        _open_engines.add(self)

    @property
    def description(self) -> str:
        return str(self._io.description)

    def submit(self, transfers: Sequence[Transfer]) -> None:
        if not transfers:
            return
        for transfer in transfers:
            check_iov(transfer.iov)
        starts = np.zeros(len(transfers) + 1, np.uint64)
        np.cumsum([len(transfer.iov) for transfer in transfers], out=starts[1:])
        fds = np.array([transfer.fd for transfer in transfers], np.int32)
        writes = np.array([transfer.write for transfer in transfers], np.uint8)
        offsets = np.array([transfer.offset for transfer in transfers], np.uint64)
        iov = np.concatenate([transfer.iov for transfer in transfers])
        cancelled = np.array([_cancel_address(transfer) for transfer in transfers], np.uint64)

        def ended(pages: Sequence[int], moved: Sequence[int], _: bytes) -> None:
            for page, result in zip(pages, moved, strict=True):
                end(transfers[page], result)

        if not self._start(
            len(transfers), ended, transfers,
            lambda token: self._io.submit(token, fds, writes, offsets, starts, iov, cancelled),
        ):  # fmt: skip
            on_a_thread_of_its_own(transfers)

    def submit_slots(self, group: SlotGroup) -> None:
        io = group.io
        fds = np.array([extent.fd for extent in group.extents], np.int32)
        files = np.array([extent.serial for extent in group.extents], np.uint64)
        copies = _NO_COPIES if group.copies is None else np.ascontiguousarray(group.copies).reshape(-1)
        if not self._start(
            len(group), group.ended, group,
            lambda token: self._io.submit_slots(
                token, group.write, group.namespace, group.keys, io.shape.header_bytes, io.lengths, fds, files,
                group.offsets, group.iov, copies, group.cancelled.address,
            ),
        ):  # fmt: skip
            count = len(group)
            refused = (range(count), [-errno.ECANCELED] * count, bytes(count))
            threading.Thread(target=group.ended, args=refused, name="hicache-io-refused", daemon=True).start()

    def _start(self, pages: int, ended: Ended, alive: object, call: Callable[[int], bool]) -> bool:
        """Whether the module took it: not after close, and not in a forked child, which has none of the threads."""
        if os.getpid() != self._pid:
            return False
        with self._changed:
            if self._closed:
                return False
            self._token += 1
            token = self._token
            self._jobs[token] = _Job(pages, ended, alive)
        try:
            taken = call(token)
        except BaseException:
            self._jobs.pop(token)
            raise
        if not taken:
            self._jobs.pop(token)
        return taken

    def register_memory(self, address: int, length: int) -> None:
        if os.getpid() != self._pid:
            return
        problem = self._io.register_memory(address, length)
        if problem and not self.unregistered:
            self.unregistered = problem
            logger.warning("I/O engine native: memory is used unregistered, at more CPU: %s (said once)", problem)

    def retain_files(self, serials: Sequence[int]) -> None:
        """Let go of every registered file but these: a deleted file's space comes back with its last user."""
        if os.getpid() == self._pid:
            self._io.retain(list(serials))

    def close(self, timeout: float) -> bool:
        if os.getpid() != self._pid:
            return True
        until = time.monotonic() + timeout
        with self._changed:
            self._closed = True
        quiet: bool = self._io.close(timeout)
        with self._changed:
            quiet = self._changed.wait_for(lambda: not self._jobs, max(0.0, until - time.monotonic())) and quiet
        if quiet:
            self._io.stop_reaping()
        return quiet

    def _abandon(self) -> None:
        """The interpreter is going down: its threads may not enter it any more."""
        if os.getpid() != self._pid:
            return
        self.close(1.0)
        self._io.stop_reaping()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)


def polling_refused(directory: Path) -> str:
    """Why completions of I/O on files in `directory`, or on the block device that this is, cannot be polled for; empty
    where they can. Tried for real: the kernel says it only to a request. A device is only read.
    """
    try:
        engine = NativeEngine(rings=1, depth=1, iopoll=True)
    except EngineUnavailable as error:
        return str(error)
    memory, path = OwnedMemory(_PROBE_BYTES), directory / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    device = directory.is_block_device()
    iov = np.array([[memory.address, _PROBE_BYTES]], np.uint64)
    results: SimpleQueue[int] = SimpleQueue()

    def done(moved: int, _: OwnedMemory = memory) -> None:  # which must last as long as a device may write to it
        results.put(moved)

    fd = -1
    try:
        if device:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        for write in (False,) if device else (True, False):
            engine.submit([Transfer(fd, 0, iov, write, done)])
            moved = results.get(timeout=_PROBE_SECONDS)
            if moved != _PROBE_BYTES:
                return os.strerror(-moved) if moved < 0 else "a transfer stopped half way"
    except OSError as error:
        return f"open with O_DIRECT: {error.strerror}"
    except Empty:
        return "the device does not answer"
    finally:
        if not device:
            path.unlink(missing_ok=True)
        engine.close(_PROBE_SECONDS)
        if fd >= 0:
            os.close(fd)
    return ""


def _cancel_address(transfer: Transfer) -> int:
    """Where the ring can see that the transfer is cancelled; other events than ours are asked once, now."""
    flag = transfer.cancelled
    if isinstance(flag, CancelFlag):
        return flag.address
    return _ALWAYS.address if flag is not None and flag.is_set() else 0


_ALWAYS = CancelFlag()
_ALWAYS.set()


def _bring_ends(module: _io.Engine, jobs: dict[int, _Job], changed: threading.Condition) -> None:
    """One look at the interpreter's lock for all that ended since the last one."""
    while (groups := module.reap()) is not None:
        for token, pages, moved, verdicts in groups:
            job = jobs[token]
            try:
                job.ended(np.frombuffer(pages, np.uint32).tolist(), np.frombuffer(moved, np.int64).tolist(), verdicts)
            except Exception:
                logger.exception("the end of a group failed")
            job.open -= len(verdicts)
            if not job.open:
                with changed:
                    del jobs[token]
                    changed.notify_all()


_open_engines: weakref.WeakSet[NativeEngine] = weakref.WeakSet()


@atexit.register
def _abandon_all() -> None:
    for engine in list(_open_engines):
        engine._abandon()

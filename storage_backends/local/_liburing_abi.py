"""liburing's C functions through ctypes: finding the library, its signatures, and a thin ring of addresses and numbers.

Belongs here: what is true of liburing. Does not belong here: transfers (engine_liburing).

The library is the one inside the PyPI package `liburing`, which exports all of liburing's C functions (the inline ones
as well, as `liburing-ffi` does), or the system's `liburing-ffi`. The package's Python functions are not used: they keep
the GIL while they wait and submit, and its `Iovec` never gives a memoryview back, which leaks an object per buffer.
Only functions are called; no structure of liburing is looked into but the completion entry, which is kernel ABI.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from storage_backends.local.engine import EngineUnavailable

SETUP_SUBMIT_ALL = 1 << 7
SETUP_COOP_TASKRUN = 1 << 8
SETUP_SINGLE_ISSUER = 1 << 12
SETUP_DEFER_TASKRUN = 1 << 13

SQE_ASYNC = 1 << 4

#: Bytes given to the opaque `struct io_uring` (216 in liburing 2.x).
_RING_BYTES = 1024

_INT, _UINT, _U64, _PTR = ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "io_uring_queue_init": (_INT, (_UINT, _PTR, _UINT)),
    "io_uring_queue_exit": (None, (_PTR,)),
    "io_uring_ring_dontfork": (_INT, (_PTR,)),
    "io_uring_get_sqe": (_PTR, (_PTR,)),
    "io_uring_prep_readv": (None, (_PTR, _INT, _PTR, _UINT, _U64)),
    "io_uring_prep_writev": (None, (_PTR, _INT, _PTR, _UINT, _U64)),
    "io_uring_prep_read": (None, (_PTR, _INT, _PTR, _UINT, _U64)),
    "io_uring_sqe_set_data64": (None, (_PTR, _U64)),
    "io_uring_sqe_set_flags": (None, (_PTR, _UINT)),
    "io_uring_submit_and_wait": (_INT, (_PTR, _UINT)),
    "io_uring_peek_batch_cqe": (_UINT, (_PTR, _PTR, _UINT)),
    "io_uring_cq_advance": (None, (_PTR, _UINT)),
}


class Completed(ctypes.Structure):
    """struct io_uring_cqe"""

    _fields_ = (("user_data", ctypes.c_uint64), ("res", ctypes.c_int32), ("flags", ctypes.c_uint32))


class Library(NamedTuple):
    """The same library twice. quick: for calls that take less than giving up the GIL and waiting for it again does.
    slow: for calls that enter the kernel, without the GIL.
    """

    quick: ctypes.PyDLL
    slow: ctypes.CDLL


def load() -> Library:
    """The library with its signatures set. Raises EngineUnavailable."""
    problems = []
    for path in _candidates():
        try:
            library = Library(ctypes.PyDLL(path), ctypes.CDLL(path))
            for handle in library:
                for name, (result, arguments) in _SIGNATURES.items():
                    function = getattr(handle, name)
                    function.restype, function.argtypes = result, arguments
            return library
        except (OSError, AttributeError) as error:
            problems.append(f"{Path(path).name}: {error}")
    raise EngineUnavailable("; ".join(problems) or "neither the Python package liburing nor liburing-ffi is installed")


def _candidates() -> list[str]:
    paths = []
    # find_spec of the submodule would run the package's __init__; the file is beside it.
    package = importlib.util.find_spec("liburing")
    for folder in (package.submodule_search_locations or []) if package else []:
        paths += sorted(str(path) for path in Path(folder).glob("liburing*.so"))
    system = ctypes.util.find_library("uring-ffi")
    return paths + ([system] if system else [])


class Ring:
    """One ring, for the thread that made it alone. Numbers and addresses in, (user data, result) out."""

    def __init__(self, entries: int) -> None:
        library = load()
        self._quick, self._slow = library.quick, library.slow
        self._ring = ctypes.create_string_buffer(_RING_BYTES)
        self._at = ctypes.addressof(self._ring)
        self._ready = (ctypes.POINTER(Completed) * entries)()
        self._entries = entries
        common = SETUP_SUBMIT_ALL | SETUP_COOP_TASKRUN
        # Linux 6.1 with deferred task work is the cheapest; 5.19; anything older.
        for flags in (common | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN, common, 0):
            result = self._slow.io_uring_queue_init(entries, self._at, flags)
            if result != -errno.EINVAL:
                break
        if result < 0:
            raise EngineUnavailable(_explain(-result))
        self._slow.io_uring_ring_dontfork(self._at)

    def prepare(self, write: bool, fd: int, iov: int, count: int, offset: int, data: int, flags: int = 0) -> None:
        """Queue one vectored transfer; iov is the array's address."""
        sqe = self._entry(data)
        call = self._quick.io_uring_prep_writev if write else self._quick.io_uring_prep_readv
        call(sqe, fd, iov, count, offset)
        self._quick.io_uring_sqe_set_data64(sqe, data)
        if flags:
            self._quick.io_uring_sqe_set_flags(sqe, flags)

    def prepare_read(self, fd: int, address: int, length: int, data: int) -> None:
        """Queue one plain read, for descriptors that have no offset."""
        sqe = self._entry(data)
        self._quick.io_uring_prep_read(sqe, fd, address, length, 0)
        self._quick.io_uring_sqe_set_data64(sqe, data)

    def _entry(self, data: int) -> int:
        sqe = self._quick.io_uring_get_sqe(self._at)
        if not sqe:  # the owner keeps fewer in flight than there are entries
            raise RuntimeError(f"the submission queue is full at {data}")
        return sqe

    def submit_and_wait(self) -> int:
        """Submit what is prepared and wait for one completion; -errno when the kernel could not (try again)."""
        return self._slow.io_uring_submit_and_wait(self._at, 1)

    def reap(self) -> list[tuple[int, int]]:
        """(user data, result) of everything that has completed."""
        count = self._quick.io_uring_peek_batch_cqe(self._at, self._ready, self._entries)
        if not count:
            return []
        completed = [(entry.user_data, entry.res) for entry in (self._ready[i].contents for i in range(count))]
        self._quick.io_uring_cq_advance(self._at, count)
        return completed

    def close(self) -> None:
        self._slow.io_uring_queue_exit(self._at)


def _explain(number: int) -> str:
    match number:
        case errno.EPERM | errno.EACCES:
            return "io_uring is forbidden here (seccomp profile of the container, or sysctl kernel.io_uring_disabled)"
        case errno.ENOSYS:
            return "this kernel has no io_uring"
        case errno.ENOMEM:
            return "io_uring got no memory (raise ulimit -l)"
        case _:
            return f"io_uring_setup: {os.strerror(number)}"

"""Files of the local tier as the kernel sees them: opening, preallocation, locks.

Belongs here: thin calls that Python lacks or that need care. Does not belong here: what is in the files, or whether a
file system does direct I/O (storage_backends.direct_io).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from storage_backends.direct_io import DirectIo


def open_extent(path: Path, direct: DirectIo, write: bool, create: bool = False) -> int:
    """A file descriptor for an extent. OSError as open raises it."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC
    if direct.works:
        flags |= os.O_DIRECT
    if create:
        flags |= os.O_CREAT | os.O_EXCL
    return os.open(path, flags, 0o600)


def preallocate(fd: int, size: int) -> None:
    """Reserve `size` bytes, so that a later write cannot run out of space. OSError (ENOSPC, ...) when it cannot."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def try_lock(path: Path) -> int | None:
    """An exclusive lock on `path` as an open descriptor, or None when somebody holds it. Gone with the process.

    An open file description's lock (F_OFD_SETLK): two stores in one process exclude each other as well, and whoever
    only wants to know (is_locked) need not take it for a moment. A forked child would share it and hold it beyond its
    parent's end, so the child lets go of its copy of the descriptor, which leaves the parent's lock as it is.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _locks[fd] = _identity(fd)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    return fd


def lock_when_free(path: Path) -> int:
    """As try_lock, but waits for whoever holds it: for locks that are held for a few system calls."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK))
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock. A folder without a lock file has no owner."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # enough to ask, and who only looks may not write
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
        return struct.unpack_from("@h", answer)[0] != fcntl.F_UNLCK
    finally:
        os.close(fd)


_locks: dict[int, tuple[int, int]] = {}


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _let_go() -> None:
    for fd, identity in _locks.items():
        with contextlib.suppress(OSError):
            if _identity(fd) == identity:  # else it was closed, and its number is another file's
                os.close(fd)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def _flock(kind: int) -> bytes:
    """struct flock over the whole file; its process id must be 0 for this kind of lock."""
    return struct.pack("@hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)

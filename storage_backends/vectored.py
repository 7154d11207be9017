"""Vectored transfers between a file and memory: one system call each, and the rest of it where that was short.

Belongs here: preadv, pwritev and their results. Does not belong here: threads, files, or what the bytes mean.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time

import numpy as np

#: The kernel takes at most this many buffers in one call.
IOV_MAX = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 1024

#: Repeats of a call that moves nothing, after which its error is the transfer's: a device may say EAGAIN for ever.
STALLS = 16

#: O_DIRECT moves whole sectors except at the end of a file.
_SECTOR = 512

#: Seconds before a call that gave EAGAIN is repeated.
_PAUSE = 0.001

_libc = ctypes.CDLL(None, use_errno=True)
#: Whether addresses of 64 bits can be handed over; else there are no transfers here.
WORKS = ctypes.sizeof(ctypes.c_void_p) == 8 and hasattr(_libc, "preadv")
if WORKS:
    for _call in (_libc.preadv, _libc.pwritev):
        _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
        _call.restype = ctypes.c_ssize_t


def move(fd: int, offset: int, iov: np.ndarray, write: bool) -> int:
    """Move the whole span: bytes moved (less at the end of a file), or -errno. Blocks, with the GIL released.

    iov: uint64[k, 2], address and length of each buffer. The call goes through ctypes straight on the array: no
    Python object per buffer.
    """
    call, length, moved, stalls = (_libc.pwritev if write else _libc.preadv), int(iov[:, 1].sum()), 0, 0
    while moved < length:
        rest = rest_of(iov, moved)
        result = call(fd, rest.ctypes.data, min(len(rest), IOV_MAX), offset + moved)
        if result < 0:
            result = -ctypes.get_errno()
        ended = outcome(result, moved, length, write, stalls)
        if ended is not None:
            return ended
        if result == -errno.EAGAIN:
            time.sleep(_PAUSE)
        moved += max(result, 0)
        stalls = 0 if result > 0 else stalls + 1
    return moved


def rest_of(iov: np.ndarray, moved: int) -> np.ndarray:
    """The buffers that remain after `moved` bytes (less than the whole), as a contiguous uint64[k, 2]."""
    if not moved:
        return np.ascontiguousarray(iov)
    ends = np.cumsum(iov[:, 1])
    first = int(np.searchsorted(ends, np.uint64(moved), side="right"))
    rest = np.array(iov[first:], order="C")
    skip = np.uint64(moved - (int(ends[first - 1]) if first else 0))
    rest[0, 0] += skip
    rest[0, 1] -= skip
    return rest


def outcome(result: int, moved: int, length: int, write: bool, stalls: int = 0) -> int | None:
    """What a transfer's `done` gets after a call gave `result` (bytes or -errno); None: go on.

    moved: bytes of the transfer before this call. length: bytes of the whole transfer. stalls: calls in a row before
    this one that moved nothing.
    """
    if result in (-errno.EINTR, -errno.EAGAIN):
        return None if stalls < STALLS else result
    if result == -errno.EINVAL and not write and moved % _SECTOR:
        return moved  # O_DIRECT read the file's tail, and what comes after it is not aligned
    if result < 0:
        return result
    if result == 0 or moved + result == length:
        return moved + result
    return None

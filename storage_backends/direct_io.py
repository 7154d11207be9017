"""Whether a file system does direct I/O, and at what alignment: asked of the kernel, and tried.

Does not belong here: transfers, or whose files these are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_DIO_MEM_ALIGN_AT = 152
_DIO_OFFSET_ALIGN_AT = 156
_PROBE_SECONDS = 60

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class DirectIo:
    """Whether a file system does O_DIRECT, and the alignment (bytes) of addresses and of offsets and lengths."""

    works: bool
    memory: int
    offset: int
    reason: str = ""

    @property
    def alignment(self) -> int:
        return max(self.memory, self.offset) if self.works else 1


def probe_direct(directory: Path) -> DirectIo:
    """Try O_DIRECT on a file in `directory` and ask the kernel for its alignment (statx STATX_DIOALIGN, Linux 6.1)."""
    path = directory / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        path.unlink(missing_ok=True)
        return DirectIo(False, 1, 1, f"open with O_DIRECT: {os.strerror(error.errno or errno.EIO)}")
    try:
        return alignment(fd)
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def alignment_of(path: Path, fd: int) -> DirectIo:
    """As probe_direct, for a device or file that is there. fd: open on it. OSError as open raises it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return DirectIo(False, 1, 1, f"open with O_DIRECT: {error.strerror}")
    return alignment(fd)


def alignment(fd: int) -> DirectIo:
    """As the kernel tells it of an open file; what an old kernel does not tell is taken to be 4096."""
    buffer = ctypes.create_string_buffer(256)
    asked = _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer)
    mask = int.from_bytes(buffer.raw[:4], "little")
    if asked != 0 or not mask & _STATX_DIOALIGN:
        return DirectIo(True, 4096, 4096)  # an old kernel: every device takes 4 KiB
    memory = int.from_bytes(buffer.raw[_DIO_MEM_ALIGN_AT : _DIO_MEM_ALIGN_AT + 4], "little")
    offset = int.from_bytes(buffer.raw[_DIO_OFFSET_ALIGN_AT : _DIO_OFFSET_ALIGN_AT + 4], "little")
    if not memory or not offset:
        return DirectIo(False, 1, 1, "the file system says that it does no direct I/O")
    if offset > 4096 or 4096 % offset:
        return DirectIo(False, 1, 1, f"direct I/O wants alignment {offset}, slots have 4096")
    return DirectIo(True, memory, offset)


def remove_old_probes(directory: Path) -> None:
    """Delete what probes of processes that died in the middle left behind."""
    for path in directory.glob(".probe-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _PROBE_SECONDS:
                path.unlink()

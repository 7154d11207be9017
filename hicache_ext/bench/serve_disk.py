"""How fast a folder's disk gives large blocks, with nothing in between: what a storage tier is held against.

Belongs here: that one yardstick, plain O_DIRECT reads by threads. Does not belong here: our engines
(hicache_ext.bench.io).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 2 << 20
_THREADS = 32
_PASSES = 2


def read_gb_per_s(folder: Path, size: int) -> float:
    """10^9 bytes of a new file a second, read by O_DIRECT, 2 MiB at a time by 32 threads: the better of two passes.

    OSError where it cannot.
    """
    size = max(size // (_BLOCK * _THREADS), 1) * _BLOCK * _THREADS
    handle, name = tempfile.mkstemp(prefix="hicache-bench-disk-", dir=folder)
    os.close(handle)
    try:
        file = os.open(name, os.O_RDWR | os.O_DIRECT)
        try:
            os.posix_fallocate(file, 0, size)
            buffers = [mmap.mmap(-1, _BLOCK) for _ in range(_THREADS)]
            for buffer in buffers:
                buffer[:] = os.urandom(1 << 16) * (_BLOCK >> 16)
            _pass(file, buffers, size, os.pwritev)
            os.fsync(file)
            best = 0.0
            for _ in range(_PASSES):
                begin = time.perf_counter()
                _pass(file, buffers, size, os.preadv)
                best = max(best, size / (time.perf_counter() - begin) / 1e9)
            return round(best, 3)
        finally:
            os.close(file)
    finally:
        os.unlink(name)


def _pass(file: int, buffers: list[mmap.mmap], size: int, move: object) -> None:
    assert callable(move)

    def share(number: int) -> None:
        for at in range(number * _BLOCK, size, _BLOCK * len(buffers)):
            if move(file, [buffers[number]], at) != _BLOCK:
                raise OSError(f"a short transfer at {at}")

    with ThreadPoolExecutor(len(buffers)) as pool:
        list(pool.map(share, range(len(buffers))))


def ram_backed(file_system: str) -> bool:
    """Whether a mount (as hicache_ext.bench.machine.file_system tells it) lies in memory."""
    return file_system.split(" ", 1)[0] in ("tmpfs", "ramfs", "hugetlbfs")

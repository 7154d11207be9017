"""Memory that we own: page-aligned, from huge pages where the machine gives them, prefaulted.

Does not belong here: memory of an engine's pools (theirs), or what is read into any of it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np

HUGE_PAGE = 2 << 20
_MAP_HUGETLB = 0x40000
_MAP_HUGE_2MB = 21 << 26
_MADV_DONTFORK = 10
_MADV_POPULATE_WRITE = 23


class OwnedMemory:
    """`size` bytes, private and anonymous, aligned to 2 MiB when at least that large (else to 4 KiB).

    Reserved huge pages (hugetlb) if there are enough, else transparent ones, asked for by madvise. MAP_PRIVATE, since
    shared anonymous memory gets no transparent huge pages. not_in_children: a forked child does not get the memory at
    all, so that no write after a fork moves a page that a device has pinned. shared: a file without a name instead,
    which another process may be given to map as well.

    kind: what it turned out to be, for people. map, offset: the mapping and where in it `address` is.
    """

    def __init__(self, size: int, not_in_children: bool = False, shared: bool = False) -> None:
        self.size = size
        huge = size >= HUGE_PAGE
        reserved, self.kind = _reserved(size, shared) if huge else (None, "4 KiB pages")
        self.map = _mapped(size + (HUGE_PAGE if huge else 0), shared) if reserved is None else reserved
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = -(-base // HUGE_PAGE) * HUGE_PAGE if huge else base
        self.offset = self.address - base
        if self.kind != "hugetlb" and huge:
            try:
                self.map.madvise(mmap.MADV_HUGEPAGE)
                self.kind = "transparent huge pages" if not shared or _huge_files() else "4 KiB pages"
            except OSError:
                self.kind = "4 KiB pages"  # a kernel without them: it works, slower
        if not_in_children:
            self.map.madvise(_MADV_DONTFORK)
        self.view = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")
        try:
            self.map.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # before Linux 5.14
            np.frombuffer(self.view, np.uint8)[:: mmap.PAGESIZE] = 0

    def close(self) -> None:
        """Give the memory back to the kernel now; nothing may use `address` or `view` after this.

        The mapping itself is unmapped by the garbage collector, since Python counts views on it.
        """
        self.view.release()
        try:
            self.map.madvise(mmap.MADV_DONTNEED)
        except (OSError, ValueError):
            pass


def _mapped(size: int, shared: bool, private: int = 0, file: int = 0) -> mmap.mmap:
    """private, file: further flags, of mmap and of memfd_create."""
    if not shared:
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | private)
    fd = os.memfd_create("hicache", os.MFD_CLOEXEC | file)
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size, mmap.MAP_SHARED)  # keeps a descriptor of its own
    finally:
        os.close(fd)


def _reserved(size: int, shared: bool) -> tuple[mmap.mmap | None, str]:
    """From the machine's reserved huge pages; none when it has too few (the kernel reserves at mmap: no surprise)."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    try:
        return _mapped(whole, shared, _MAP_HUGETLB | _MAP_HUGE_2MB, os.MFD_HUGETLB | os.MFD_HUGE_2MB), "hugetlb"
    except OSError:
        return None, ""


def _huge_files() -> bool:
    """Whether the kernel gives huge pages to shared memory that asks for them."""
    try:
        chosen = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return False
    return "[never]" not in chosen and "[deny]" not in chosen


class BufferPool:
    """`count` buffers of `size` bytes each (a multiple of 4 KiB), lent and given back.

    rows: uint8[count, size], the buffers by number; `numbers` says which numbers addresses have.
    """

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.memory = OwnedMemory(size * count)
        self.rows = np.frombuffer(self.memory.view, np.uint8).reshape(count, size)
        self._free = [self.memory.address + i * size for i in range(count)]
        self._cond = threading.Condition()

    def take(self, timeout: float | None = None) -> int | None:
        """Address of a free buffer; waits up to `timeout` seconds (None: for ever), then None."""
        taken = self.take_many(1, timeout)
        return taken[0] if taken else None

    def take_many(self, most: int, timeout: float | None = None) -> list[int]:
        """Addresses of up to `most` free buffers; waits up to `timeout` seconds for the first, then none."""
        with self._cond:
            if not self._cond.wait_for(lambda: self._free, timeout):
                return []
            taken = self._free[-most:]
            del self._free[-most:]
            return taken

    def give(self, address: int) -> None:
        self.give_many([address])

    def give_many(self, addresses: list[int]) -> None:
        with self._cond:
            self._free += addresses
            self._cond.notify_all()

    def numbers(self, addresses: np.ndarray) -> np.ndarray:
        """Rows of these addresses (uint64)."""
        return (addresses - np.uint64(self.memory.address)) // np.uint64(self.size)

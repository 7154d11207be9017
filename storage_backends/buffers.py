"""Memory that we own: page-aligned, from huge pages where the machine gives them, prefaulted.

Does not belong here: memory of an engine's pools (theirs), or what is read into any of it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

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
    all, so that no write after a fork moves a page that a device has pinned.

    kind: what it turned out to be, for people. map, offset: the mapping and where in it `address` is.
    """

    def __init__(self, size: int, not_in_children: bool = False) -> None:
        self.size = size
        huge = size >= HUGE_PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.map, self.kind = _reserved(size, flags) if huge else (None, "4 KiB pages")
        if self.map is None:
            self.map = mmap.mmap(-1, size + (HUGE_PAGE if huge else 0), flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = -(-base // HUGE_PAGE) * HUGE_PAGE if huge else base
        self.offset = self.address - base
        if self.kind != "hugetlb" and huge:
            try:
                self.map.madvise(mmap.MADV_HUGEPAGE)
                self.kind = "transparent huge pages"
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


def _reserved(size: int, flags: int) -> tuple[mmap.mmap | None, str]:
    """From the machine's reserved huge pages; none when it has too few (the kernel reserves at mmap: no surprise)."""
    try:
        return mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE, flags | _MAP_HUGETLB | _MAP_HUGE_2MB), "hugetlb"
    except OSError:
        return None, ""


class BufferPool:
    """`count` buffers of `size` bytes each (a multiple of 4 KiB), lent one at a time."""

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self._memory = OwnedMemory(size * count)
        self._free = [self._memory.address + i * size for i in range(count)]
        self._cond = threading.Condition()

    def take(self, timeout: float | None = None) -> int | None:
        """Address of a free buffer; waits up to `timeout` seconds (None: for ever), then None."""
        with self._cond:
            if not self._cond.wait_for(lambda: self._free, timeout):
                return None
            return self._free.pop()

    def give(self, address: int) -> None:
        with self._cond:
            self._free.append(address)
            self._cond.notify()

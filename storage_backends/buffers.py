"""Memory that we own: page-aligned, from huge pages where the machine gives them, prefaulted.

Does not belong here: memory of an engine's pools (theirs), or what is read into any of it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import numpy as np

HUGE_PAGE = 2 << 20


class OwnedMemory:
    """`size` bytes, private and anonymous, aligned to 2 MiB when at least that large (else to 4 KiB).

    MAP_PRIVATE, since shared anonymous memory gets no transparent huge pages.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        huge = size >= HUGE_PAGE
        self._map = mmap.mmap(-1, size + (HUGE_PAGE if huge else 0), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = -(-base // HUGE_PAGE) * HUGE_PAGE if huge else base
        if huge:
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without transparent huge pages: 4 KiB pages work, slower
        self.view = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")
        np.frombuffer(self.view, np.uint8)[:: mmap.PAGESIZE] = 0

    def close(self) -> None:
        """Give the memory back to the kernel now; nothing may use `address` or `view` after this.

        The mapping itself is unmapped by the garbage collector, since Python counts views on it.
        """
        self.view.release()
        try:
            self._map.madvise(mmap.MADV_DONTNEED)
        except (OSError, ValueError):
            pass


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

"""Memory that benchmarks move: in huge pages or in 4 KiB ones, and one verified pass over it.

Belongs here: allocation, what kind of pages it turned out to be, the cost of looking at every byte once. Does not
belong here: SGLang's host pool (io).
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from hicache_ext.bench.io_rounds import Subject
from hicache_ext.bench.machine import page_kind
from storage_backends import checksum
from storage_backends.buffers import OwnedMemory

_PASS_BYTES = 512 << 20  # well above any cache: each pass finds it cold


class Memory:
    """`count` source blocks of random bytes and as many target blocks. pages: "huge" or "4k", as found."""

    def __init__(self, block: int, count: int, huge: bool, shared: bool = False) -> None:
        self.block, self.count = block, count
        self.size = 2 * block * count
        if huge:
            owned = OwnedMemory(self.size, shared=shared)
            self.address, self._map = owned.address, owned.map
        else:
            self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.view = memoryview((ctypes.c_char * self.size).from_address(self.address)).cast("B")
        self.bytes = np.frombuffer(self.view, np.uint8)
        half = self.size // 2
        # Writing all of it also puts pages behind it.
        self.source, self.target = self.bytes[:half], self.bytes[half:]
        self.source.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 63, half // 8, np.uint64)
        self.target[:] = 0
        self.pages = pages_name(self.address)

    def address_of(self, number: int, target: bool) -> int:
        return self.address + (self.size // 2 if target else 0) + number % self.count * self.block

    def arrived(self) -> bool:
        """Whether the target holds what the source does."""
        return bool(np.array_equal(self.source.view(np.uint64), self.target.view(np.uint64)))


def pages_name(address: int) -> str:
    return "4k" if page_kind(address) == "4 KiB" else "huge"


class VerifiedPass(Subject):
    """One thread computes the format's checksums of memory that no cache holds: the floor of any verified read."""

    name = "verified_pass"
    cases = ("cold",)
    depth = 1

    def __init__(self, block: int, huge: bool) -> None:
        count = _PASS_BYTES // 2 // block
        self._memory = Memory(block, count, huge)
        self.engine = checksum.implementation()
        self.pages, self.bytes = self._memory.pages, self._memory.size
        self._addresses = self._memory.address + np.arange(2 * count, dtype=np.uint64) * np.uint64(block)
        self._lengths = np.full(2 * count, block, np.uint64)

    def go(self, case: str) -> None:
        checksum.chunk_crcs(self._addresses, self._lengths)

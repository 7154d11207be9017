"""Memory that Mooncake's process shares with ours: pages lie there, or pass through it.

Belongs here: finding out what can be shared, and where a page's buffers are for the other process. Does not belong
here: Mooncake.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage_backends.base import Buffers
from storage_backends.buffers import OwnedMemory

_ALIGNMENT = 4096


@dataclass(frozen=True)
class Region:
    """A mapping of ours: `length` bytes at `address`, which begin `offset` bytes into the file `fd`."""

    address: int
    length: int
    fd: int
    offset: int


def shared_regions(address: int, length: int) -> list[Region]:
    """The mappings in which this memory lies, each whole; none where any of it is private to this process.

    The regions' descriptors are new ones, the caller's to close.
    """
    found: list[Region] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, offset, device, inode = line.split(maxsplit=5)[:5]
        start, end = (int(part, 16) for part in span.split("-"))
        if end <= address or start >= address + length:
            continue
        major, minor = (int(part, 16) for part in device.split(":"))
        fd = _open_descriptor(os.makedev(major, minor), int(inode)) if mode[3] == "s" else None
        if fd is None:
            for region in found:
                os.close(region.fd)
            return []
        found.append(Region(start, end - start, fd, int(offset, 16)))
    return found


def _open_descriptor(device: int, inode: int) -> int | None:
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.stat(int(name))
            if (found.st_dev, found.st_ino) == (device, inode):
                return os.dup(int(name))
        except OSError:
            continue  # closed meanwhile
    return None


class Regions:
    """Shared regions, and where they are in the other process."""

    def __init__(self, placed: Sequence[tuple[Region, int]]) -> None:
        """placed: regions with their addresses there."""
        ordered = sorted(placed, key=lambda one: one[0].address)
        self._starts = np.array([region.address for region, _ in ordered], np.uint64)
        self._ends = np.array([region.address + region.length for region, _ in ordered], np.uint64)
        self._there = np.array([there for _, there in ordered], np.uint64)

    def there(self, addresses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """uint64[n]: each buffer's address in the other process, 0 where no region has it whole."""
        if not len(self._starts):
            return np.zeros(len(addresses), np.uint64)
        which = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        inside = which >= 0
        which = np.maximum(which, 0)
        inside &= addresses + lengths <= self._ends[which]
        return np.where(inside, addresses - self._starts[which] + self._there[which], np.uint64(0))


class Window:
    """Memory of ours, shared: heads of objects, and pages in memory that is not. Parts of it are lent out.

    region: as a region, whose descriptor is the caller's to close.
    """

    def __init__(self, size: int, parts: int) -> None:
        self.memory = OwnedMemory(size, shared=True)
        (self.region,) = shared_regions(self.memory.address, size)
        self._part_bytes = size // parts // _ALIGNMENT * _ALIGNMENT

    def part(self, number: int) -> Part:
        """One part; each is one user's at a time."""
        return Part(self, number * self._part_bytes, self._part_bytes)


class Part:
    """A stretch of the window that one group of pages uses, from its start on."""

    def __init__(self, window: Window, start: int, size: int) -> None:
        self._window, self._start, self.size = window, start, size
        self._used = 0

    def clear(self) -> None:
        """Everything in it is free again."""
        self._used = 0

    def room(self, size: int) -> int:
        """How many times `size` bytes could be taken from all of it."""
        return self.size // (-(-size // _ALIGNMENT) * _ALIGNMENT)

    def take(self, size: int) -> tuple[int, memoryview] | None:
        """`size` bytes, aligned to 4 KiB: address and view; None when they are not left."""
        if self._used + size > self.size:
            return None
        at = self._start + self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._window.memory.address + at, self._window.memory.view[at : at + size]


def copy(sources: Sequence[memoryview | bytearray], targets: Buffers) -> None:
    """Copy buffer by buffer. Other threads run on."""
    for source, target in zip(sources, targets, strict=True):
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def views(address: int, lengths: Sequence[int]) -> Buffers:
    """One after the other from this address on."""
    found, at = [], address
    for length in lengths:
        found.append(memoryview((ctypes.c_char * length).from_address(at)).cast("B"))
        at += length
    return found

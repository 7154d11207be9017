"""The memory of a region: a memfd of the largest pages that the machine gives, and how much there is to take.

Belongs here: making, mapping and measuring memory. Does not belong here: who shares it (sharers.py), or what lies in it
(csrc/memory).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import ByteSize

from storage_backends.base import OptionError
from storage_backends.buffers import HUGE_PAGE

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SHMEM_HUGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_CGROUP = Path("/sys/fs/cgroup")


class Pages(StrEnum):
    """What a region is made of, best first."""

    HUGETLB = "hugetlb"
    TRANSPARENT = "transparent huge pages"
    SMALL = "4 KiB pages"


class Memory:
    """A memfd and this process's mapping of it, which lasts as long as the object. Its size cannot change.

    address: where it is mapped. size: bytes. pages: what the kernel was asked for.
    """

    def __init__(self, fd: int, pages: Pages) -> None:
        """fd: taken over. OSError where it cannot be mapped."""
        self.fd, self.pages = fd, pages
        self.size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED)
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._first)
        if pages is Pages.TRANSPARENT:
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)

    @property
    def sealed(self) -> bool:
        """Whether nobody can cut it short under our hands."""
        return fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last that uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def make(name: str, size: int, capacity: int) -> Memory:
    """Zeroed memory of `size` bytes: reserved huge pages if there are enough, else as the kernel gives shared memory.

    capacity: as configured. OptionError where the machine has no room for it.
    """
    with contextlib.suppress(OSError):  # mapping reserves: what is mapped is there
        return _made(name, size, os.MFD_HUGETLB | os.MFD_HUGE_2MB, Pages.HUGETLB)
    room = left()
    if size > room.bytes:
        raise OptionError(
            "capacity", ByteSize(capacity).human_readable(), f"{room.of} has {_size(room.bytes)} left",
            f"lower `capacity` to less than {_size(room.bytes)}, or end what uses the memory",
        )  # fmt: skip
    return _made(name, size, 0, shmem_pages())


def _made(name: str, size: int, flags: int, pages: Pages) -> Memory:
    fd = os.memfd_create(f"hicache-ext-{name or 'private'}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        memory = Memory(fd, pages)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return memory


def shmem_pages(mode: str | None = None) -> Pages:
    """What memory that is no hugetlb will consist of. mode: the kernel's line; None: ask for it."""
    if mode is None:
        mode = _read(Path(SHMEM_HUGE))
    chosen = re.search(r"\[(\w+)\]", mode)
    huge = chosen is not None and chosen.group(1) in ("always", "within_size", "advise", "force")
    return Pages.TRANSPARENT if huge else Pages.SMALL


def reserved_bytes(meminfo: str | None = None) -> int:
    """Bytes of hugetlb pages of 2 MiB that are free. meminfo: /proc/meminfo; None: read it."""
    numbers = _numbers(_read(Path("/proc/meminfo")) if meminfo is None else meminfo)
    if numbers.get("Hugepagesize", 0) << 10 != HUGE_PAGE:
        return 0
    return max(0, numbers.get("HugePages_Free", 0) - numbers.get("HugePages_Rsvd", 0)) * HUGE_PAGE


@dataclass(frozen=True)
class Room:
    """bytes: what can still be taken. of: whose limit that is, for people."""

    bytes: int
    of: str


def left(meminfo: str | None = None, cgroup: Path | None = None) -> Room:
    """The least of what the machine and this process's control groups have left; page cache counts as left.

    meminfo: /proc/meminfo; cgroup: this process's folder (version 2). None: the real ones.
    """
    numbers = _numbers(_read(Path("/proc/meminfo")) if meminfo is None else meminfo)
    rooms = [Room(numbers.get("MemAvailable", 0) << 10, "the machine")]
    own = _own_cgroup() if cgroup is None else cgroup
    for group in (own, *own.parents):
        limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            cached = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
            free = int(limit) - int(used) + int(cached.group(1) if cached else 0)
            rooms.append(Room(max(0, free), f"the control group {group}"))
    return min(rooms, key=lambda room: room.bytes)


def _own_cgroup() -> Path:
    line = re.search(r"^0::/(.*)$", _read(Path("/proc/self/cgroup")), re.MULTILINE)
    return _CGROUP / line.group(1) if line else _CGROUP


def _numbers(meminfo: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", meminfo, re.MULTILINE)}


def _size(value: int) -> str:
    return ByteSize(value).human_readable()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

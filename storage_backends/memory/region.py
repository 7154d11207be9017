"""The memory of a region, in the largest pages that the machine gives, and how much there is to take.

A region that is shared is a memfd. One of this process alone is memory without a name: that gets transparent huge pages
by madvise on most machines, where shared memory gets none.

Belongs here: making, mapping and measuring memory. Does not belong here: who shares it (sharers.py), when it is taken
from the kernel (ahead.py), or what lies in it (csrc/memory).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
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
PRIVATE_HUGE = "/sys/kernel/mm/transparent_hugepage/enabled"
_MAP_HUGETLB, _MAP_HUGE_2MB, _MAP_NORESERVE = 0x40000, 21 << 26, 0x4000
_MADV_POPULATE_WRITE = 23
_CGROUP = Path("/sys/fs/cgroup")


class Pages(StrEnum):
    """What a region is made of, best first."""

    HUGETLB = "hugetlb"
    TRANSPARENT = "transparent huge pages"
    SMALL = "4 KiB pages"


class Memory:
    """Zeroed memory, mapped for as long as the object lasts. Its size cannot change.

    address: where it is mapped. size: bytes. pages: what the kernel was asked for. fd: its memfd, -1 where it has none.
    """

    fd = -1

    def __init__(self, mapped: mmap.mmap, size: int, pages: Pages) -> None:
        self._map, self.size, self.pages = mapped, size, pages
        self._first = ctypes.c_char.from_buffer(mapped)
        start = ctypes.addressof(self._first)
        self._skipped = -start % HUGE_PAGE if len(mapped) >= size + HUGE_PAGE else 0
        self.address = start + self._skipped
        if pages is Pages.TRANSPARENT:
            with contextlib.suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)

    def take(self, size: int) -> None:
        """Have the first `size` bytes (whole pages) from the kernel now. OSError where there is no room for them."""
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, self._skipped, size)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 5.14
                raise

    @property
    def map(self) -> mmap.mmap:
        return self._map

    @property
    def taken(self) -> int:
        """Bytes of it that the kernel has given already, as far as that is known."""
        return 0

    def keep_from_children(self) -> None:
        """A forked child does not get it: no write after a fork moves a page that a device has pinned."""
        self._map.madvise(mmap.MADV_DONTFORK)

    def close(self) -> None:
        """The mapping goes with the last that uses it."""


class SharedMemory(Memory):
    """A memfd that is handed on to other processes, and this one's mapping of it."""

    def __init__(self, fd: int, pages: Pages) -> None:
        """fd: taken over. OSError where it cannot be mapped."""
        size = os.fstat(fd).st_size
        super().__init__(mmap.mmap(fd, size, mmap.MAP_SHARED), size, pages)
        self.fd = fd

    @property
    def sealed(self) -> bool:
        """Whether nobody can cut it short under our hands."""
        return fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS

    def take(self, size: int) -> None:
        os.posix_fallocate(self.fd, 0, size)

    @property
    def taken(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def keep_from_children(self) -> None:
        """A child shares it, and its pages stay where they are."""

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last that uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def make_shared(name: str, size: int, capacity: int) -> SharedMemory:
    """`size` bytes: reserved huge pages if there are enough, else as the kernel gives shared memory.

    capacity: as configured. OptionError where the machine has no room for it.
    """
    with contextlib.suppress(OSError):  # mapping reserves: what is mapped is there
        return _made(name, size, os.MFD_HUGETLB | os.MFD_HUGE_2MB, Pages.HUGETLB)
    _check_room(size, capacity)
    return _made(name, size, 0, shmem_pages())


def make_private(size: int, capacity: int) -> Memory:
    """As make_shared, for memory that nobody else gets."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with contextlib.suppress(OSError):
        return Memory(mmap.mmap(-1, size, private | _MAP_HUGETLB | _MAP_HUGE_2MB), size, Pages.HUGETLB)
    _check_room(size, capacity)
    try:
        return Memory(mmap.mmap(-1, size + HUGE_PAGE, private | _MAP_NORESERVE), size, private_pages())
    except OSError as error:
        raise _no_room(capacity, Room(left().bytes, error.strerror or "the machine")) from error


def _check_room(size: int, capacity: int) -> None:
    room = left()
    if size > room.bytes:
        raise _no_room(capacity, room)


def _no_room(capacity: int, room: Room) -> OptionError:
    return OptionError(
        "capacity", ByteSize(capacity).human_readable(), f"{room.of} has {_size(room.bytes)} left",
        f"lower `capacity` to less than {_size(room.bytes)}, or end what uses the memory",
    )  # fmt: skip


def _made(name: str, size: int, flags: int, pages: Pages) -> SharedMemory:
    fd = os.memfd_create(f"hicache-ext-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        memory = SharedMemory(fd, pages)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return memory


def shmem_pages(mode: str | None = None) -> Pages:
    """What shared memory that is no hugetlb will consist of. mode: the kernel's line; None: ask for it."""
    if mode is None:
        mode = _read(Path(SHMEM_HUGE))
    chosen = re.search(r"\[(\w+)\]", mode)
    huge = chosen is not None and chosen.group(1) in ("always", "within_size", "advise", "force")
    return Pages.TRANSPARENT if huge else Pages.SMALL


def private_pages(mode: str | None = None) -> Pages:
    """As shmem_pages, of memory that is this process's alone."""
    mode = _read(Path(PRIVATE_HUGE)) if mode is None else mode
    return Pages.TRANSPARENT if mode and "[never]" not in mode else Pages.SMALL


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

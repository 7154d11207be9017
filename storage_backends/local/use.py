"""What a writer tells the others of its use of the disk: a small file in its folder, and the sums that it holds.

Belongs here: counting hits and stored bytes with age, and the file's bytes. Does not belong here: what follows for
anybody's part of the capacity (shares.py).

    use: 64 bytes, little-endian, overwritten in place
     0 8s magic "HICRUSE1"    24 u64 bytes hit lately      40 u64 bytes of extents held
     8 u32 version            32 u64 bytes stored lately   48 u64 bytes of them pinned
    12 u32 CRC32C of the rest                              56 u32 flags: 1 = wants more room
    16 u64 time, ns since 1970                             60 4x

"Lately": each byte counts half as much after every HALF_LIFE. A file that is torn, strange or not there says nothing,
which costs its writer nothing but being taken for average.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from storage_backends.checksum import crc32c

NAME = "use"
HALF_LIFE = 60.0
_MAGIC = b"HICRUSE1"
_VERSION = 1
_FILE = struct.Struct("<8sIIQQQQQI4x")
_CRC_AT, _CRC_END = 12, 16
_WANTS_MORE = 1
#: Sums go into u64 fields whatever was counted.
_MOST = (1 << 63) - 1

assert _FILE.size == 64


class Told(NamedTuple):
    """A writer's file as read. Bytes; time_ns: when it was written."""

    time_ns: int
    hit: int
    stored: int
    held: int
    pinned: int
    wants_more: bool

    def encode(self) -> bytes:
        sums = (min(value, _MOST) for value in (self.hit, self.stored, self.held, self.pinned))
        flags = _WANTS_MORE * self.wants_more
        raw = bytearray(_FILE.pack(_MAGIC, _VERSION, 0, self.time_ns, *sums, flags))
        struct.pack_into("<I", raw, _CRC_AT, crc32c(raw))
        return bytes(raw)

    @classmethod
    def decode(cls, raw: bytes) -> Told | None:
        """None for anything but a whole file of this version."""
        if len(raw) != _FILE.size:
            return None
        magic, version, crc, time_ns, hit, stored, held, pinned, flags = _FILE.unpack(raw)
        if magic != _MAGIC or version != _VERSION or crc32c(raw[:_CRC_AT] + bytes(4) + raw[_CRC_END:]) != crc:
            return None
        return cls(time_ns, hit, stored, held, pinned, bool(flags & _WANTS_MORE))


def read_use(folder: Path) -> Told | None:
    """What the folder's writer said last; None when that cannot be told."""
    try:
        fd = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return Told.decode(os.pread(fd, _FILE.size + 1, 0))
    except OSError:
        return None
    finally:
        os.close(fd)


def write_use(folder: Path, told: Told) -> None:
    """Raises OSError."""
    fd = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        os.pwrite(fd, told.encode(), 0)
        if os.fstat(fd).st_size != _FILE.size:
            os.ftruncate(fd, _FILE.size)
    finally:
        os.close(fd)


class Recent:
    """Bytes hit and stored by this writer, each byte fading by half in every HALF_LIFE. Not thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds that never go back."""
        self._clock = clock
        self._at = clock()
        self._hit = self._stored = 0.0

    def count(self, hit: int = 0, stored: int = 0) -> None:
        self._hit += hit
        self._stored += stored

    def told(self, time_ns: int, held: int, pinned: int, wants_more: bool) -> Told:
        """The sums as of now, for the file."""
        now = self._clock()
        fade = 0.5 ** (max(0.0, now - self._at) / HALF_LIFE)
        self._at, self._hit, self._stored = now, self._hit * fade, self._stored * fade
        return Told(time_ns, int(self._hit), int(self._stored), held, pinned, wants_more)

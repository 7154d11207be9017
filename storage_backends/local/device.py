"""A raw device as a disk of the local tier: extents on a block device (or a file made for it), no file system between.

Belongs here: who the device belongs to, and where on it each extent lies. Does not belong here: what is in extents
(format.py), or the folders, locks and logs, which lie in a directory beside it as they do for a tier of files.

That directory ("metadata") looks like a tier of files, so that everything that reads one reads it too; but its extent
files are 8 KiB: the extent header, and a placement that says where on the device the extent is. The device holds

    0          superblock, 4096 bytes
    1 MiB      extents, at multiples of 4096, where there is room: extent header and slots as in format.py

    superblock 0 8s magic "HICDEV01"   8 u32 format version   12 u32 CRC32C of the 4096 bytes, this field as 0
              16 16s id of the device  32 u64 time, ns since 1970   40 u32 bytes of:   44 path of the metadata, UTF-8
    placement  0 8s magic "HICPLACE"   8 u32 format version   12 u32 CRC32C of the 4096 bytes, this field as 0
              16 16s id of the device  32 u64 offset   40 u64 bytes

Room is handed out under the lock `device.lock` in the metadata: what no placement names is free. So a device without
its metadata is empty, and is refused rather than taken over: nothing on it can be told from somebody's data.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage_backends.base import OptionError
from storage_backends.buffers import OwnedMemory
from storage_backends.checksum import crc32c
from storage_backends.direct_io import alignment_of
from storage_backends.format import BLOCK, VERSION, ExtentHeader, FormatError, UnknownVersion
from storage_backends.local.extents import (
    Extent,
    ExtentFiles,
    extent_numbers,
    extent_path,
    retired_numbers,
    retired_path,
)
from storage_backends.local.files import lock_when_free
from storage_backends.local.folder import folder_number

MARK = "DEVICE"
LOCK = "device.lock"
START = 1 << 20

_SUPERBLOCK, _PLACEMENT = b"HICDEV01", b"HICPLACE"
_BLOCK = struct.Struct("<8sII16sQQ")
_SAID = struct.Struct("<I")
_CRC = 12
#: What must be zero on a device that nobody has used: partition tables and file systems have their signatures here.
_BLANK = 128 << 10


@dataclass(frozen=True)
class Placement:
    """Where an extent lies on the device with this id (bytes)."""

    device: bytes
    offset: int
    length: int

    def encode(self) -> bytes:
        """4096 bytes."""
        return _sealed(_BLOCK.pack(_PLACEMENT, VERSION, 0, self.device, self.offset, self.length))

    @classmethod
    def decode(cls, raw: bytes) -> Placement:
        """From 4096 bytes. Raises FormatError, UnknownVersion."""
        device, offset, length = _opened(raw, _PLACEMENT, "placement")
        if offset < START or offset % BLOCK or length < BLOCK:
            raise FormatError("placement geometry")
        return cls(device, offset, length)


def placement_of(path: Path) -> Placement:
    """The placement in an extent's file. Raises FormatError, UnknownVersion, OSError."""
    with open(path, "rb", buffering=0) as file:
        file.seek(BLOCK)
        return Placement.decode(file.read(BLOCK) or b"")


def device_of(metadata: Path) -> Path | None:
    """The device that a directory is the metadata of; None for a tier of files. Raises OSError."""
    try:
        return Path((metadata / MARK).read_text().splitlines()[1])
    except (FileNotFoundError, IndexError, UnicodeDecodeError):
        return None


def is_device(path: Path) -> bool:
    """Whether a path is something that only a Device can use. OSError as stat raises it, but for a missing path."""
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISBLK(kind) or stat.S_ISREG(kind)


def is_missing_device(path: Path) -> bool:
    """Whether this can only be a device, and is not there: a directory must not be made in its place."""
    return path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm") and not path.exists()


def home_of(path: Path, metadata: Path | None) -> Path:
    """Where the folders, locks and logs of a disk lie: the directory itself, or a device's part of the metadata.

    Raises OptionError, OSError.
    """
    if is_missing_device(path):
        raise OSError(errno.ENODEV, f"{path} is not there")
    if not is_device(path):
        return path
    if metadata is None and path.is_file():
        raise OptionError(
            "path", str(path), "is not a directory", "name a directory; or set `metadata` to use the file as a device"
        )
    if metadata is None:
        raise OptionError(
            "metadata", "", f"{path} is a device, and its locks and logs need a directory",
            "add `metadata:` with a directory that outlives the server, such as /var/lib/hicache-ext",
        )  # fmt: skip
    return metadata / path.name


def probe(path: Path) -> None:
    """Whether a device that holds a tier answers, with what belongs there. OSError when it does not."""
    memory = OwnedMemory(BLOCK)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)  # else the page cache might answer
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        got = os.preadv(fd, [memory.view], 0)
    finally:
        os.close(fd)
    if got < BLOCK or bytes(memory.view[:8]) != _SUPERBLOCK:
        raise OSError(errno.EIO, f"{path} does not hold its superblock any more")


def usable_bytes(path: Path) -> int:
    """Room for extents. OSError where the device cannot be opened."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return max(0, os.lseek(fd, 0, os.SEEK_END) - START)
    finally:
        os.close(fd)


class Device(ExtentFiles):
    """Extents on one device, for every process that has its metadata. Raises OptionError when it may not be used."""

    def __init__(self, path: Path, metadata: Path) -> None:
        self.path = path
        self.metadata = metadata
        self._known: dict[tuple[int, int], Placement] = {}
        try:
            metadata.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                super().__init__(alignment_of(path, fd))
                self._end = os.lseek(fd, 0, os.SEEK_END)
                with self._alone():
                    self.id = self._claim(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise OptionError(
                "path", str(path), f"cannot be used: {error.strerror or error}",
                "name a device that this user may read and write, and that nothing else uses",
            ) from error  # fmt: skip

    def open(self, folder: Path, number: int, write: bool) -> Extent:
        header = self.header(folder, number)
        path = extent_path(folder, number)
        place = placement_of(path)
        if place.device != self.id:
            raise FormatError(f"extent {number} is on another device")
        if place.length < header.extent_bytes or place.offset + place.length > self._end:
            raise FormatError(f"extent {number} is longer than its place")
        fd = self._open(write)
        try:
            # Somebody who wrote to the device without the metadata is noticed here; slots verify themselves.
            memory = OwnedMemory(BLOCK)
            if os.preadv(fd, [memory.view], place.offset) < BLOCK or bytes(memory.view) != header.encode():
                raise FormatError(f"extent {number} is not on the device any more")
        except BaseException:
            os.close(fd)
            raise
        return Extent(path, number, header, fd, place.offset)

    def create(self, folder: Path, header: ExtentHeader) -> Extent:
        path = extent_path(folder, header.number)
        with self._alone():
            offset = self._gap(header.extent_bytes)
            fd = self._open(write=True)
            try:
                self._put(fd, header.encode(), offset)
                self._place(path, header, Placement(self.id, offset, header.extent_bytes))
            except BaseException:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        return Extent(path, header.number, header, fd, offset)

    def reuse(self, folder: Path, old: Extent, header: ExtentHeader) -> Extent:
        # Nobody may look for room while a placement changes its name, and be told by neither.
        with self._alone():
            self._put(old.fd, header.encode(), old.base)
            return super().reuse(folder, old, header)

    def retire(self, folder: Path, number: int) -> None:
        with self._alone():
            super().retire(folder, number)

    def disk_bytes(self, folder: Path) -> int:
        return sum(place.length for place in self._placements(folder).values())

    def _open(self, write: bool) -> int:
        direct = os.O_DIRECT if self.direct.works else 0
        return os.open(self.path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | direct)

    def _put(self, fd: int, block: bytes, offset: int) -> None:
        memory = OwnedMemory(BLOCK)
        memory.view[:] = block
        if os.pwritev(fd, [memory.view], offset) < BLOCK:
            raise OSError(errno.EIO, "the device took only a part of a block")

    def _place(self, path: Path, header: ExtentHeader, place: Placement) -> None:
        """One write: a file that is cut short by a crash holds no place, and its writer deletes it."""
        with open(path, "xb", buffering=0) as file:
            file.write(header.encode() + place.encode())

    # -- room ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process hands out room meanwhile. Held for a few small reads and writes, never for pages."""
        fd = lock_when_free(self.metadata / LOCK)
        try:
            yield
        finally:
            os.close(fd)

    def _gap(self, length: int) -> int:
        """The first place with this much room. OSError (ENOSPC) when there is none."""
        taken = []
        for name in os.listdir(self.metadata):
            if folder_number(name) is not None:
                taken += [(place.offset, place.length) for place in self._placements(self.metadata / name).values()]
        at = START
        for offset, size in sorted(taken):
            if offset - at >= length:
                break
            at = max(at, -(-(offset + size) // BLOCK) * BLOCK)
        if at + length > self._end:
            raise OSError(errno.ENOSPC, f"{self.path} has no room for {length} bytes in one piece")
        return at

    def _placements(self, folder: Path) -> dict[int, Placement]:
        """By number, those that wait for their deletion too. A placement never changes, so each is read once."""
        owner = folder_number(folder.name)
        assert owner is not None
        found = {}
        paths = {number: retired_path(folder, number) for number in retired_numbers(folder)}
        paths |= {number: extent_path(folder, number) for number in extent_numbers(folder)}
        for number, path in paths.items():
            place = self._known.get((owner, number))
            if place is None:
                try:
                    place = placement_of(path)
                except (FormatError, OSError):
                    continue  # half made, or gone
                self._known[owner, number] = place
            found[number] = place
        for known in [known for known in self._known if known[0] == owner and known[1] not in found]:
            del self._known[known]
        return found

    # -- ownership -----------------------------------------------------------------------------------------------

    def _claim(self, fd: int) -> bytes:
        """The device's id, after making sure that device and metadata belong together, or belong to nobody yet."""
        raw = os.pread(fd, BLOCK, 0)
        mark = self.metadata / MARK
        known = mark.read_text().splitlines()[:1] if mark.exists() else []
        if raw[:8] == _SUPERBLOCK:
            try:
                ident = _opened(raw, _SUPERBLOCK, "superblock")[0]
            except FormatError as error:
                raise self._refused(f"its superblock is not valid: {error}", self._wipe) from error
            if known != [ident.hex()]:
                raise self._refused(
                    f"belongs to a tier with its metadata in {_said(raw)}",
                    f"set `metadata` to that directory, or give the device up for anew: {self._wipe}",
                )
            self._mark(ident)  # the device may have another name by now
            return ident
        if known:
            raise self._refused(
                f"is not the device that {self.metadata} is the metadata of",
                f"name that device, or an empty `metadata` directory for this one, or delete {self.metadata}",
            )
        if any(os.pread(fd, _BLANK, 0)):
            raise self._refused("is not blank: it holds, or held, something else", f"if it may be lost: {self._wipe}")
        self._refuse_in_use()
        ident = os.urandom(16)
        said = os.fsencode(self.metadata.absolute())[: BLOCK - _BLOCK.size - _SAID.size]
        # The mark goes first: a crash in between leaves a mark without a superblock, refused with what to delete.
        self._mark(ident)
        block = _BLOCK.pack(_SUPERBLOCK, VERSION, 0, ident, time.time_ns(), 0)
        os.pwrite(fd, _sealed(block[:40] + _SAID.pack(len(said)) + said), 0)
        os.fsync(fd)
        return ident

    def _mark(self, ident: bytes) -> None:
        text = f"{ident.hex()}\n{self.path.absolute()}\n"
        mark = self.metadata / MARK
        if not mark.exists() or mark.read_text() != text:
            fresh = mark.with_suffix(".new")
            fresh.write_text(text)
            os.replace(fresh, mark)

    def _refuse_in_use(self) -> None:
        """A mounted device, or a part of a RAID, is nobody's to take, however blank it looks."""
        if stat.S_ISBLK(os.stat(self.path).st_mode):
            try:
                os.close(os.open(self.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise self._refused("is in use (mounted, or part of a RAID or volume)", "name another") from error

    @property
    def _wipe(self) -> str:
        return f"dd if=/dev/zero of={self.path} bs=128K count=1 conv=notrunc"

    def _refused(self, what: str, fix: str) -> OptionError:
        return OptionError("path", str(self.path), what, fix)


def _sealed(block: bytes) -> bytes:
    raw = bytearray(block.ljust(BLOCK, b"\0"))
    struct.pack_into("<I", raw, _CRC, crc32c(raw))
    return bytes(raw)


def _opened(raw: bytes, magic: bytes, what: str) -> tuple[bytes, int, int]:
    """The fields after the checksum. Raises FormatError, UnknownVersion."""
    if len(raw) < BLOCK or raw[:8] != magic:
        raise FormatError(f"not a {what}")
    _, version, crc, *fields = _BLOCK.unpack_from(raw)
    if version != VERSION:
        raise UnknownVersion(f"{what} format {version}")
    blank = bytearray(raw[:BLOCK])
    struct.pack_into("<I", blank, _CRC, 0)
    if crc32c(blank) != crc:
        raise FormatError(f"{what} checksum")
    return fields[0], fields[1], fields[2]


def _said(raw: bytes) -> str:
    """The path in a superblock, for people."""
    (length,) = _SAID.unpack_from(raw, 40)
    path = os.fsdecode(raw[40 + _SAID.size :][: min(length, BLOCK)])
    return path if path.isprintable() else ascii(path)

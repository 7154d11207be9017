"""The residency log of a writer folder: what its writer stored and removed, in order. Also the warm-start snapshot.

Belongs here: records, appending them, and tailing them from another process. Does not belong here: what follows from
a record (index.py), or whether the slot it names still holds the page (only the slot's own bytes say that).

    residency.log: a 128-byte head, then 128-byte records; little-endian
    head     0 8s magic "HICRLOG1"   8 u32 version   12 u32 record bytes   16 16s id of this log
            32 16s id of the log before it, 0 = none   48 u64 since   56 u64 news
            64 u32 CRC32C of the 64 bytes before   68 60x
    record   0 u32 CRC32C of the rest   4 u8 kind   5 3x   8 u32 extent   12 u32 slot   16 u64 generation
            24 u64 time, ns   32 16s namespace   48 32s key   80 32s parent   112 16x

The log is a hint: written without fsync, it may lack its end after a crash (a scan of slot headers finds what it
lacks) or name pages that never reached the disk (their slots fail verification). A record that does not pass its
checksum is passed over.

A log that has grown too long is replaced by a compacted one (own_log.py), which says what of it is news:

    before   | head |  records that the new log sums up  | changes A |            since, news: bytes from the start
                                                         ^ since
    after    | head | one record per page | changes A | changes B ...
                                          ^ news

The changes are the same bytes in both, so whoever has read the log before to byte `since` + n goes on at `news` + n and
has missed nothing. Anybody else starts anew. Heads of before there was compaction have zeroes there, and so does the
log of a new folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hicache_ext.page import NO_PARENT
from storage_backends.checksum import chunk_crcs, crc32c
from storage_backends.format import FormatError, UnknownVersion

if TYPE_CHECKING:
    from storage_backends.local.index import Page

logger = logging.getLogger(__name__)

MAGIC = b"HICRLOG1"
VERSION = 1
_HEAD = struct.Struct("<8sII16s16sQQI60x")
_HEAD_CRC = 64
_RECORD = struct.Struct("<IB3xIIQQ16s32s32s16x")
RECORD_BYTES = _RECORD.size
NAME = "residency.log"
#: As many as are read, and taken in, at a time (1 MiB).
BLOCK_RECORDS = 8192

assert _HEAD.size == RECORD_BYTES == 128


class NotALog(FormatError):
    """The file does not begin as a residency log does."""


class Kind(IntEnum):
    STORED = 1
    REMOVED = 2
    EXTENT_GONE = 3  # the extent's file was deleted, and every page in it


class Head(NamedTuple):
    """id: of this log and no other. before, since, news: see the diagram; before is zeroes for a log of its own."""

    id: bytes
    before: bytes = bytes(16)
    since: int = 0
    news: int = 0

    def encode(self) -> bytes:
        raw = bytearray(_HEAD.pack(MAGIC, VERSION, RECORD_BYTES, *self, 0))
        if self.before != bytes(16):
            struct.pack_into("<I", raw, _HEAD_CRC, crc32c(memoryview(raw)[:_HEAD_CRC]))
        return bytes(raw)

    @classmethod
    def decode(cls, raw: bytes) -> Head:
        """From 128 bytes. Raises NotALog, UnknownVersion."""
        if len(raw) < RECORD_BYTES or raw[:8] != MAGIC:
            raise NotALog("not a residency log")
        _, version, record_bytes, own, before, since, news, crc = _HEAD.unpack(raw[:RECORD_BYTES])
        if version != VERSION or record_bytes != RECORD_BYTES:
            raise UnknownVersion(f"residency log format {version}")
        fits = crc == crc32c(raw[:_HEAD_CRC]) and since % RECORD_BYTES == news % RECORD_BYTES == 0
        return cls(own, before, since, news) if fits and min(since, news) >= RECORD_BYTES else cls(own)


class Record(NamedTuple):
    kind: Kind
    extent: int
    slot: int = 0
    generation: int = 0
    time_ns: int = 0
    namespace: bytes = bytes(16)
    key: bytes = NO_PARENT
    parent: bytes = NO_PARENT

    def encode(self) -> bytes:
        raw = bytearray(_RECORD.pack(0, *self))
        struct.pack_into("<I", raw, 0, crc32c(memoryview(raw)[4:]))
        return bytes(raw)

    @classmethod
    def decode(cls, raw: bytes | memoryview) -> Record:
        """From 128 bytes. Raises FormatError."""
        if len(raw) < RECORD_BYTES:
            raise FormatError("truncated record")
        crc, kind, extent, slot, generation, time_ns, namespace, key, parent = _RECORD.unpack(raw[:RECORD_BYTES])
        if crc32c(bytes(raw[4:RECORD_BYTES])) != crc:
            raise FormatError("record checksum")
        try:
            return cls(Kind(kind), extent, slot, generation, time_ns, namespace, key, parent)
        except ValueError as error:
            raise FormatError(str(error)) from error


def encode(records: Sequence[Record]) -> bytes:
    """128 bytes per record; the checksums of many are computed in one call."""
    if len(records) < 4:
        return b"".join([record.encode() for record in records])
    raw = np.frombuffer(bytearray(b"".join([_RECORD.pack(0, *record) for record in records])), np.uint8)
    starts = np.arange(len(records), dtype=np.uint64) * np.uint64(RECORD_BYTES) + np.uint64(raw.ctypes.data + 4)
    crcs = chunk_crcs(starts, np.full(len(records), RECORD_BYTES - 4, np.uint64))
    raw.reshape(-1, RECORD_BYTES)[:, :4] = crcs.astype("<u4").view(np.uint8).reshape(-1, 4)
    return raw.tobytes()


def encode_stored(pages: Iterable[Page]) -> bytes:
    """The records of pages that were stored."""
    return encode([Record(Kind.STORED, *p[4:7], p.time_ns, p.namespace, p.key, p.parent) for p in pages])


class Block(NamedTuple):
    """Records as they are in the file. at_end: the file had no more when the reading began."""

    data: bytes
    at_end: bool


class LogWriter:
    """Appends records at positions of its own, so that a write cut short never shifts the ones after it.

    Opens the log, or makes one where there is none. `head` is None for a file that is no residency log.
    Raises UnknownVersion, OSError.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(self.fd).st_size
            self.position = max(RECORD_BYTES, size // RECORD_BYTES * RECORD_BYTES)
            self.head: Head | None = None
            if size < RECORD_BYTES:
                self.write_head(Head(os.urandom(16)))
            else:
                with contextlib.suppress(NotALog):
                    self.head = Head.decode(os.pread(self.fd, RECORD_BYTES, 0))
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def records(self) -> int:
        return self.position // RECORD_BYTES - 1

    def write_head(self, head: Head) -> None:
        os.pwrite(self.fd, head.encode(), 0)
        self.head = head

    def append(self, records: list[Record] | bytes) -> None:
        """Records, or encoded ones. OSError when the device refuses; the next append writes over what is left."""
        data = records if isinstance(records, bytes) else encode(records)
        written = 0
        while written < len(data):
            written += os.pwrite(self.fd, memoryview(data)[written:], self.position + written)
        self.position += written

    def sync(self) -> None:
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1  # a late append fails, and does not land in whatever gets the number next


class _File(NamedTuple):
    """A log that a reader has open. head: None until it could be read."""

    fd: int
    inode: int
    head: Head | None


class LogReader:
    """Reads a log from its start and then its growth; goes over to the next log when it was compacted.

    `restarted` turns True when the last `read` began anew: what earlier records said no longer holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: _File | None = None
        self._next: _File | None = None  # a compacted log, for when this one is read far enough
        self._strange = -1
        self._position = 0
        self.restarted = False

    def read(self) -> Iterator[Record]:
        """Records since the last call. A missing log has none. Raises UnknownVersion."""
        for block in self.blocks():
            taken = 0
            while taken < len(block.data):
                try:
                    record = Record.decode(block.data[taken : taken + RECORD_BYTES])
                except FormatError:
                    if block.at_end and taken + RECORD_BYTES == len(block.data):
                        # The last record may still be on its way: look again next time.
                        break
                else:
                    yield record
                taken += RECORD_BYTES
            self.took(taken)

    def blocks(self, records: int = BLOCK_RECORDS) -> Iterator[Block]:
        """What the log grew by since the last call, so many whole records at a time; `took` says how much of each block
        is done with. May be left before its end: the next call goes on after what was taken."""
        self.restarted = False
        try:
            self._look()
        except FileNotFoundError:
            return
        while self._next is not None and self._next.head is not None:
            since, news = self._next.head.since, self._next.head.news
            if self._position < since:
                yield from self._read(records, since)
            if self._position < since:  # the log before has lost what it had
                self._start(self._next)
            else:
                self._go_over(self._next, news + self._position - since)
            self._look()
        if self._file is not None:
            yield from self._read(records, None)

    def took(self, size: int) -> None:
        """The reader is done with this much of the block that it was given last (bytes)."""
        self._position += size

    def close(self) -> None:
        for file in (self._file, self._next):
            if file is not None:
                os.close(file.fd)
        self._file = self._next = None

    def _look(self) -> None:
        """Notice that the log was replaced. A log that goes on from ours becomes `_next`, any other `_file`."""
        if self._next is not None:
            return
        status = os.stat(self._path)
        ours = self._file
        if ours is not None and status.st_ino == ours.inode and status.st_size >= self._position:
            return
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        file = _File(fd, os.fstat(fd).st_ino, None)
        try:
            file = file._replace(head=Head.decode(os.pread(fd, RECORD_BYTES, 0)))
        except UnknownVersion:
            os.close(fd)
            raise
        except NotALog:
            pass  # strange, or its head is still being written: looked at again where it is read
        known = ours.head.id if ours is not None and ours.head is not None else None
        if file.head is not None and file.head.before == known != file.head.id and self._position:
            self._next = file
        else:
            self._start(file)

    def _start(self, file: _File) -> None:
        self.restarted = True
        self._go_over(file, 0)

    def _go_over(self, file: _File, position: int) -> None:
        if self._file is not None:
            os.close(self._file.fd)
        self._file, self._next, self._position = file, None, position

    def _read(self, records: int, end: int | None) -> Iterator[Block]:
        """Blocks of the open log up to byte `end`, or to where it ends now."""
        assert self._file is not None
        fd = self._file.fd
        size = os.fstat(fd).st_size
        if self._position == 0 and not self._begin(size):
            return
        while end is None or self._position < end:
            before = self._position
            data = os.pread(fd, min(RECORD_BYTES * records, (end or before + (1 << 40)) - before), before)
            whole = len(data) // RECORD_BYTES * RECORD_BYTES
            if not whole:
                return
            yield Block(data[:whole], end is None and before + whole + RECORD_BYTES > size)
            if self._position < before + whole:
                return

    def _begin(self, size: int) -> bool:
        """Get past the head; False when there is nothing to read."""
        assert self._file is not None
        if size < 2 * RECORD_BYTES:
            return False
        try:
            head = Head.decode(os.pread(self._file.fd, RECORD_BYTES, 0))
        except NotALog:
            if self._strange != self._file.inode:  # read is called several times a second
                self._strange = self._file.inode
                logger.warning("%s: not a residency log; its folder is known by its slots alone", self._path)
            return False
        self._file = self._file._replace(head=head)
        self._position = RECORD_BYTES
        return True

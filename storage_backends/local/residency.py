"""The residency log of a writer folder: what its writer stored and removed, in order. Also the warm-start snapshot.

Belongs here: records, appending them, and tailing them from another process. Does not belong here: what follows from
a record (index.py), or whether the slot it names still holds the page (only the slot's own bytes say that).

    residency.log: a 128-byte head, then 128-byte records; little-endian
    head     0 8s magic "HICRLOG1"   8 u32 version   12 u32 record bytes   16 16s id of this log
    record   0 u32 CRC32C of the rest   4 u8 kind   5 3x   8 u32 extent   12 u32 slot   16 u64 generation
            24 u64 time, ns   32 16s namespace   48 32s key   80 32s parent   112 16x

The log is a hint: written without fsync, it may lack its end after a crash (a scan of slot headers finds what it
lacks) or name pages that never reached the disk (their slots fail verification). A record that does not pass its
checksum is passed over.
"""

from __future__ import annotations

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
_HEAD = struct.Struct("<8sII16s96x")
_RECORD = struct.Struct("<IB3xIIQQ16s32s32s16x")
RECORD_BYTES = _RECORD.size
NAME = "residency.log"
_READ_RECORDS = 8192

assert _HEAD.size == RECORD_BYTES == 128


class Kind(IntEnum):
    STORED = 1
    REMOVED = 2
    EXTENT_GONE = 3  # the extent's file was deleted, and every page in it


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
    """Appends records at positions of its own, so that a write cut short never shifts the ones after it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._fd).st_size
        self.position = max(RECORD_BYTES, size // RECORD_BYTES * RECORD_BYTES)
        if size < RECORD_BYTES:
            os.pwrite(self._fd, _HEAD.pack(MAGIC, VERSION, RECORD_BYTES, os.urandom(16)), 0)

    @classmethod
    def rewrite(cls, path: Path, records: bytes) -> LogWriter:
        """Replace the log by these encoded records, all or nothing, and go on from there."""
        fresh = path.with_suffix(".new")
        with open(fresh, "wb") as file:
            file.write(_HEAD.pack(MAGIC, VERSION, RECORD_BYTES, os.urandom(16)))
            file.write(records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        return cls(path)

    def append(self, records: list[Record] | bytes) -> None:
        """Records, or encoded ones. OSError when the device refuses; the next append writes over what is left."""
        data = records if isinstance(records, bytes) else encode(records)
        written = 0
        while written < len(data):
            written += os.pwrite(self._fd, memoryview(data)[written:], self.position + written)
        self.position += written

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1  # a late append fails, and does not land in whatever gets the number next


class LogReader:
    """Reads a log from its start and then its growth; notices when the log was replaced.

    `restarted` turns True when the last `read` began anew: what earlier records said no longer holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._inode = 0
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

    def blocks(self) -> Iterator[Block]:
        """What the log grew by since the last call, whole records; `took` says how much of each block is done with."""
        self.restarted = False
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return
        if self._fd is None or status.st_ino != self._inode or status.st_size < self._position:
            self.close()
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            status = os.fstat(self._fd)
            self._inode, self.restarted = status.st_ino, True
            self._position = 0
        if status.st_size < self._position + RECORD_BYTES:
            return
        if self._position == 0:
            if not self._check_head(os.pread(self._fd, RECORD_BYTES, 0)):
                return
            self._position = RECORD_BYTES
        while True:
            data = os.pread(self._fd, RECORD_BYTES * _READ_RECORDS, self._position)
            whole = len(data) // RECORD_BYTES * RECORD_BYTES
            if not whole:
                return
            before = self._position
            yield Block(data[:whole], self._position + whole + RECORD_BYTES > status.st_size)
            if whole < RECORD_BYTES * _READ_RECORDS or self._position < before + whole:
                return

    def took(self, size: int) -> None:
        """The reader is done with this much of the block that it was given last (bytes)."""
        self._position += size

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _check_head(self, raw: bytes) -> bool:
        if len(raw) < RECORD_BYTES:
            return False
        magic, version, record_bytes, _ = _HEAD.unpack(raw)
        if magic != MAGIC:
            if self._strange != self._inode:  # read is called several times a second
                self._strange = self._inode
                logger.warning("%s: not a residency log; its folder is known by its slots alone", self._path)
            return False
        if version != VERSION or record_bytes != RECORD_BYTES:
            raise UnknownVersion(f"residency log format {version}")
        return True

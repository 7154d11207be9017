"""A segment: one file with the pages of a few write batches of one namespace, and an index of them. Version 1.

Belongs here: the bytes of an index, and the names of segments, as pure functions. Does not belong here: the slots'
bytes (format.py, object.py), I/O, or which segments there are.

    segment  +--------+--------+-----+--------+-------+
    (a file) | slot 0 | slot 1 | ... | slot n | index |      slots all of the same size; all multiples of 4096
             +--------+--------+-----+--------+-------+

    slot     +-------------+----------+----------+-----+---------+
             | slot header | buffer 0 | buffer 1 | ... | padding |      an object of object.py with step 4096,
             +-------------+----------+----------+-----+---------+      sealed or not, and zeroes up to 4096

    index    the next multiple of 4096 that fits; integers are little-endian
        0  8s  magic "HICSEG01"          64  u64 slot bytes
        8  u32 format version            72  u32 entries
       12  u32 index bytes               76  u32 CRC32C of the index bytes, this field as 0
       16 16s  namespace                 80  48 bytes of 0
       32 16s  id of the segment        128  entries, 80 bytes each:
       48  u64 born, ns since 1970             0 32s key            64 u64 offset of the slot
       56  u64 segment bytes                  32 32s parent key     72 u64 payload bytes

    name     ID-ENTRIES-BYTES.seg        hex digits of the id, then numbers: where the index is, without a look at the
             ID.tmp                      file; and a directory's listing is enough to add up sizes

A segment is written as ID.tmp, index last, then closed and renamed; after that it never changes. What a writer that
died left behind has no name that anybody reads. The index is a hint: a slot is valid only if all its own checksums are
and its namespace and key are what was asked, so a segment that lost its end or its middle costs those pages only.
Of two segments with the same page the one born later counts; times are the share's own (share.py).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import numpy as np

from hicache_ext.page import KEY_BYTES
from storage_backends.checksum import crc32c
from storage_backends.format import BLOCK, FormatError, UnknownVersion, round_up

VERSION = 1
MAGIC = b"HICSEG01"
ID_BYTES = 16
TEMPORARY = ".tmp"

_HEAD = struct.Struct("<8sII16s16sQQQII48x")
_CRC = 76
assert _HEAD.size == 128
_ENTRY = np.dtype([("key", "V32"), ("parent", "V32"), ("offset", "<u8"), ("payload", "<u8")])
assert _ENTRY.itemsize == 80
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{1,9})-([0-9]{1,18})\.seg")


def index_bytes(entries: int) -> int:
    """Bytes of an index with so many entries."""
    return round_up(_HEAD.size + entries * _ENTRY.itemsize, BLOCK)


@dataclass(frozen=True)
class SegmentName:
    """entries: pages in the index. size: bytes of the file."""

    id: bytes
    entries: int
    size: int

    def __str__(self) -> str:
        return f"{self.id.hex()}-{self.entries}-{self.size}.seg"

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """None for a file that is not a segment."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        parsed = cls(bytes.fromhex(found[1]), int(found[2]), int(found[3]))
        return parsed if parsed.index_at >= 0 else None

    @property
    def index_at(self) -> int:
        """Where the index begins (bytes)."""
        return self.size - index_bytes(self.entries)


@dataclass(frozen=True)
class SegmentIndex:
    """keys, parents: 32 bytes per entry. slots: int64[entries], each page's place in the file, counted in slots."""

    namespace: bytes
    id: bytes
    born_ns: int
    slot_bytes: int
    payload_bytes: int
    keys: bytes
    parents: bytes
    slots: np.ndarray

    @property
    def name(self) -> SegmentName:
        entries = len(self.slots)
        last = int(self.slots.max()) + 1 if entries else 0
        return SegmentName(self.id, entries, last * self.slot_bytes + index_bytes(entries))

    def encode(self) -> bytes:
        """index_bytes(entries) bytes."""
        name = self.name
        raw = bytearray(index_bytes(name.entries))
        _HEAD.pack_into(
            raw, 0, MAGIC, VERSION, len(raw), self.namespace, self.id, self.born_ns, name.size, self.slot_bytes,
            name.entries, 0,
        )  # fmt: skip
        entries = np.zeros(name.entries, _ENTRY)
        entries["key"] = np.frombuffer(self.keys, "V32")
        entries["parent"] = np.frombuffer(self.parents, "V32")
        entries["offset"] = self.slots.astype(np.uint64) * np.uint64(self.slot_bytes)
        entries["payload"] = self.payload_bytes
        raw[_HEAD.size : _HEAD.size + entries.nbytes] = entries.tobytes()
        struct.pack_into("<I", raw, _CRC, crc32c(raw))
        return bytes(raw)

    @classmethod
    def decode(cls, raw: bytes | bytearray | memoryview, name: SegmentName) -> SegmentIndex:
        """From the bytes where a segment of this name has its index. Raises FormatError, UnknownVersion."""
        if len(raw) < _HEAD.size:
            raise FormatError("truncated index")
        magic, version, size, namespace, ident, born, file_bytes, slot_bytes, count, crc = _HEAD.unpack_from(raw)
        if magic != MAGIC:
            raise FormatError("not a segment's index")
        if version != VERSION:
            raise UnknownVersion(f"segment format {version}")
        if count != name.entries or size != index_bytes(count) or len(raw) < size:
            raise FormatError("truncated index")
        whole = bytearray(raw[:size])
        whole[_CRC : _CRC + 4] = bytes(4)
        if crc32c(whole) != crc:
            raise FormatError("index checksum")
        if ident != name.id or file_bytes != name.size or slot_bytes < BLOCK or slot_bytes % BLOCK:
            raise FormatError("the index of another segment")
        entries = np.frombuffer(raw, _ENTRY, count, _HEAD.size)
        slots, rest = np.divmod(entries["offset"].astype(np.int64), slot_bytes)
        if rest.any() or (slots < 0).any() or ((slots + 1) * slot_bytes > name.index_at).any():
            raise FormatError("index entries")
        payloads = set(entries["payload"].tolist())
        if len(payloads) > 1:
            raise FormatError("pages of several sizes")
        return cls(
            namespace, ident, born, slot_bytes, payloads.pop() if payloads else 0,
            entries["key"].tobytes(), entries["parent"].tobytes(), slots,
        )  # fmt: skip

    def key(self, entry: int) -> bytes:
        return self.keys[entry * KEY_BYTES : (entry + 1) * KEY_BYTES]

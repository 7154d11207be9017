"""The stored format: what the bytes of an extent and of a slot mean. Version 1.

Belongs here: encoding and decoding of headers, as pure functions over bytes. Does not belong here: files, I/O,
where a slot is, or whether to trust it beyond what its own bytes say. The same header opens a page that is stored as an
object of its own (object.py).

A directory holds `FORMAT` (one line, the version) and writer folders `w<k>`; a folder holds `lock`, `residency.log`
(residency.py) and extents `e<number>.ext`. All integers are little-endian.

    extent     +---------------+--------+--------+-----+--------+
    (a file)   | extent header | slot 0 | slot 1 | ... | slot n |      header 4096 bytes, slots `slot_bytes` each
               +---------------+--------+--------+-----+--------+

    extent header, 4096 bytes
        0  8s  magic "HICEXT01"          48 16s  namespace
        8  u32 format version            64  u64 time, ns since 1970
       12  u32 header bytes (4096)       72  u32 description bytes
       16  u64 generation                76  u32 CRC32C of the 4096 bytes, this field as 0
       24  u64 slot bytes                80  --  description: JSON of the namespace, for people and tools
       32  u64 extent bytes
       40  u32 slots
       44  u32 number

    slot       +-------------+----------+----------+-----+---------+
               | slot header | buffer 0 | buffer 1 | ... | padding |   header and slot are multiples of 4096
               +-------------+----------+----------+-----+---------+

    slot header, 4096 bytes or the next multiple that fits (of an object: the next multiple of 64)
        0  8s  magic "HICSLOT1"         112  u64 payload bytes
        8  u16 format version           120  u32 buffers
       10  u16 flags                    124  u32 chunks
       12  u32 header bytes             128  u32 chunk bytes (65536)
       16 16s  namespace                132  u16 checksum algorithm (1 = CRC32C)
       32 32s  key                      134  u16 pool name bytes
       64 32s  parent key, 0 = unknown  136  u32 token ids
       96  u64 generation               140  u32 CRC32C of the header bytes, this field as 0
      104  u64 time, ns since 1970      144  i64 event hash          (0 = unknown)
                                        152  i64 parent event hash   (0 = unknown)
                                        160  u16 salt bytes, u16 LoRA id bytes, 28 bytes of 0
      192  u64[buffers] lengths, u32[chunks] CRC32C, u32[token ids], pool, salt, LoRA id (UTF-8), zeroes

Event hashes, salt (the request's) and LoRA id (the adapter's name) are what KV events say of the page. Where there is
an event hash, a parent event hash of 0 says that the page begins a prompt.

The chunks' checksums restart at each buffer, so that a part of a page (a layer) can be verified by itself. A slot is
valid only if magic, version, namespace, key, lengths, header checksum and every chunk's checksum are what was asked.
A generation is unique within a writer folder and grows; an extent's is smaller than those of its slots.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hicache_ext.page import NO_PARENT, Namespace
from storage_backends.checksum import crc32c

VERSION = 1
BLOCK = 4096
CHUNK = 64 << 10
CRC32C = 1
EXTENT_MAGIC = b"HICEXT01"
SLOT_MAGIC = b"HICSLOT1"
FORMAT_LINE = "hicache-ext local tier, format {}\n"

FLAG_TOKENS = 1
FLAG_EVENT_HASHES = 2

_EXTENT = struct.Struct("<8sIIQQQII16sQII")
_EXTENT_CRC = 76
_SLOT = struct.Struct("<8sHHI16s32s32sQQQIIIHHIIqqHH28x")
SLOT_CRC_AT = 140
#: What a slot header counts, in order of its offset, and the bytes of one.
_COUNTED = {"buffers": 8, "chunks": 4, "pool": 1, "tokens": 4, "salt": 1, "lora": 1}
_COUNTS = np.dtype(
    {
        "names": list(_COUNTED),
        "formats": ["<u4", "<u4", "<u2", "<u4", "<u2", "<u2"],
        "offsets": [120, 124, 134, 136, 160, 162],
        "itemsize": _SLOT.size,
    }
)
#: Room in every slot header for pool name, salt and LoRA id together; longer ones are left out (never cut).
_STRINGS = 256

assert _EXTENT.size == 80
assert _SLOT.size == 192


class FormatError(ValueError):
    """These bytes are not a valid header of this format; the message says why."""


class UnknownVersion(FormatError):
    """A header of this family, of a version that this program does not know."""


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def chunk_count(lengths: tuple[int, ...]) -> int:
    """Checksummed chunks of a page with these buffers."""
    return sum(-(-length // CHUNK) for length in lengths)


@dataclass(frozen=True)
class SlotShape:
    """The sizes that all slots of one namespace share (bytes)."""

    header_bytes: int
    payload_bytes: int
    slot_bytes: int
    chunks: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, lengths: tuple[int, ...], page_size: int, step: int = BLOCK) -> SlotShape:
        """For pages with these buffer lengths (bytes) and `page_size` tokens; header and slot are multiples of step."""
        chunks = chunk_count(lengths)
        header = round_up(_SLOT.size + 8 * len(lengths) + 4 * chunks + 4 * page_size + _STRINGS, step)
        payload = sum(lengths)
        return cls(header, payload, header + round_up(payload, step), chunks)

    @classmethod
    def of_namespace(cls, namespace: Namespace) -> SlotShape:
        return cls.of(namespace.layout.buffer_lengths, namespace.layout.page_size)


@dataclass(frozen=True)
class ExtentHeader:
    generation: int
    slot_bytes: int
    extent_bytes: int
    slots: int
    number: int
    namespace: bytes
    time_ns: int
    description: bytes = b""

    def encode(self) -> bytes:
        """4096 bytes."""
        description = self.description if len(self.description) <= BLOCK - _EXTENT.size else b""
        raw = bytearray(BLOCK)
        _EXTENT.pack_into(
            raw, 0, EXTENT_MAGIC, VERSION, BLOCK, self.generation, self.slot_bytes, self.extent_bytes,
            self.slots, self.number, self.namespace, self.time_ns, len(description), 0,
        )  # fmt: skip
        raw[_EXTENT.size : _EXTENT.size + len(description)] = description
        struct.pack_into("<I", raw, _EXTENT_CRC, crc32c(raw))
        return bytes(raw)

    @classmethod
    def decode(cls, raw: bytes | memoryview) -> ExtentHeader:
        """From 4096 bytes. Raises FormatError, UnknownVersion."""
        if len(raw) < BLOCK:
            raise FormatError("truncated extent header")
        magic, version, header, generation, slot, size, slots, number, namespace, time_ns, described, crc = (
            _EXTENT.unpack_from(raw)
        )
        if magic != EXTENT_MAGIC:
            raise FormatError("not an extent")
        if version != VERSION:
            raise UnknownVersion(f"extent format {version}")
        if _crc_without(raw[:BLOCK], _EXTENT_CRC) != crc:
            raise FormatError("extent header checksum")
        if header != BLOCK or slot < 2 * BLOCK or slot % BLOCK or BLOCK + slots * slot > size:
            raise FormatError("extent geometry")
        described = min(described, BLOCK - _EXTENT.size)
        description = bytes(raw[_EXTENT.size : _EXTENT.size + described])
        return cls(generation, slot, size, slots, number, namespace, time_ns, description)

    def slot_offset(self, slot: int) -> int:
        """Byte offset of slot number `slot` in the extent."""
        return BLOCK + slot * self.slot_bytes


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """One page's header. lengths: bytes per buffer. crcs: uint32[chunks]. tokens: uint32[...] or None."""

    namespace: bytes
    key: bytes
    parent: bytes
    generation: int
    time_ns: int
    lengths: tuple[int, ...]
    crcs: np.ndarray
    pool: str = "kv"
    tokens: np.ndarray | None = None
    event_hash: int = 0
    parent_event_hash: int = 0
    salt: str = ""
    lora: str = ""

    def encode_into(self, raw: memoryview) -> None:
        """Write all of `raw` (header_bytes of the slot's shape, writable). ValueError when it is too small."""
        texts = [text.encode() for text in (self.pool, self.salt, self.lora)]
        if sum(map(len, texts)) > _STRINGS:
            texts = [b"", b"", b""]
        tokens = np.empty(0, "<u4") if self.tokens is None else np.ascontiguousarray(self.tokens, "<u4")
        flags = FLAG_TOKENS * (self.tokens is not None) | FLAG_EVENT_HASHES * (self.event_hash != 0)
        body = b"".join(
            (np.asarray(self.lengths, "<u8").tobytes(), self.crcs.astype("<u4").tobytes(), tokens.tobytes(), *texts)
        )
        if _SLOT.size + len(body) > len(raw):
            raise ValueError(f"a slot header of {len(raw)} bytes cannot hold {_SLOT.size + len(body)}")
        raw[:] = bytes(len(raw))
        _SLOT.pack_into(
            raw, 0, SLOT_MAGIC, VERSION, flags, len(raw), self.namespace, self.key, self.parent, self.generation,
            self.time_ns, sum(self.lengths), len(self.lengths), len(self.crcs), CHUNK, CRC32C, len(texts[0]),
            len(tokens), 0, self.event_hash, self.parent_event_hash, len(texts[1]), len(texts[2]),
        )  # fmt: skip
        raw[_SLOT.size : _SLOT.size + len(body)] = body
        struct.pack_into("<I", raw, SLOT_CRC_AT, crc32c(raw))

    @classmethod
    def decode(cls, raw: bytes | bytearray | memoryview, step: int = BLOCK) -> SlotHeader:
        """From at least the header's bytes, which are a multiple of `step`; trusts no length it has not checked.

        Raises FormatError, UnknownVersion.
        """
        if len(raw) < max(step, _SLOT.size):
            raise FormatError("truncated slot header")
        (magic, version, flags, size, namespace, key, parent, generation, time_ns, payload, buffers, chunks, chunk,
         algorithm, pool_bytes, token_count, crc, event_hash, parent_event_hash, salt_bytes, lora_bytes,
        ) = _SLOT.unpack_from(raw)  # fmt: skip
        if magic != SLOT_MAGIC:
            raise FormatError("not a slot")
        if version != VERSION:
            raise UnknownVersion(f"slot format {version}")
        if not _SLOT.size <= size <= len(raw) or size % step:
            raise FormatError("slot header size")
        if _crc_without(raw[:size], SLOT_CRC_AT) != crc:
            raise FormatError("slot header checksum")
        if algorithm != CRC32C or chunk != CHUNK:
            raise UnknownVersion(f"checksum algorithm {algorithm} over chunks of {chunk}")
        end = _SLOT.size + 8 * buffers + 4 * chunks + 4 * token_count + pool_bytes + salt_bytes + lora_bytes
        if end > size:
            raise FormatError("slot header contents")
        at = _SLOT.size
        lengths = tuple(np.frombuffer(raw, "<u8", buffers, at).tolist())
        at += 8 * buffers
        crcs = np.frombuffer(raw, "<u4", chunks, at).astype(np.uint32)
        at += 4 * chunks
        tokens = np.frombuffer(raw, "<u4", token_count, at).astype(np.uint32) if flags & FLAG_TOKENS else None
        at += 4 * token_count
        if sum(lengths) != payload or chunk_count(lengths) != chunks:
            raise FormatError("slot header lengths")
        texts = []
        for length in (pool_bytes, salt_bytes, lora_bytes):
            texts.append(bytes(raw[at : at + length]).decode(errors="replace"))
            at += length
        return cls(
            namespace, key, parent, generation, time_ns, lengths, crcs, texts[0], tokens,
            event_hash, parent_event_hash, texts[1], texts[2],
        )  # fmt: skip


class SlotHeaders:
    """Headers of many pages of one namespace at once, byte for byte what `SlotHeader.encode_into` writes, except that
    the checksums are 0: whoever writes the pages computes them where the bytes are, and `seal_header` puts them in.
    """

    _FIELDS = np.dtype(
        {
            "names": ["flags", "key", "parent", "generation", "time", "events"],
            "formats": ["<u2", "V32", "V32", "<u8", "<u8", "(2,)<i8"],
            "offsets": [10, 32, 64, 96, 104, 144],
            "itemsize": _SLOT.size,
        }
    )

    def __init__(
        self, namespace: Namespace, shape: SlotShape, tokens: int | None, salt: str = "", lora: str = ""
    ) -> None:
        """tokens: token ids per page; None: these pages come without. salt, lora: of all of them."""
        lengths = namespace.layout.buffer_lengths
        # What KV events say is kept whole or not at all: hashes without their salt would pass for other pages'.
        self._whole = sum(len(text.encode()) for text in (namespace.pool, salt, lora)) <= _STRINGS
        empty = SlotHeader(
            namespace.digest, NO_PARENT, NO_PARENT, 0, 0, lengths, np.zeros(shape.chunks, np.uint32), namespace.pool,
            None if tokens is None else np.zeros(tokens, np.uint32), 0, 0, salt, lora,
        )  # fmt: skip
        self._blank = np.zeros(shape.header_bytes, np.uint8)
        empty.encode_into(self._blank.data)
        self._blank[SLOT_CRC_AT : SLOT_CRC_AT + 4] = 0
        self._tokens_at = _crcs_at(len(lengths)) + 4 * shape.chunks

    def write(
        self, rows: np.ndarray, which: np.ndarray, keys: bytes, parents: bytes | None, generations: np.ndarray,
        time_ns: int, tokens: np.ndarray | None, event_hashes: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Page i's header into rows[which[i]].

        rows: uint8[..., at least the header's bytes]. keys, parents: 32 bytes per page. generations: uint64[n].
        tokens: uint32[n, as many as were promised]. event_hashes: int64[n, 2].
        """
        rows[which, : len(self._blank)] = self._blank
        fields = rows[:, : _SLOT.size].view(self._FIELDS)[:, 0]
        fields["key"][which] = np.frombuffer(keys, "V32")
        if parents is not None:
            fields["parent"][which] = np.frombuffer(parents, "V32")
        fields["generation"][which] = generations
        fields["time"][which] = time_ns
        if event_hashes is not None and self._whole:
            fields["events"][which] = event_hashes
            fields["flags"][which] |= np.where(event_hashes[:, 0] != 0, FLAG_EVENT_HASHES, 0).astype(np.uint16)
        if tokens is not None:
            flat = np.ascontiguousarray(tokens, "<u4").view(np.uint8)
            rows[which, self._tokens_at : self._tokens_at + flat.shape[1]] = flat


def slot_contents_end(rows: np.ndarray) -> np.ndarray:
    """int64[n]: where the contents end that slot headers (uint8[n, header bytes]) say they have."""
    fields = rows[:, : _SLOT.size].view(_COUNTS)[:, 0]
    counts = [fields[name].astype(np.int64) * each for name, each in _COUNTED.items()]
    return _SLOT.size + np.sum(counts, axis=0)


def seal_header(raw: memoryview, buffers: int, crcs: np.ndarray) -> None:
    """Put the chunks' checksums (uint32) and its own into a header of `SlotHeaders`."""
    at = _crcs_at(buffers)
    raw[at : at + 4 * len(crcs)] = crcs.astype("<u4").tobytes()
    struct.pack_into("<I", raw, SLOT_CRC_AT, crc32c(raw))


def _crcs_at(buffers: int) -> int:
    return _SLOT.size + 8 * buffers


def _crc_without(raw: bytes | bytearray | memoryview, at: int) -> int:
    """CRC32C of `raw` with the four bytes at `at` taken as zero."""
    copy = bytearray(raw)
    copy[at : at + 4] = bytes(4)
    return crc32c(copy)

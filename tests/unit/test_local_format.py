"""The on-disk format: golden bytes, round trips, and that no flipped byte of a header passes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_backends.checksum import chunk_crcs, crc32c
from storage_backends.format import BLOCK, ExtentHeader, FormatError, SlotHeader, SlotShape, UnknownVersion
from storage_backends.local.residency import Kind, Record

GOLDEN = Path(__file__).parent / "golden_format_v1.bin"

EXTENT = ExtentHeader(
    7, 2 * BLOCK + 4096, BLOCK + 3 * (2 * BLOCK + 4096), 3, 5, b"namespace-digest", 1234567890, b'{"a":1}'
)
SLOT = SlotHeader(
    b"namespace-digest", b"k" * 32, b"p" * 32, 8, 987654321, (70000, 4096), np.array([1, 2, 0xFFFFFFFF], np.uint32),
    "kv", np.arange(16, dtype=np.uint32), -5, 6, "tenant", "lora",
)  # fmt: skip
RECORD = Record(Kind.STORED, 5, 2, 8, 987654321, b"namespace-digest", b"k" * 32, b"p" * 32)


def encoded_slot(header: SlotHeader) -> bytes:
    tokens = 0 if header.tokens is None else len(header.tokens)
    raw = bytearray(SlotShape.of(header.lengths, tokens).header_bytes)
    header.encode_into(memoryview(raw))
    return bytes(raw)


def test_golden_bytes() -> None:
    """Written by version 1. If this fails, the format changed: that takes a new version number, not a new file."""
    assert EXTENT.encode() + encoded_slot(SLOT) + RECORD.encode() == GOLDEN.read_bytes()


def test_golden_bytes_are_understood() -> None:
    raw = GOLDEN.read_bytes()
    assert ExtentHeader.decode(raw[:BLOCK]) == EXTENT
    slot = SlotHeader.decode(raw[BLOCK : 2 * BLOCK])
    assert slot.tokens is not None
    assert (slot.key, slot.parent, slot.lengths, slot.generation, slot.pool, slot.salt, slot.lora) == (
        SLOT.key, SLOT.parent, SLOT.lengths, 8, "kv", "tenant", "lora",
    )  # fmt: skip
    assert (slot.event_hash, slot.parent_event_hash) == (-5, 6)
    assert slot.tokens.tolist() == list(range(16))
    assert slot.crcs.tolist() == [1, 2, 0xFFFFFFFF]
    assert Record.decode(raw[2 * BLOCK :]) == RECORD


def test_checksum_is_crc32c_per_64_kib_restarting_at_each_buffer() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(1).integers(0, 256, 70000 + 4096, np.uint8)
    address = data.ctypes.data
    crcs = chunk_crcs(np.array([address, address + 70000], np.uint64), np.array([70000, 4096], np.uint64))
    spans = [data[:65536], data[65536:70000], data[70000:]]
    assert crcs.tolist() == [crc32c(span.tobytes()) for span in spans]


@given(st.integers(0, 2 * BLOCK - 1), st.integers(1, 255))
def test_no_flipped_byte_of_a_header_passes(at: int, flip: int) -> None:
    raw = bytearray(GOLDEN.read_bytes()[: 2 * BLOCK])
    raw[at] ^= flip
    decode, header = (ExtentHeader.decode, raw[:BLOCK]) if at < BLOCK else (SlotHeader.decode, raw[BLOCK:])
    with pytest.raises(FormatError):
        decode(header)


@given(st.integers(0, 127), st.integers(1, 255))
def test_no_flipped_byte_of_a_record_passes(at: int, flip: int) -> None:
    raw = bytearray(RECORD.encode())
    raw[at] ^= flip
    with pytest.raises(FormatError):
        Record.decode(bytes(raw))


@given(st.binary(max_size=3 * BLOCK))
def test_arbitrary_bytes_are_refused_not_believed(raw: bytes) -> None:
    for decode in (ExtentHeader.decode, SlotHeader.decode, Record.decode):
        with pytest.raises(FormatError):
            decode(raw)


def _resealed(raw: bytearray, at: int) -> bytes:
    """A header with a right checksum over wrong contents: what a bug or an attacker could write."""
    raw[at : at + 4] = bytes(4)
    raw[at : at + 4] = crc32c(raw).to_bytes(4, "little")
    return bytes(raw)


@given(st.integers(8, 191), st.binary(min_size=1, max_size=8))
def test_a_sealed_header_with_wild_numbers_never_crashes(at: int, wild: bytes) -> None:
    raw = bytearray(encoded_slot(SLOT))
    raw[at : at + len(wild)] = wild
    try:
        header = SlotHeader.decode(_resealed(raw, 140))
    except FormatError:
        return
    assert sum(header.lengths) == 74096
    assert len(header.crcs) == 3


def test_an_unknown_version_says_so() -> None:
    extent, slot = bytearray(EXTENT.encode()), bytearray(encoded_slot(SLOT))
    extent[8], slot[8] = 2, 2
    with pytest.raises(UnknownVersion, match="extent format 2"):
        ExtentHeader.decode(_resealed(extent, 76))
    with pytest.raises(UnknownVersion, match="slot format 2"):
        SlotHeader.decode(_resealed(slot, 140))


@given(
    st.lists(st.integers(1, 200_000), min_size=1, max_size=70).map(tuple),
    st.integers(0, 2048),
    st.booleans(),
    st.text(max_size=100),
)
def test_every_shape_holds_its_header(lengths: tuple[int, ...], tokens: int, with_tokens: bool, salt: str) -> None:
    shape = SlotShape.of(lengths, tokens)
    assert shape.header_bytes % BLOCK == 0
    assert shape.slot_bytes % BLOCK == 0
    assert shape.slot_bytes >= shape.header_bytes + sum(lengths)
    given_tokens = np.arange(tokens, dtype=np.uint32) if with_tokens else None
    crcs = np.arange(shape.chunks, dtype=np.uint32)
    key = hashlib.sha256(salt.encode()).digest()
    header = SlotHeader(bytes(16), key, bytes(32), 1, 2, lengths, crcs, "kv", given_tokens, salt=salt)
    raw = bytearray(shape.header_bytes)
    header.encode_into(memoryview(raw))
    back = SlotHeader.decode(bytes(raw))
    assert back.lengths == lengths
    assert back.key == key
    assert np.array_equal(back.crcs, crcs)
    assert back.salt in (salt, "")
    if with_tokens:
        assert back.tokens is not None
        assert np.array_equal(back.tokens, given_tokens)
    else:
        assert back.tokens is None

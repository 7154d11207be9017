"""Reading slot headers in bulk: the native scan against the Python one, on whole and on damaged headers."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_backends import format as slot_format
from storage_backends.checksum import crc32c
from storage_backends.format import BLOCK, ExtentHeader, SlotHeader, SlotShape
from storage_backends.local import headers as headers_module
from storage_backends.local.extents import Extent
from storage_backends.local.headers import Found, read_headers, read_headers_python
from storage_backends.local.slots import CancelFlag

SLOTS = 12
#: A page with a header of one block, and one of so many tokens that its header has three.
SHAPES = [((4096, 100), 16), ((70000, 4096), 2048)]
needs_native = pytest.mark.skipif(headers_module._native is None, reason="the native scan is not built")


def slot_header(n: int, lengths: tuple[int, ...], tokens: int) -> SlotHeader:
    crcs = np.arange(SlotShape.of(lengths, tokens).chunks, dtype=np.uint32)
    return SlotHeader(
        b"n" * 16, n.to_bytes(32, "big"), bytes(32), 100 + n, 5 + n, lengths, crcs,
        tokens=np.arange(tokens, dtype=np.uint32),
    )  # fmt: skip


def make_extent(path: Path, lengths: tuple[int, ...], tokens: int, direct: bool = False) -> Extent:
    shape = SlotShape.of(lengths, tokens)
    size = BLOCK + SLOTS * shape.slot_bytes
    header = ExtentHeader(1, shape.slot_bytes, size, SLOTS, 0, b"n" * 16, 7)
    raw = bytearray(size)
    raw[:BLOCK] = header.encode()
    for slot in range(SLOTS):
        at = header.slot_offset(slot)
        slot_header(slot, lengths, tokens).encode_into(memoryview(raw)[at : at + shape.header_bytes])
    path.write_bytes(raw)
    return Extent(path, 0, header, os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0)))


@pytest.fixture(params=SHAPES, ids=["one block", "three blocks"])
def extent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Extent]:
    made = make_extent(tmp_path / "e", *request.param)
    yield made
    os.close(made.fd)


def expected(lengths: tuple[int, ...], tokens: int) -> list[Found]:
    pages = [slot_header(n, lengths, tokens) for n in range(SLOTS)]
    return [Found(n, p.generation, p.time_ns, p.namespace, p.key, p.parent) for n, p in enumerate(pages)]


@pytest.mark.parametrize("shape", SHAPES, ids=["one block", "three blocks"])
@pytest.mark.parametrize("direct", [False, True])
def test_every_whole_header_is_found(tmp_path: Path, shape: tuple[tuple[int, ...], int], direct: bool) -> None:
    extent = make_extent(tmp_path / "e", *shape)
    os.close(extent.fd)
    try:
        extent.fd = os.open(tmp_path / "e", os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError:
        pytest.skip("no direct I/O here")
    for read in (read_headers, read_headers_python):
        assert read(extent, range(SLOTS), CancelFlag()) == expected(*shape)
        assert read(extent, [7, 2], CancelFlag()) == [expected(*shape)[7], expected(*shape)[2]]
        assert read(extent, [], CancelFlag()) == []
    os.close(extent.fd)


@needs_native
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_native_and_python_find_the_same_in_damaged_headers(extent: Extent, data: st.DataObject) -> None:
    slot = data.draw(st.integers(0, SLOTS - 1))
    at, size = extent.offset(slot), 3 * BLOCK
    before = extent.path.read_bytes()
    raw = os.pread(extent.fd, size, at)
    hurt = bytearray(raw)
    match data.draw(st.sampled_from(["flip", "torn", "zero", "field", "sealed field", "short file"])):
        case "flip":
            hurt[data.draw(st.integers(0, 300) | st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
        case "torn":
            grain = data.draw(st.integers(0, 23)) * 512
            other = os.pread(extent.fd, size, extent.offset((slot + 1) % SLOTS))
            hurt[grain : len(other)] = other[grain:]
        case "zero":
            grain = data.draw(st.integers(0, 23)) * 512
            hurt[grain : grain + 512] = bytes(512)
        case "short file":
            os.truncate(extent.path, at + data.draw(st.integers(0, BLOCK)))
        case kind:
            field = data.draw(st.sampled_from([8, 12, 16, 96, 112, 120, 124, 128, 132, 134, 136, 160, 162, 192, 196]))
            hurt[field : field + 4] = data.draw(st.integers(0, 1 << 20) | st.integers(0, 2**32 - 1)).to_bytes(
                4, "little"
            )
            whole = int.from_bytes(hurt[12:16], "little")
            if kind == "sealed field" and 0 < whole <= size:  # right checksum, wild contents
                hurt[140:144] = bytes(4)
                hurt[140:144] = crc32c(hurt[:whole]).to_bytes(4, "little")
    if os.fstat(extent.fd).st_size >= at + len(hurt):
        os.pwrite(extent.fd, hurt, at)
    one = read_headers(extent, range(SLOTS), CancelFlag())
    two = read_headers_python(extent, range(SLOTS), CancelFlag())
    os.pwrite(extent.fd, before, 0)
    assert one == two


def test_a_flipped_byte_in_any_header_is_no_page(extent: Extent) -> None:
    """The negative control of the scan: not one of a thousand passes."""
    chance = random.Random(1)
    raw = os.pread(extent.fd, BLOCK, extent.offset(3))
    for at, read in zip(chance.choices(range(BLOCK), k=1000), itertools.cycle([read_headers, read_headers_python])):
        hurt = bytearray(raw)
        hurt[at] ^= 1 << chance.randrange(8)
        os.pwrite(extent.fd, hurt, extent.offset(3))
        assert read(extent, [3], CancelFlag()) == []


@pytest.mark.parametrize("read", [read_headers, read_headers_python])
def test_a_scan_that_is_cancelled_ends_at_once(extent: Extent, read: object) -> None:
    stop = CancelFlag()
    stop.set()
    assert read(extent, range(SLOTS), stop) == []  # type: ignore[operator]


@needs_native
def test_wrong_arguments_are_refused(extent: Extent) -> None:
    native = headers_module._native
    assert native is not None
    slots = np.arange(2, dtype=np.uint32)
    with pytest.raises(TypeError):
        native(extent.fd, BLOCK, extent.header.slot_bytes, slots.astype(np.uint64), 1, 0)
    for threads in (0, 65):
        with pytest.raises(ValueError, match="threads"):
            native(extent.fd, BLOCK, extent.header.slot_bytes, slots, threads, 0)
    with pytest.raises(ValueError, match=r"65.536"):
        native(extent.fd, BLOCK, extent.header.slot_bytes, np.zeros(65537, np.uint32), 1, 0)
    assert os.pread(extent.fd, 8, extent.offset(0)) == slot_format.SLOT_MAGIC

"""Headers of a part of device pages, all at once, beside the same thing one by one (storage_backends.local)."""

from __future__ import annotations

import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage_backends.checksum import crc32c
from storage_backends.format import SLOT_CRC_AT, SlotHeader, seal_header
from storage_backends.gds import headers
from storage_backends.local.slot_transfers import judge_header
from storage_backends.local.slots import CancelFlag, SlotIo, Verdict
from tests.pages import HostPool, chain, namespace

PAGES = 5
LENGTHS = (8192, 70_272)


def _group() -> Any:
    space, keys = namespace(LENGTHS), chain("headers", PAGES)
    batch = HostPool(space, PAGES).write_batch(keys)
    io = SlotIo(LENGTHS, space.layout.page_size, 4096, lambda address, length: None)
    extents: Any = [SimpleNamespace(base=0, fd=-1, serial=1)] * PAGES
    pages = list(range(PAGES))
    group = io.group(batch, pages, True, False, extents, pages, CancelFlag(), lambda *_: None)
    assert group is not None
    io.write_headers(group, replace(batch, memory="host"), pages, [7 + page for page in pages], 11)
    return group


CRCS = np.random.default_rng(1).integers(0, 1 << 32, (PAGES, 3), np.uint32)
SIZE = _group().io.shape.header_bytes


def _sealed(group: Any) -> np.ndarray:
    headers.seal(group, list(range(PAGES)), CRCS)
    rows, which = group.io.header_rows(group, list(range(PAGES)))
    return np.array(rows[which])


def test_sealed_as_one_by_one() -> None:
    one, many = _group(), _group()
    for page in range(PAGES):
        seal_header(one.header(page), len(LENGTHS), CRCS[page])
    headers.seal(many, [4, 2], CRCS[[4, 2]])
    assert [many.header(page) == one.header(page) for page in range(PAGES)] == [False, False, True, False, True]
    assert (_sealed(many)[0] == np.frombuffer(one.header(0), np.uint8)).all(), "and again, as they are"


@given(
    st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, SIZE - 1), st.integers(1, 255)), max_size=4),
    st.lists(st.tuples(st.sampled_from((0, 8, 12, 16, 32, 112, 120, 124, 128, 132, 134, 136, 160, 192)),
                       st.integers(0, 0xFFFF)), max_size=2),
    st.lists(st.sampled_from((SIZE, SIZE, SIZE, 0, 512, -5)), min_size=PAGES, max_size=PAGES),
)  # fmt: skip
def test_judged_as_one_by_one(
    flips: list[tuple[int, int, int]], forged: list[tuple[int, int]], moved: list[int]
) -> None:
    """Bytes flipped anywhere; fields of the first header forged, with a checksum that is right for them."""
    group = _group()
    rows = _sealed(group)
    for at, value in forged:
        struct.pack_into("<H", rows[0].data, at, value)
    if forged:
        rows[0, SLOT_CRC_AT : SLOT_CRC_AT + 4] = 0
        struct.pack_into("<I", rows[0].data, SLOT_CRC_AT, crc32c(rows[0].data))
    for page, at, bits in flips:
        rows[page, at] ^= bits
    verdicts, crcs = headers.judge(group, list(range(PAGES)), rows, np.array(moved, np.int64))
    for page in range(PAGES):
        if moved[page] < 0:
            assert verdicts[page] == Verdict.UNCHECKED
            continue
        found = judge_header(
            group.io.shape, group.namespace, group.key(page), rows[page].data, group.io.lengths, moved[page]
        )
        assert verdicts[page] == (Verdict.VALID if isinstance(found, SlotHeader) else found)
        if isinstance(found, SlotHeader):
            assert (crcs[page] == found.crcs).all()

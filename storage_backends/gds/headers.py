"""Headers of a part's pages, all at once: looked at one by one, small pages' cost more than their payloads.

Belongs here: sealing, judging and comparing the headers of one group as arrays. Does not belong here: what a header is
(storage_backends.format), or what is wrong with one that is not as expected (storage_backends.local.slot_transfers).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from storage_backends.checksum import chunk_crcs
from storage_backends.format import CHUNK, SLOT_CRC_AT, SlotHeader, seal_header, slot_contents_end
from storage_backends.local.slot_transfers import judge_header
from storage_backends.local.slots import SlotGroup, Verdict

_KEY = slice(32, 64)
_CRC = slice(SLOT_CRC_AT, SLOT_CRC_AT + 4)


def judge(group: SlotGroup, places: list[int], rows: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """After a read of `moved` bytes (int64[n], negative: -errno) of these pages' headers into rows (uint8[n, header
    bytes], a copy): uint8[n], VALID for a header that is the page's, else the Verdict; uint32[n, chunks], the checksums
    in those that are."""
    io, size = group.io, group.io.shape.header_bytes
    blank, same, at = _expected(group.namespace, tuple(io.lengths.tolist()), size)
    keys = np.frombuffer(group.keys, np.uint8).reshape(-1, 32)[places]
    crcs = rows[:, at : at + 4 * io.shape.chunks].copy().view("<u4").astype(np.uint32)
    good = (moved >= size) & (rows[:, same] == blank[same]).all(axis=1) & (rows[:, _KEY] == keys).all(axis=1)
    good &= slot_contents_end(rows) <= size
    good &= _sums(rows) == rows[:, _CRC].copy().view("<u4")[:, 0] if size <= CHUNK else False
    verdicts = np.where(good, np.uint8(Verdict.VALID), np.uint8(Verdict.UNCHECKED))
    for i in np.flatnonzero(~good & (moved >= 0)).tolist():  # few: what is it then?
        found = judge_header(
            io.shape, group.namespace, group.key(places[i]), memoryview(rows[i]), io.lengths, int(moved[i])
        )
        if isinstance(found, SlotHeader):
            verdicts[i], crcs[i] = Verdict.VALID, found.crcs
        else:
            verdicts[i] = found
    return verdicts, crcs


def seal(group: SlotGroup, places: list[int], crcs: np.ndarray) -> None:
    """Put the chunks' checksums (uint32[n, chunks]) and the headers' own into these pages' headers."""
    io, size = group.io, group.io.shape.header_bytes
    if size > CHUNK:
        for place, row in zip(places, crcs, strict=True):
            seal_header(group.header(place), len(io.lengths), row)
        return
    rows, which = io.header_rows(group, places)
    _, _, at = _expected(group.namespace, tuple(io.lengths.tolist()), size)
    sealed = rows[which]
    sealed[:, at : at + 4 * crcs.shape[1]] = np.ascontiguousarray(crcs, "<u4").view(np.uint8)
    sealed[:, _CRC] = _sums(sealed).astype("<u4")[:, None].view(np.uint8)
    rows[which] = sealed


def _sums(rows: np.ndarray) -> np.ndarray:
    """uint32[n]: CRC32C of each, the field for it taken as 0. One call for all: each would wait for the interpreter's
    lock again."""
    blanked = rows.copy()
    blanked[:, _CRC] = 0
    count, size = blanked.shape
    starts = np.uint64(blanked.ctypes.data) + np.arange(count, dtype=np.uint64) * np.uint64(size)
    return chunk_crcs(starts, np.full(count, size, np.uint64))


@lru_cache(maxsize=64)
def _expected(namespace: bytes, lengths: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A header of these pages (uint8[size]); where every one of them is the same; where the chunks' checksums begin."""
    chunks = sum(-(-length // CHUNK) for length in lengths)
    blank = np.zeros(size, np.uint8)
    SlotHeader(namespace, bytes(32), bytes(32), 0, 0, lengths, np.zeros(chunks, np.uint32)).encode_into(blank.data)
    at = 192 + 8 * len(lengths)
    # Magic and version; header bytes and namespace; payload bytes to checksum algorithm; lengths.
    same = np.r_[0:10, 12:32, 112:134, 192:at]
    return blank, same, at

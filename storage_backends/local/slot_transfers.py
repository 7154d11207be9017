"""Slots over an engine that knows only transfers: sealing and judging in Python, page by page.

Belongs here: the reference of what the native engine does with a slot (csrc/io/slot.cpp); the property tests hold one
against the other. Does not belong here: moving bytes.
"""

from __future__ import annotations

import ctypes
from functools import partial

import numpy as np

from storage_backends.checksum import chunk_crcs
from storage_backends.format import FormatError, SlotHeader, SlotShape, seal_header
from storage_backends.local.engine import IoEngine, Transfer
from storage_backends.local.slots import SlotEngine, SlotGroup, Verdict

#: Bytes that are sealed before the first of them leave: the device works on these while the next are sealed.
_SEAL_BYTES = 8 << 20


class TransferSlots(SlotEngine):
    """For every engine but the native one, and for that one under injected faults."""

    def __init__(self, engine: IoEngine) -> None:
        self.engine = engine

    def submit_slots(self, group: SlotGroup) -> None:
        per_page = len(group.iov) // len(group)
        offsets = group.offsets.tolist()
        ready: list[Transfer] = []
        for page in range(len(group)):
            if group.write:
                _seal(group, page)
            iov = group.iov[page * per_page : (page + 1) * per_page]
            done = partial(_done, group, page)
            ready.append(Transfer(group.extents[page].fd, offsets[page], iov, group.write, done, group.cancelled))
            if group.write and len(ready) * group.io.shape.slot_bytes >= _SEAL_BYTES:
                self.engine.submit(ready)
                ready = []
        self.engine.submit(ready)


def judge(
    shape: SlotShape, namespace: bytes, key: bytes, header: memoryview, addresses: np.ndarray, lengths: np.ndarray,
    moved: int,
) -> Verdict:  # fmt: skip
    """After a read of `moved` bytes: is this the page, whole and unharmed? addresses, lengths: of its payload."""
    found = judge_header(shape, namespace, key, header, lengths, moved)
    if isinstance(found, Verdict):
        return found
    if moved < shape.header_bytes + shape.payload_bytes:
        return Verdict.DAMAGED
    return Verdict.VALID if np.array_equal(chunk_crcs(addresses, lengths), found.crcs) else Verdict.DAMAGED


def judge_header(
    shape: SlotShape, namespace: bytes, key: bytes, header: memoryview, lengths: np.ndarray, moved: int
) -> SlotHeader | Verdict:
    """After a read of `moved` bytes that begin with the header: the header, or what is wrong with it."""
    if moved < shape.header_bytes:
        return Verdict.DAMAGED
    try:
        found = SlotHeader.decode(header)
    except FormatError:
        return Verdict.DAMAGED
    if found.key != key or found.namespace != namespace:
        return Verdict.OTHER_PAGE
    return found if found.lengths == tuple(lengths.tolist()) else Verdict.DAMAGED


def _done(group: SlotGroup, page: int, moved: int) -> None:
    verdict = Verdict.UNCHECKED
    if moved >= 0 and not group.write:
        io = group.io
        verdict = judge(
            io.shape, group.namespace, group.key(page), group.header(page), group.payload[page], io.lengths, moved
        )
        if verdict is Verdict.VALID:
            _copy(group, page)
    group.ended((page,), (moved,), bytes((verdict,)))


def _seal(group: SlotGroup, page: int) -> None:
    """Bring the payload where it leaves from, and its checksums into the header."""
    io = group.io
    if group.copies is not None:
        _copy(group, page)
        end = int(group.headers[page]) + io.shape.header_bytes + io.shape.payload_bytes
        ctypes.memset(end, 0, int(group.headers[page]) + io.shape.slot_bytes - end)
    crcs = chunk_crcs(np.ascontiguousarray(group.payload[page]), io.lengths)
    seal_header(group.header(page), len(io.lengths), crcs)


def _copy(group: SlotGroup, page: int) -> None:
    """Between the caller's buffers and the bounce buffer, if there is one, in the direction of the group."""
    if group.copies is None:
        return
    theirs, ours = group.copies[page].tolist(), group.payload[page].tolist()
    targets, sources = (ours, theirs) if group.write else (theirs, ours)
    for target, source, length in zip(targets, sources, group.io.lengths.tolist(), strict=True):
        ctypes.memmove(target, source, length)

"""Slot headers in bulk: which pages lie in an extent, by what its slots say of themselves.

Belongs here: reading headers, natively and (the model of it, and what serves where that is not built) in Python. Does
not belong here: which slots are looked at and what becomes of their pages (recovery.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from storage_backends.buffers import OwnedMemory
from storage_backends.format import BLOCK, SLOT_MAGIC, FormatError, SlotHeader
from storage_backends.local.extents import Extent
from storage_backends.local.slots import CancelFlag

try:
    from hicache_ext._native import read_headers as _read_headers

    _native: Callable[..., bytes] | None = _read_headers
except ImportError:  # no compiler at installation, or a build from before the scan
    _native = None

#: Reads at a time.
_THREADS = 8
#: Headers are 4 KiB, larger only for pages of very many tokens, buffers or chunks.
MOST_HEADER = 1 << 20


class Found(NamedTuple):
    """What a whole header says of its slot's page."""

    slot: int
    generation: int
    time_ns: int
    namespace: bytes
    key: bytes
    parent: bytes


#: A row of what the native scan returns.
FOUND = np.dtype(
    {
        "names": list(Found._fields),
        "formats": ["<u4", "<u8", "<u8", "V16", "V32", "V32"],
        "offsets": [0, 8, 16, 24, 40, 72],
        "itemsize": 104,
    }
)


def read_headers(extent: Extent, slots: Sequence[int], stop: CancelFlag) -> list[Found]:
    """Those of these slots whose headers are whole and whose pages fit their slots. The extent is pinned.

    Ends early, with what it has, when `stop` is set. A slot that cannot be read has no page.
    """
    if _native is None:
        return read_headers_python(extent, slots, stop)
    rows = _native(
        extent.fd, extent.offset(0), extent.header.slot_bytes, np.array(slots, np.uint32), _THREADS, stop.address
    )
    return [Found._make(row) for row in np.frombuffer(rows, FOUND).tolist()]


def read_headers_python(extent: Extent, slots: Sequence[int], stop: CancelFlag) -> list[Found]:
    """`read_headers`, one slot after the other."""
    found = []
    memory = OwnedMemory(min(MOST_HEADER, extent.header.slot_bytes))
    for slot in slots:
        if stop.is_set():
            break
        try:
            header = read_header(extent, slot, memory.view)
        except (OSError, FormatError):
            continue
        if header is not None:
            found.append(_found(slot, header))
    return found


def found_in(slot: int, header: memoryview) -> Found | None:
    """What this header of `slot` says, which was read; None where it is not whole."""
    try:
        return _found(slot, SlotHeader.decode(header))
    except FormatError:
        return None


def _found(slot: int, header: SlotHeader) -> Found:
    return Found(slot, header.generation, header.time_ns, header.namespace, header.key, header.parent)


def read_header(extent: Extent, slot: int, room: memoryview) -> SlotHeader | None:
    """The slot's header; None where there is none, or its page does not fit the slot. The extent is pinned.

    room: memory for it, aligned, no larger than MOST_HEADER.

    Raises OSError, FormatError.
    """
    got = os.preadv(extent.fd, [room[:BLOCK]], extent.offset(slot))
    if got < BLOCK or bytes(room[:8]) != SLOT_MAGIC:
        return None
    size = int.from_bytes(room[12:16], "little")
    if BLOCK < size <= len(room) and size % BLOCK == 0:
        got = os.preadv(extent.fd, [room[:size]], extent.offset(slot))
    header = SlotHeader.decode(room[:got])
    return header if size + sum(header.lengths) <= extent.header.slot_bytes else None

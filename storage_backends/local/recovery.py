"""The header scan: finds pages that reached the disk but not the residency log (a crash, a lost or damaged log).

Belongs here: reading headers of slots that the log does not name, beside the serving. Does not belong here: what the
log says (residency.py), or trust in a payload (every read verifies it).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from storage_backends.buffers import OwnedMemory
from storage_backends.format import SLOT_MAGIC, FormatError, SlotHeader
from storage_backends.local.extents import Extent

if TYPE_CHECKING:
    from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
#: Headers are 4 KiB, larger only for pages of very many tokens, buffers or chunks.
_HEADER_ROOM = 1 << 20


def scan(places: list[tuple[Extent, int]], writer: Writer, lock: threading.RLock, stop: threading.Event) -> int:
    """Read the headers of `places`, give valid ones to the writer; how many pages came back.

    Each header is read while its slot is pinned by nothing: a write into the same slot at the same time makes the
    header invalid or its place taken, and `Writer.recover` looks again under the lock.
    """
    found = 0
    memory = OwnedMemory(_HEADER_ROOM)
    said = time.monotonic()
    for i, (extent, slot) in enumerate(places):
        if stop.is_set():
            break
        with lock:
            if extent.doomed:
                continue
            extent.pins += 1
        try:
            header = _read_header(extent, slot, memory.view)
        finally:
            with lock:
                extent.unpin()
        if header is not None:
            with lock:
                found += writer.recover(extent, slot, header)
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            logger.info("header scan: %d of %d slots, %d pages found", i + 1, len(places), found)
    if found:
        logger.info("header scan: %d pages found that the residency log did not name", found)
    return found


def _read_header(extent: Extent, slot: int, room: memoryview) -> SlotHeader | None:
    """The slot's header if it is one of a page that fits the slot."""
    try:
        size = min(len(room), extent.header.slot_bytes)
        offset = extent.offset(slot)
        got = os.preadv(extent.fd, [room[:4096]], offset)
        if got < 4096 or bytes(room[:8]) != SLOT_MAGIC:
            return None
        need = int.from_bytes(room[12:16], "little")
        if 4096 < need <= size and need % 4096 == 0:
            got = os.preadv(extent.fd, [room[:need]], offset)
        header = SlotHeader.decode(room[:got])
    except (OSError, FormatError):
        return None
    return header if need + sum(header.lengths) <= extent.header.slot_bytes else None

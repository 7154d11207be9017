"""One page's trip to or from its slot: which memory takes part, and whether what came back is the page asked for.

Belongs here: direct or bounced, headers, checksums. Does not belong here: where the slot is, or what follows from a
verdict (backend.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import Enum

import numpy as np

from storage_backends.base import PageBatch
from storage_backends.buffers import BufferPool
from storage_backends.local.checksum import chunk_crcs
from storage_backends.local.format import FormatError, SlotHeader, SlotShape

_HEADERS = 256
_BOUNCE_BYTES = 64 << 20


class Verdict(Enum):
    """What a slot turned out to hold."""

    VALID = "valid"
    OTHER_PAGE = "other page"  # a good header, of another page: the slot was reused or is not what the index thinks
    DAMAGED = "damaged"  # a bad header, a bad checksum, or less than a page


@dataclass(slots=True)
class SlotMemory:
    """The memory of one transfer: header, then the caller's buffers, or a bounce buffer that holds everything."""

    header: int
    bounced: bool
    addresses: np.ndarray
    lengths: np.ndarray
    iov: np.ndarray
    length: int

    def header_view(self, shape: SlotShape) -> memoryview:
        return memoryview((ctypes.c_char * shape.header_bytes).from_address(self.header)).cast("B")


class SlotIo:
    """Transfers for pages of one shape. `alignment`: what direct I/O asks of addresses and lengths (bytes)."""

    def __init__(self, shape: SlotShape, alignment: int) -> None:
        self.shape = shape
        self._mask = np.uint64(alignment - 1)
        self._headers = BufferPool(shape.header_bytes, _HEADERS)
        self._bounce: BufferPool | None = None

    def must_bounce(self, batch: PageBatch) -> bool:
        """Whether any buffer of the batch does not fit direct I/O. The same for every batch of a pool."""
        return bool(((batch.addresses | batch.lengths) & self._mask).any())

    def take(self, batch: PageBatch, page: int, bounced: bool) -> SlotMemory:
        """Memory for one page's transfer; waits while all of it is in flight."""
        first, last = int(batch.offsets[page]), int(batch.offsets[page + 1])
        addresses, lengths = batch.addresses[first:last], batch.lengths[first:last]
        if not bounced:
            header = self._take(self._headers)
            iov = np.empty((1 + len(addresses), 2), np.uint64)
            iov[0] = (header, self.shape.header_bytes)
            iov[1:, 0], iov[1:, 1] = addresses, lengths
            length = self.shape.header_bytes + self.shape.payload_bytes
        else:
            header = self._take(self._bounce_pool())
            starts = np.zeros(len(lengths), np.uint64)
            np.cumsum(lengths[:-1], out=starts[1:])
            addresses = starts + np.uint64(header + self.shape.header_bytes)
            length = self.shape.slot_bytes
            iov = np.array([[header, length]], np.uint64)
        return SlotMemory(header, bounced, addresses, lengths, iov, length)

    def give(self, memory: SlotMemory) -> None:
        (self._bounce_pool() if memory.bounced else self._headers).give(memory.header)

    def fill(self, memory: SlotMemory, batch: PageBatch, page: int) -> np.ndarray:
        """Before a write: bring the payload where it leaves from; the checksums of those bytes, uint32[chunks]."""
        if memory.bounced:
            first = int(batch.offsets[page])
            for j, (address, length) in enumerate(zip(memory.addresses, memory.lengths, strict=True)):
                ctypes.memmove(int(address), int(batch.addresses[first + j]), int(length))
            end = memory.header + self.shape.header_bytes + self.shape.payload_bytes
            ctypes.memset(end, 0, memory.header + self.shape.slot_bytes - end)
        return chunk_crcs(memory.addresses, memory.lengths)

    def verify(self, memory: SlotMemory, batch: PageBatch, page: int, moved: int) -> tuple[Verdict, SlotHeader | None]:
        """After a read of `moved` bytes: is this the page, whole and unharmed? If so its bytes are where asked."""
        shape = self.shape
        if moved < shape.header_bytes:
            return Verdict.DAMAGED, None
        try:
            header = SlotHeader.decode(memory.header_view(shape))
        except FormatError:
            return Verdict.DAMAGED, None
        if header.key != batch.key(page) or header.namespace != batch.namespace.digest:
            return Verdict.OTHER_PAGE, header
        if header.lengths != tuple(memory.lengths.tolist()) or moved < shape.header_bytes + shape.payload_bytes:
            return Verdict.DAMAGED, header
        if not np.array_equal(chunk_crcs(memory.addresses, memory.lengths), header.crcs):
            return Verdict.DAMAGED, header
        if memory.bounced:
            first = int(batch.offsets[page])
            for j, (address, length) in enumerate(zip(memory.addresses, memory.lengths, strict=True)):
                ctypes.memmove(int(batch.addresses[first + j]), int(address), int(length))
        return Verdict.VALID, header

    @staticmethod
    def _take(pool: BufferPool) -> int:
        address = pool.take()
        assert address is not None  # take() without a timeout waits
        return address

    def _bounce_pool(self) -> BufferPool:
        if self._bounce is None:
            self._bounce = BufferPool(self.shape.slot_bytes, max(2, _BOUNCE_BYTES // self.shape.slot_bytes))
        return self._bounce

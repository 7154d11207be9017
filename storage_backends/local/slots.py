"""Pages on their way to or from their slots: which memory takes part, and who moves, seals and judges them.

Belongs here: direct or bounced, groups of pages, the interface of what moves them. Does not belong here: where a slot
is and what follows from a verdict (backend.py), or how bytes are moved (engines; slot_transfers.py for those that know
nothing of slots).
"""

from __future__ import annotations

import ctypes
import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from hicache_ext.page import KEY_BYTES
from storage_backends.base import MemoryKind, PageBatch
from storage_backends.buffers import BufferPool
from storage_backends.format import BLOCK, SlotHeaders, SlotShape
from storage_backends.local.engine import IoEngine
from storage_backends.local.extents import Extent

_HEADERS = 512
_BOUNCE_BYTES = 64 << 20
_TEMPLATES = 64
_KEY = np.dtype((np.void, KEY_BYTES))

#: As -errno in the place of bytes moved: what the memory lies in failed, not the disk.
MEMORY_TROUBLE = errno.ENOTRECOVERABLE


class Verdict(IntEnum):
    """What a slot turned out to hold. The native engine's numbers."""

    UNCHECKED = 0  # a write, or an error: the bytes moved say all there is
    VALID = 1
    OTHER_PAGE = 2  # a good header, of another page: the slot was reused or is not what the index thinks
    DAMAGED = 3  # a bad header, a bad checksum, or less than a page


class CancelFlag(threading.Event):
    """An event that an engine without Python can see too: `address` is that of a byte which `set` makes 1."""

    def __init__(self) -> None:
        super().__init__()
        self._byte = np.zeros(1, np.uint8)
        self.address: int = self._byte.ctypes.data

    def set(self) -> None:
        self._byte[0] = 1
        super().set()


Ended = Callable[[Sequence[int], Sequence[int], bytes], None]
"""(pages by their place in the group, bytes moved or -errno of each, a Verdict byte of each). Called several times for
one group, with each page once, on threads of the engine; nothing touches the pages' memory after that."""


@dataclass(slots=True, eq=False)
class SlotGroup:
    """n pages of one namespace that travel together.

    keys: n x 32 bytes. extents, numbers: the slot of each page. headers: uint64[n], addresses. iov:
    uint64[n * k, 2], what moves for each page: its header and its buffers, or one bounce buffer that holds both.
    payload: uint64[n, buffers], where the payload lies while it travels. copies: uint64[n, buffers], where it comes
    from or goes to when bounced, else None. owner: keeps the caller's memory alive. For writes the headers are there,
    checksums still 0. memory: the payload's; headers are always the host's.
    """

    io: SlotIo
    write: bool
    namespace: bytes
    keys: bytes
    extents: list[Extent]
    numbers: list[int]
    headers: np.ndarray
    iov: np.ndarray
    payload: np.ndarray
    copies: np.ndarray | None
    cancelled: CancelFlag
    ended: Ended
    owner: object
    memory: MemoryKind = "host"

    def __len__(self) -> int:
        return len(self.extents)

    @property
    def page_bytes(self) -> int:
        """What moves for each page when all of it does."""
        shape = self.io.shape
        return shape.header_bytes + shape.payload_bytes if self.copies is None else shape.slot_bytes

    def header(self, page: int) -> memoryview:
        """The header's memory: the group's until it is given back."""
        raw = (ctypes.c_char * self.io.shape.header_bytes).from_address(int(self.headers[page]))
        return memoryview(raw).cast("B")

    def key(self, page: int) -> bytes:
        return self.keys[page * KEY_BYTES : (page + 1) * KEY_BYTES]

    @property
    def offsets(self) -> np.ndarray:
        """uint64[n]: where each page's slot begins in what its extent's `fd` is open on."""
        bases = np.array([extent.base for extent in self.extents], np.uint64)
        return bases + np.array(self.numbers, np.uint64) * np.uint64(self.io.shape.slot_bytes) + np.uint64(BLOCK)


class SlotEngine(ABC):
    """Moves groups: computes checksums before a write and judges what a read brought."""

    @abstractmethod
    def submit_slots(self, group: SlotGroup) -> None:
        """Begin all pages of the group; each ends once, through `group.ended`, never on the calling thread."""

    def retain_files(self, serials: Sequence[int]) -> None:
        """These extents are open (Extent.serial); whatever else was kept of others may go."""

    def stop(self, timeout: float) -> bool:
        """Begin nothing more, besides what the engine below does; whether all that was begun has ended."""
        return True


def slot_engine(engine: IoEngine) -> SlotEngine:
    """What moves slots where `engine` moves bytes."""
    if isinstance(engine, SlotEngine):
        return engine
    from storage_backends.local.slot_transfers import TransferSlots

    return TransferSlots(engine)


class SlotIo:
    """Memory for pages of one shape.

    lengths: bytes of each buffer of a page. alignment: what direct I/O asks of addresses and lengths (bytes).
    register: told once of memory that many transfers will use.
    """

    def __init__(
        self, lengths: tuple[int, ...], page_size: int, alignment: int, register: Callable[[int, int], None]
    ) -> None:
        self.shape = SlotShape.of(lengths, page_size)
        self.lengths = np.array(lengths, np.uint64)
        self._starts = np.cumsum([self.shape.header_bytes, *lengths[:-1]]).astype(np.uint64)
        self._mask = np.uint64(alignment - 1)
        self._register = register
        self._headers = BufferPool(self.shape.header_bytes, _HEADERS)
        self._bounce: BufferPool | None = None
        self._templates: dict[tuple[bytes, int | None, str, str], SlotHeaders] = {}
        self._lock = threading.Lock()

    def must_bounce(self, batch: PageBatch) -> bool:
        """Whether any buffer of the batch does not fit direct I/O. The same for every batch of a pool.

        ValueError when the batch's buffers are not its namespace's: a mistake that would write over other slots.
        """
        lengths = batch.lengths.reshape(-1, len(self.lengths)) if len(batch.lengths) % len(self.lengths) == 0 else None
        if lengths is None or len(lengths) != len(batch) or (lengths != self.lengths).any():
            raise ValueError(f"the batch's buffers are not those of its namespace, {self.lengths.tolist()} per page")
        return batch.memory == "host" and bool(((batch.addresses | batch.lengths) & self._mask).any())

    def group(
        self, batch: PageBatch, pages: list[int], write: bool, bounced: bool, extents: list[Extent],
        numbers: list[int], cancelled: CancelFlag, ended: Ended, timeout: float | None = None,
    ) -> SlotGroup | None:  # fmt: skip
        """The first of these pages, as many as there is memory for, at least one.

        Waits up to `timeout` seconds (None: for ever) while all memory is in use; then None.
        """
        shape, buffers = self.shape, len(self.lengths)
        taken = self._pool(bounced).take_many(len(pages), timeout)
        count = len(taken)
        if not count:
            return None
        headers = np.array(taken, np.uint64)
        places: list[int] | slice = pages[:count]
        if count and pages[count - 1] - pages[0] == count - 1:
            places = slice(pages[0], pages[0] + count)  # one copy instead of a search
        addresses = batch.addresses.reshape(-1, buffers)[places]
        copies: np.ndarray | None = None
        if bounced:
            iov = np.empty((count, 2), np.uint64)
            iov[:, 0], iov[:, 1] = headers, shape.slot_bytes
            addresses, copies = headers[:, None] + self._starts, addresses
        else:
            whole = np.empty((count, 1 + buffers, 2), np.uint64)
            whole[:, 0, 0], whole[:, 0, 1] = headers, shape.header_bytes
            whole[:, 1:, 0], whole[:, 1:, 1] = addresses, self.lengths
            iov = whole.reshape(-1, 2)
        return SlotGroup(
            self, write, batch.namespace.digest, rows(batch.keys, pages[:count]), extents[:count], numbers[:count],
            headers, iov, addresses, copies, cancelled, ended, batch.owner, batch.memory,
        )  # fmt: skip

    def write_headers(
        self, group: SlotGroup, batch: PageBatch, pages: list[int], generations: list[int], time_ns: int
    ) -> None:
        """What is known of the group's pages before their bytes are looked at."""
        pool = self._pool(group.copies is not None)
        tokens = None if batch.tokens is None else batch.tokens[pages]
        self._template(batch, None if tokens is None else tokens.shape[1]).write(
            pool.rows, pool.numbers(group.headers), group.keys,
            None if batch.parents is None else rows(batch.parents, pages), np.array(generations, np.uint64),
            time_ns, tokens, None if batch.event_hashes is None else batch.event_hashes[pages],
        )  # fmt: skip

    def header_rows(self, group: SlotGroup, pages: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Memory of headers (uint8[..., header bytes], of other groups' too), and which of them are these pages'."""
        pool = self._pool(group.copies is not None)
        return pool.rows, pool.numbers(group.headers[pages])

    def give(self, group: SlotGroup, pages: Sequence[int]) -> None:
        """Memory of pages that have ended."""
        headers = group.headers.tolist()
        self._pool(group.copies is not None).give_many([headers[page] for page in pages])

    def _template(self, batch: PageBatch, tokens: int | None) -> SlotHeaders:
        key = (batch.namespace.digest, tokens, batch.salt, batch.lora)
        found = self._templates.get(key)
        if found is None:
            with self._lock:
                if len(self._templates) >= _TEMPLATES:
                    self._templates.clear()
                found = self._templates[key] = SlotHeaders(batch.namespace, self.shape, *key[1:])
        return found

    def _pool(self, bounced: bool) -> BufferPool:
        if not bounced:
            return self._headers
        if self._bounce is None:
            with self._lock:
                if self._bounce is None:
                    size = self.shape.slot_bytes
                    self._bounce = BufferPool(size, max(2, _BOUNCE_BYTES // size))
                    self._register(self._bounce.memory.address, self._bounce.memory.size)
        return self._bounce


def rows(packed: bytes, pages: list[int]) -> bytes:
    """These pages' 32 bytes out of a batch's. pages: ascending, no page twice."""
    if len(pages) * KEY_BYTES == len(packed):
        return packed
    return np.frombuffer(packed, _KEY)[pages].tobytes() if pages else b""

"""A page as one object: what stores that keep a page as one value, object or file write, all of them the same bytes.

Belongs here: a page to bytes, and the judgement of bytes that came back. Does not belong here: names of objects, I/O,
or what follows from a verdict.

    object   +-------------+----------+----------+-----+
             | slot header | buffer 0 | buffer 1 | ... |      the slot of format.py, without its padding
             +-------------+----------+----------+-----+

    header   as in format.py, generation 0, rounded up to 64 bytes: that of a page of 70,272 bytes has 512 bytes; 4096
             would be 5 % more to move. A store that wants aligned memory takes another `step` and `pad`.

    sealed   +----------------------+-------------------------------------+
             | seal, 64 bytes       | the object above, encrypted          |      (seal.py)
             +----------------------+-------------------------------------+

All objects of a namespace have the same size, so that a store's own idea of an object's size tells a cut one without
reading it. An object is valid only if magic, version, namespace, key, lengths, header checksum and every chunk's
checksum are what was asked; sealed ones must open as well. The format's version is part of every store's names
(`VERSION`), so that a store shared by programs of two versions gives neither the other's objects.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from hicache_ext.page import Namespace
from storage_backends.base import Buffers, Notes, Outcome, PageBatch
from storage_backends.checksum import chunk_crcs
from storage_backends.format import VERSION, FormatError, SlotHeader, SlotHeaders, SlotShape, round_up, seal_header
from storage_backends.seal import Seal

__all__ = ["VERSION", "ObjectFormat", "ObjectFormats"]

STEP = 64
_FORMATS = 64


class ObjectFormat:
    """The objects of one namespace.

    step: the header is a multiple of it. pad: so is the whole object, with zeroes at its end.
    head_bytes: what comes before the first buffer. size: bytes of the whole object.
    """

    def __init__(self, namespace: Namespace, step: int = STEP, seal: Seal | None = None, pad: int = 1) -> None:
        self.namespace = namespace
        layout = namespace.layout
        self._shape = SlotShape.of(layout.buffer_lengths, layout.page_size, step)
        self._step, self._seal = step, seal
        self._lengths = np.array(layout.buffer_lengths, np.uint64)
        self._templates: dict[tuple[int | None, str, str], SlotHeaders] = {}
        self.head_bytes = self._shape.header_bytes + (seal.head_bytes if seal else 0)
        self.payload_bytes = self._shape.payload_bytes
        self.size = round_up(self.head_bytes + self.payload_bytes, pad)

    def check(self, batch: PageBatch) -> None:
        """ValueError when the batch's buffers are not its namespace's: a mistake that would cut or mix pages."""
        if not np.array_equal(batch.lengths, np.tile(self._lengths, len(batch))):
            raise ValueError(f"the batch's buffers are not those of its namespace, {self._lengths.tolist()} per page")

    def prepare(self, batch: PageBatch, page: int) -> tuple[bytearray, Buffers]:
        """What to write, in order: a head, and the page's own buffers (sealed: an encrypted copy of them)."""
        head = np.empty((1, self._shape.header_bytes), np.uint8)
        self.headers(batch, [page], head)
        raw = bytearray(head)
        if self._seal is None:
            return raw, batch.buffers(page)
        return self._seal.close(self.namespace.digest + batch.key(page), raw, batch.buffers(page))

    def headers(self, batch: PageBatch, pages: list[int], rows: np.ndarray) -> None:
        """The slot headers of these pages, with the checksums of their buffers as they are now.

        rows: uint8[n, header bytes], written.
        """
        tokens = None if batch.tokens is None else batch.tokens[pages]
        kind = (None if tokens is None else tokens.shape[1], batch.salt, batch.lora)
        template = self._templates.get(kind)
        if template is None:
            if len(self._templates) >= _FORMATS:
                self._templates.clear()
            template = self._templates[kind] = SlotHeaders(self.namespace, self._shape, *kind)
        part = batch.only(pages)
        hashes = None if batch.event_hashes is None else batch.event_hashes[pages]
        generations = np.zeros(len(pages), np.uint64)
        which = np.arange(len(pages))
        template.write(rows, which, part.keys, part.parents, generations, time.time_ns(), tokens, hashes)
        for row, crcs in zip(rows, self.checksums(batch, pages), strict=True):
            seal_header(row.data, len(self._lengths), crcs)

    def checksums(self, batch: PageBatch, pages: list[int]) -> np.ndarray:
        """uint32[n, chunks]: of these pages' buffers as they are now."""
        if len(pages) == 1:
            return chunk_crcs(self._addresses(batch, pages[0]), self._lengths)[None]
        addresses = np.concatenate([self._addresses(batch, page) for page in pages])
        return chunk_crcs(addresses, np.tile(self._lengths, len(pages))).reshape(len(pages), -1)

    def verify(self, batch: PageBatch, page: int, head: bytearray) -> Outcome:
        """HIT or CORRUPT, for `head` (head_bytes) and the page's buffers as they came; opens a seal in place."""
        if self._seal is not None:
            opened = self._seal.open(self.namespace.digest + batch.key(page), head, batch.buffers(page))
            if opened is None:
                return Outcome.CORRUPT
            head = opened
        return self.judge(batch.key(page), head, self.checksums(batch, [page])[0])

    def judge(self, key: bytes, header: bytearray | memoryview, crcs: np.ndarray) -> Outcome:
        """HIT or CORRUPT, for a slot header and the checksums of the buffers that came with it."""
        try:
            found = SlotHeader.decode(header, self._step)
        except FormatError:
            return Outcome.CORRUPT
        if found.namespace != self.namespace.digest or found.key != key:
            return Outcome.CORRUPT  # a good page, filed under another's name: the store lied
        if found.lengths != self.namespace.layout.buffer_lengths:
            return Outcome.CORRUPT
        return Outcome.HIT if np.array_equal(crcs, found.crcs) else Outcome.CORRUPT

    def notes(self, head: bytearray) -> Notes | None:
        """What the head of a page that passed `verify` keeps for KV events; a sealed one's stays sealed."""
        if self._seal is not None:
            return None
        try:
            found = SlotHeader.decode(head, self._step)
        except FormatError:
            return None
        if found.tokens is None or not found.event_hash:
            return None
        hashes = np.array([[found.event_hash, found.parent_event_hash]], np.int64)
        return Notes(found.tokens[None, :], hashes, found.salt, found.lora)

    def _addresses(self, batch: PageBatch, page: int) -> np.ndarray:
        return batch.addresses[int(batch.offsets[page]) : int(batch.offsets[page + 1])]


class ObjectFormats:
    """The formats of the namespaces in use, made once each. Thread-safe."""

    def __init__(self, step: int = STEP, seal: Seal | None = None, pad: int = 1) -> None:
        self._step, self._seal, self._pad = step, seal, pad
        self._known: dict[bytes, ObjectFormat] = {}
        self._lock = threading.Lock()

    def of(self, namespace: Namespace) -> ObjectFormat:
        """The format of this namespace."""
        found = self._known.get(namespace.digest)
        if found is None:
            with self._lock:
                if len(self._known) >= _FORMATS:
                    self._known.clear()
                found = self._known[namespace.digest] = ObjectFormat(namespace, self._step, self._seal, self._pad)
        return found

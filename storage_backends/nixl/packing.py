"""The pages of one transfer in memory: their headers in a lane, and their bytes too where they do not go straight.

Belongs here: headers and checksums before pages leave, and the judgement of what came; in compiled code for plain pages
with headers of whole blocks, page by page for sealed ones and for objects. Does not belong here: NIXL, files, outcomes.
"""

from __future__ import annotations

import ctypes

import numpy as np

from storage_backends.base import Outcome, PageBatch
from storage_backends.nixl.agent import Lane
from storage_backends.object import ObjectFormat
from storage_backends.slot_form import SlotForm, keys, span

try:
    from hicache_ext import _native
except ImportError:
    _native = None  # type: ignore[assignment]

#: Whether plain pages can be packed in compiled code.
COMPILED = _native is not None
_VALID = 1


class Packing:
    """pages: of the batch, in the order in which they lie in the lane. straight: only their headers do.

    plain: their form, where compiled code can do it.
    """

    def __init__(
        self, form: ObjectFormat, plain: SlotForm | None, batch: PageBatch, pages: list[int], straight: bool, lane: Lane
    ) -> None:
        self.form, self.batch, self.pages, self.straight, self.lane = form, batch, pages, straight, lane
        self._plain = plain
        self._stride = stride_of(form, straight)
        self._part = span(pages)

    def memory(self) -> np.ndarray:
        """uint64[n, k, 3]: (address, bytes, 0) of what moves for each page, in the order of its object."""
        count = len(self.pages)
        theirs = self.batch.addresses.reshape(len(self.batch), -1)[self._part] if self.straight else None
        rows = np.zeros((count, 1 if theirs is None else 1 + theirs.shape[1], 3), np.uint64)
        rows[:, 0, 0] = np.uint64(self.lane.memory.address) + np.arange(count, dtype=np.uint64) * np.uint64(
            self._stride
        )
        rows[:, 0, 1] = self._stride
        if theirs is not None:
            rows[:, 1:, 0] = theirs
            rows[:, 1:, 1] = self.batch.lengths[: theirs.shape[1]]
        return rows

    def put(self) -> None:
        """Everything that leaves into its place."""
        if self._plain is None:
            for page in range(len(self.pages)):
                self._put(page)
            return
        rows = self._rows()
        self._plain.headers(self.batch, self._part, rows[:, : self.form.head_bytes])
        if not self.straight:
            rows[:, self.form.head_bytes + self.form.payload_bytes :] = 0
            self._copy(self._payload(), self._theirs(self._part))
        _native.seal_slots(
            self.lane.memory.address, self._stride, self.form.head_bytes, self._plain.lengths, self._payload()
        )

    def spoil(self) -> None:
        """Before a read, make the last byte of what lies in the lane another one: NIXL takes the shorter answer to a
        read for the whole, and what an earlier transfer of the same page left would stand for the rest of it."""
        last = self.form.head_bytes + (0 if self.straight else self.form.payload_bytes)
        self._rows()[:, last - 1] ^= 0xFF

    def judge(self, which: list[int]) -> list[bool]:
        """Of the pages at these places, which have arrived, whether each is good. Good ones are in their buffers."""
        if self._plain is None:
            return [self._judge(page) for page in which]
        verdicts = np.zeros(len(self.pages), np.uint8)
        _native.judge_slots(
            self.batch.namespace.digest, keys(self.batch.keys, self._part), self.lane.memory.address, self._stride,
            self.form.head_bytes, self._plain.lengths, self._payload(), verdicts,
        )  # fmt: skip
        good = [page for page in which if verdicts[page] == _VALID]
        if good and not self.straight:
            ours = np.ascontiguousarray(self._payload().reshape(len(self.pages), -1)[good]).reshape(-1)
            self._copy(self._theirs([self.pages[page] for page in good]), ours)
        return [bool(verdicts[page] == _VALID) for page in which]

    def head(self, page: int) -> bytearray:
        """The head of the page at this place."""
        return bytearray(ctypes.string_at(self._at(page), self.form.head_bytes))

    def _at(self, page: int) -> int:
        return self.lane.memory.address + page * self._stride

    def _rows(self) -> np.ndarray:
        size = len(self.pages) * self._stride
        return np.frombuffer(self.lane.memory.view, np.uint8, size).reshape(len(self.pages), self._stride)

    def _payload(self) -> np.ndarray:
        """uint64[n * buffers]: where pages lie while they travel."""
        assert self._plain is not None
        if self.straight:
            return self._theirs(self._part)
        starts = np.cumsum([self.form.head_bytes, *self._plain.lengths.tolist()[:-1]]).astype(np.uint64)
        firsts = np.array([self._at(page) for page in range(len(self.pages))], np.uint64)
        return np.ascontiguousarray((firsts[:, None] + starts).reshape(-1))

    def _theirs(self, pages: slice | list[int]) -> np.ndarray:
        assert self._plain is not None
        return self._plain.addresses(self.batch, pages)

    def _copy(self, to: np.ndarray, source: np.ndarray) -> None:
        assert self._plain is not None
        _native.memcpy_many(to, source, np.tile(self._plain.lengths, len(to) // len(self._plain.lengths)))

    # ---- page by page

    def _put(self, page: int) -> None:
        head, buffers = self.form.prepare(self.batch, self.pages[page])
        at = self._at(page)
        ctypes.memmove(at, bytes(head), len(head))
        if self.straight:
            return
        at += len(head)
        for buffer in buffers:
            ctypes.memmove(at, ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
            at += len(buffer)
        ctypes.memset(at, 0, self._at(page) + self.form.size - at)

    def _judge(self, page: int) -> bool:
        at, batch = self._at(page), self.batch
        head = self.head(page)
        if not self.straight:
            at += len(head)
            for buffer in batch.buffers(self.pages[page]):
                ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), at, len(buffer))
                at += len(buffer)
        return self.form.verify(batch, self.pages[page], head) is Outcome.HIT


def stride_of(form: ObjectFormat, straight: bool) -> int:
    """Bytes that a page has in a lane."""
    return form.head_bytes if straight else form.size

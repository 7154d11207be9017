"""Pages to and from the slots of a segment: several neighbours in one vectored call, straight from and to their memory.

Belongs here: sizes, arrays of buffers, copies where memory or page do not fit direct I/O, sealed pages. Does not belong
here: compiled code (native_slots.py; this is its reference), which slots, files, or what follows from an outcome.
"""

from __future__ import annotations

import ctypes
import errno
import threading
from typing import NamedTuple

import numpy as np

from storage_backends.base import Outcome, PageBatch
from storage_backends.buffers import OwnedMemory
from storage_backends.format import BLOCK, round_up
from storage_backends.object import ObjectFormat
from storage_backends.shared_fs.catalog import Segment
from storage_backends.vectored import IOV_MAX, move

#: Bytes that one call moves at most, if it is more than one page.
_RUN_BYTES = 8 << 20


class ScratchMemory(threading.local):
    """Memory of one thread: headers, or whole slots."""

    memory: OwnedMemory | None = None

    def of(self, size: int) -> OwnedMemory:
        if self.memory is None or self.memory.size < size:
            self.memory = OwnedMemory(round_up(size, 1 << 20))
        return self.memory


_scratch = ScratchMemory()
zeroes = OwnedMemory(BLOCK)


class Written(NamedTuple):
    """pages: that are in the file, whole, from the first one on. error: errno of what stopped the others, or 0."""

    pages: int
    error: int


class Slots:
    """The slots of one namespace. slot_bytes: of each, a multiple of 4096."""

    def __init__(self, form: ObjectFormat, sealed: bool) -> None:
        self.form = form
        self.slot_bytes = round_up(form.size, BLOCK)
        self._pad = self.slot_bytes - form.size
        self._sealed = sealed
        self._lengths = np.array(form.namespace.layout.buffer_lengths, np.uint64)

    def run(self, pages: int, threads: int) -> int:
        """How many pages of a batch of so many one call should move, so that all threads have some."""
        by_bytes = _RUN_BYTES // self.slot_bytes
        by_buffers = IOV_MAX // (len(self._lengths) + 2)
        return max(1, min(by_bytes, by_buffers, -(-pages // threads)))

    def write(self, fd: int, batch: PageBatch, pages: list[int], slot: int, alignment: int) -> Written:
        """These pages into slots `slot`..."""
        head_bytes, size = self.form.head_bytes, self.slot_bytes
        if self._fits(batch, alignment):
            memory = _scratch.of(head_bytes * len(pages))
            rows = np.frombuffer(memory.view, np.uint8, head_bytes * len(pages)).reshape(len(pages), head_bytes)
            self.form.headers(batch, pages, rows)
            moved = move(fd, slot * size, self._direct(memory.address, batch, pages, zeroes.address), True)
            return self._written(moved, len(pages))
        memory = _scratch.of(size * len(pages))
        for i, page in enumerate(pages):
            head, buffers = self.form.prepare(batch, page)
            at = i * size
            parts: list[bytearray | memoryview] = [head, *buffers]
            for part in parts:
                memory.view[at : at + len(part)] = part
                at += len(part)
            memory.view[at : (i + 1) * size] = bytes((i + 1) * size - at)
        moved = move(fd, slot * size, np.array([[memory.address, size * len(pages)]], np.uint64), True)
        return self._written(moved, len(pages))

    def read(
        self, fd: int, batch: PageBatch, pages: list[int], slot: int, alignment: int
    ) -> tuple[list[Outcome], list[int]]:
        """Slots `slot`... into these pages: HIT or CORRUPT for each, and an errno or 0 for each, which comes first."""
        head_bytes, size = self.form.head_bytes, self.slot_bytes
        straight = self._fits(batch, alignment)
        if straight:
            # The padding lands in memory of this thread, behind the headers.
            memory = _scratch.of(head_bytes * len(pages) + BLOCK)
            iov = self._direct(memory.address, batch, pages, memory.address + head_bytes * len(pages))
        else:
            memory = _scratch.of(size * len(pages))
            iov = np.array([[memory.address, size * len(pages)]], np.uint64)
        moved = move(fd, slot * size, iov, False)
        if moved < 0:
            return [Outcome.CORRUPT] * len(pages), [-moved] * len(pages)
        whole = min(len(pages), (moved + self._pad) // size)  # the file may end before
        outcomes = []
        if straight and whole:
            for i, crcs in enumerate(self.form.checksums(batch, pages[:whole])):
                header = memory.view[i * head_bytes : (i + 1) * head_bytes]
                outcomes.append(self.form.judge(batch.key(pages[i]), header, crcs))
        elif whole:
            for i, page in enumerate(pages[:whole]):
                self._copy_out(batch, page, memory.address + i * size + head_bytes)
                head = bytearray(memory.view[i * size : i * size + head_bytes])
                outcomes.append(self.form.verify(batch, page, head))
        return outcomes + [Outcome.CORRUPT] * (len(pages) - whole), [0] * len(pages)

    def _written(self, moved: int, pages: int) -> Written:
        if moved < 0:
            return Written(0, -moved)
        whole = moved // self.slot_bytes
        return Written(whole, 0 if whole == pages else errno.EIO)

    def _fits(self, batch: PageBatch, alignment: int) -> bool:
        """Whether the batch's pages can move without a copy."""
        if self._sealed:
            return False
        if alignment == 1:
            return True
        step = np.uint64(alignment - 1)
        return not (self._lengths & step).any() and not (batch.addresses & step).any()

    def _direct(self, heads: int, batch: PageBatch, pages: list[int], pad: int) -> np.ndarray:
        """uint64[k, 2]: per page its header, its buffers and the padding."""
        buffers = len(self._lengths)
        rows = np.empty((len(pages), buffers + 2, 2), np.uint64)
        head_bytes = self.form.head_bytes
        rows[:, 0, 0] = np.uint64(heads) + np.arange(len(pages), dtype=np.uint64) * np.uint64(head_bytes)
        rows[:, 0, 1] = head_bytes
        for i, page in enumerate(pages):
            rows[i, 1:-1, 0] = batch.addresses[int(batch.offsets[page]) : int(batch.offsets[page + 1])]
        rows[:, 1:-1, 1] = self._lengths
        rows[:, -1, 0], rows[:, -1, 1] = pad, self._pad
        if not self._pad:
            rows = rows[:, :-1]
        return np.ascontiguousarray(rows.reshape(-1, 2))

    def _copy_out(self, batch: PageBatch, page: int, source: int) -> None:
        for j in range(int(batch.offsets[page]), int(batch.offsets[page + 1])):
            ctypes.memmove(int(batch.addresses[j]), source, int(batch.lengths[j]))
            source += int(batch.lengths[j])


def runs(places: list[tuple[Segment, int] | None], most: int) -> list[tuple[Segment, int, list[int]]]:
    """Pages in neighbouring slots, at most so many together: segment, first slot, pages in the order of their slots."""
    where = [(place[0], place[1], page) for page, place in enumerate(places) if place is not None]
    where.sort(key=lambda each: (id(each[0]), each[1]))
    runs: list[tuple[Segment, int, list[int]]] = []
    for segment, slot, page in where:
        if runs:
            last, first, pages = runs[-1]
            if last is segment and slot == first + len(pages) and len(pages) < most:
                pages.append(page)
                continue
        runs.append((segment, slot, [page]))
    return runs

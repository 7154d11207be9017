"""Runs of slots in compiled code: sealed and written, or read and judged, in one call without the GIL.

Belongs here: memory for headers, and copies where a page does not fit direct I/O. Does not belong here: sealed pages,
or an install without a compiler (slots.py has both, and is the reference).
"""

from __future__ import annotations

import numpy as np

from storage_backends.base import Outcome, PageBatch
from storage_backends.buffers import OwnedMemory
from storage_backends.format import BLOCK
from storage_backends.object import ObjectFormat
from storage_backends.shared_fs.slots import ScratchMemory, Slots, Written, zeroes
from storage_backends.slot_form import SlotForm, keys, span

try:
    from hicache_ext import _native
except ImportError:
    _native = None  # type: ignore[assignment]

#: Bytes that are copied and moved at once where a page does not go straight.
_COPIED_BYTES = 8 << 20
_VALID = 1


def slots_for(form: ObjectFormat, sealed: bool) -> Slots:
    """The slots of one namespace, by the fastest way that there is."""
    return Slots(form, sealed) if sealed or _native is None else NativeSlots(form)


class NativeSlots(Slots):
    """Where pages do not go straight, whole slots lie in memory of the thread, and what goes there is copied."""

    def __init__(self, form: ObjectFormat) -> None:
        super().__init__(form, sealed=False)
        self._form = SlotForm(form.namespace)
        self._head = self._form.shape.header_bytes
        self._starts = np.cumsum([self._head, *form.namespace.layout.buffer_lengths[:-1]]).astype(np.uint64)

    def run(self, pages: int, threads: int) -> int:
        return max(1, -(-pages // threads))

    def write(self, fd: int, batch: PageBatch, pages: list[int], slot: int, alignment: int) -> Written:
        if self._fits(batch, alignment):
            memory, part = _scratch.of(self._head * len(pages)), span(pages)
            self._form.headers(batch, part, _rows(memory, len(pages), self._head))
            return self._put(fd, slot, memory, self._head, self._form.addresses(batch, part), zeroes.address)
        step = max(1, _COPIED_BYTES // self.slot_bytes)
        for first in range(0, len(pages), step):
            some = pages[first : first + step]
            memory, ours = self._whole(len(some))
            rows = _rows(memory, len(some), self.slot_bytes)
            self._form.headers(batch, span(some), rows)
            rows[:, self.form.size :] = 0
            _native.memcpy_many(ours, self._form.addresses(batch, span(some)), np.tile(self._lengths, len(some)))
            written = self._put(fd, slot + first, memory, self.slot_bytes, ours, 0)
            if written.error:
                return Written(first + written.pages, written.error)
        return Written(len(pages), 0)

    def read(
        self, fd: int, batch: PageBatch, pages: list[int], slot: int, alignment: int
    ) -> tuple[list[Outcome], list[int]]:
        verdicts, errors = np.zeros(len(pages), np.uint8), np.zeros(len(pages), np.int32)
        if self._fits(batch, alignment):
            memory = _scratch.of(self._head * len(pages) + BLOCK)  # what pads the slots lands behind the headers
            pad = memory.address + self._head * len(pages)
            addresses = self._form.addresses(batch, span(pages))
            self._get(fd, slot, memory, self._head, batch, pages, addresses, pad, verdicts, errors)
        else:
            step = max(1, _COPIED_BYTES // self.slot_bytes)
            for first in range(0, len(pages), step):
                some = slice(first, first + step)
                memory, ours = self._whole(len(pages[some]))
                self._get(
                    fd, slot + first, memory, self.slot_bytes, batch, pages[some], ours, 0, verdicts[some], errors[some]
                )
                self._copy_good(batch, pages[some], ours, verdicts[some])
        return [Outcome.HIT if one == _VALID else Outcome.CORRUPT for one in verdicts.tolist()], errors.tolist()

    def _put(self, fd: int, slot: int, memory: OwnedMemory, stride: int, addresses: np.ndarray, pad: int) -> Written:
        size = self.slot_bytes
        return Written(
            *_native.write_slots(
                fd, slot * size, size, memory.address, stride, self._head, self._lengths, addresses, pad
            )
        )

    def _get(
        self, fd: int, slot: int, memory: OwnedMemory, stride: int, batch: PageBatch, pages: list[int],
        addresses: np.ndarray, pad: int, verdicts: np.ndarray, errors: np.ndarray,
    ) -> None:  # fmt: skip
        size = self.slot_bytes
        _native.read_slots(
            fd, slot * size, size, batch.namespace.digest, keys(batch.keys, span(pages)), memory.address, stride,
            self._head, self._lengths, addresses, pad, verdicts, errors,
        )  # fmt: skip

    def _copy_good(self, batch: PageBatch, pages: list[int], ours: np.ndarray, verdicts: np.ndarray) -> None:
        good = np.flatnonzero(verdicts == _VALID)
        if len(good):
            theirs = self._form.addresses(batch, [pages[i] for i in good.tolist()])
            chosen = np.ascontiguousarray(ours.reshape(len(pages), -1)[good]).reshape(-1)
            _native.memcpy_many(theirs, chosen, np.tile(self._lengths, len(good)))

    def _whole(self, pages: int) -> tuple[OwnedMemory, np.ndarray]:
        """Memory of this thread for whole slots, and uint64[n * buffers]: where in it buffers begin."""
        memory = _scratch.of(self.slot_bytes * pages)
        firsts = np.uint64(memory.address) + np.arange(pages, dtype=np.uint64) * np.uint64(self.slot_bytes)
        return memory, np.ascontiguousarray((firsts[:, None] + self._starts).reshape(-1))


def _rows(memory: OwnedMemory, pages: int, size: int) -> np.ndarray:
    return np.frombuffer(memory.view, np.uint8, pages * size).reshape(pages, size)


_scratch = ScratchMemory()

"""Pages between slots and device memory: the header through the disk's engine, the payload through cuFile.

Belongs here: the order of steps, and verification where no CPU meets the payload. Does not belong here: groups and
their memory (storage_backends.local.slots), pages in host memory (what this is wrapped around), or cuFile (route.py).

    read    header; payload, into the device; CRC32C of each chunk, by the device; the header again, since its slot may
            have been given to another page meanwhile: only a page whose two headers are the same, and whose checksums
            are those of the header, is VALID
    write   CRC32C of each chunk, by the device, into the header; header and payload at the same time, in any order: a
            slot of which only a part arrived fails its checksums

The slot is pinned by whoever made the group (storage_backends.local.reads).
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from hicache_ext.cuda import CudaUnavailable
from storage_backends.buffers import OwnedMemory
from storage_backends.format import CHUNK
from storage_backends.gds import headers
from storage_backends.gds.route import CHECKSUM_BLOCKS, Route
from storage_backends.local.engine import IoEngine, Transfer
from storage_backends.local.extents import Extent
from storage_backends.local.slots import MEMORY_TROUBLE, SlotEngine, SlotGroup, Verdict

if TYPE_CHECKING:
    from hicache_ext import _cuda

logger = logging.getLogger(__name__)

#: What one lane moves and verifies at once.
PART_BYTES, PART_PAGES = 16 << 20, 64
#: cuFile is given no larger piece: its buffers hold 1 MiB, and several are under way at the same time.
PIECE_BYTES = 1 << 20
#: How long the end of the process waits for what cuFile has under way; what is queued is not begun.
AT_EXIT_SECONDS = 10.0
#: cuFile's own codes begin here; this one is the storage's.
_CUFILE, _CUFILE_IO = 5000, 5044


@dataclass(frozen=True)
class _Part:
    group: SlotGroup
    places: list[int]


class DeviceSlots(SlotEngine):
    """Around what moves slots from and to host memory."""

    def __init__(self, inner: SlotEngine, engine: IoEngine, route: Route) -> None:
        """engine: moves headers."""
        self.inner, self._engine, self._route = inner, engine, route
        self._queue: SimpleQueue[_Part | None] = SimpleQueue()
        self._files: dict[int, _cuda.CuFileFile] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def submit_slots(self, group: SlotGroup) -> None:
        if group.memory == "host":
            self.inner.submit_slots(group)
            return
        most = max(1, min(PART_PAGES, PART_BYTES // group.io.shape.payload_bytes))
        places = range(len(group))
        with self._lock:
            stopped = self._stopped
            if not stopped:
                self._start()
                for first in range(0, len(group), most):
                    self._queue.put(_Part(group, list(places[first : first + most])))
        if stopped:
            refused = (places, [-errno.ECANCELED] * len(group), bytes(len(group)))
            threading.Thread(target=group.ended, args=refused, name="hicache-gds-refused", daemon=True).start()

    def retain_files(self, serials: Sequence[int]) -> None:
        self.inner.retain_files(serials)
        known = set(serials)
        with self._lock:
            gone = [self._files.pop(serial) for serial in list(self._files) if serial not in known]
        del gone  # cuFile lets go of them here, or when the last part that uses them ends

    def stop(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        quiet = self._stop_lanes(timeout)
        return self.inner.stop(max(0.0, until - time.monotonic())) and quiet

    def _stop_lanes(self, timeout: float) -> bool:
        """Whether none is at work any more."""
        until = time.monotonic() + timeout
        with self._lock:
            self._stopped = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        quiet = not any(thread.is_alive() for thread in self._threads)
        if quiet:
            with self._lock:
                self._files.clear()
        return quiet

    def _start(self) -> None:
        """The threads, when the first page of a device comes."""
        _leave_no_lane_behind().add(self)
        while len(self._threads) < self._route.threads:
            name = f"hicache-gds-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        lane: _cuda.CuFileLane | None = None
        unavailable, failed = self._route.failures
        while (part := self._queue.get()) is not None:
            group, places = part.group, part.places
            moved, verdicts = [-MEMORY_TROUBLE] * len(places), bytes(len(places))
            try:
                if group.cancelled.is_set() or self._stopped:
                    moved = [-errno.ECANCELED] * len(places)
                elif not self._route.out:
                    lane = lane or self._route.lane()
                    moved, verdicts = (self._write if group.write else self._read)(lane, group, places)
            except (CudaUnavailable, unavailable) as error:
                self._route.failed(str(error))
            except failed as error:
                self._route.failed(str(error), for_good=True)
            except Exception as error:  # a thread that dies would leave its pages without an outcome
                self._route.failed(repr(error), for_good=True)
            group.ended(places, moved, verdicts)

    # -- a part, from its begin to its end

    def _read(self, lane: _cuda.CuFileLane, group: SlotGroup, places: list[int]) -> tuple[list[int], bytes]:
        moved = np.array(self.headers(group, places, group.headers[places], False), np.int64)
        pool, which = group.io.header_rows(group, places)
        rows = pool[which]
        verdicts, crcs = headers.judge(group, places, rows, moved)
        named = np.flatnonzero(verdicts == Verdict.VALID)
        if not len(named):
            return moved.tolist(), verdicts.tobytes()
        wanted = [places[i] for i in named.tolist()]
        payload, sums = self.payload(lane, group, wanted)
        arrived = np.array(payload, np.int64)
        right = (arrived == group.io.shape.payload_bytes) & (sums == crcs[named]).all(axis=1)
        verdicts[named] = np.where(right, Verdict.VALID, np.where(arrived < 0, Verdict.UNCHECKED, Verdict.DAMAGED))
        moved[named] = np.where(arrived < 0, arrived, moved[named] + arrived)
        self._again(group, wanted, named, rows[named], moved, verdicts)
        return moved.tolist(), verdicts.tobytes()

    def _again(
        self, group: SlotGroup, wanted: list[int], named: np.ndarray, before: np.ndarray, moved: np.ndarray,
        verdicts: np.ndarray,
    ) -> None:  # fmt: skip
        """Look at the headers once more: a slot that has another one now is another page's, whatever was read."""
        count, size = before.shape
        memory = OwnedMemory(count * size)
        addresses = memory.address + np.arange(count, dtype=np.uint64) * np.uint64(size)
        arrived = np.array(self.headers(group, wanted, addresses, False), np.int64)
        now = np.frombuffer(memory.view, np.uint8)[: count * size].reshape(count, size)
        other = (now != before).any(axis=1)
        del now
        memory.close()
        checked = verdicts[named] != Verdict.UNCHECKED
        failed = named[checked & (arrived < 0)]
        moved[failed], verdicts[failed] = arrived[checked & (arrived < 0)], Verdict.UNCHECKED
        verdicts[named[checked & (arrived >= 0) & other]] = Verdict.OTHER_PAGE

    def _write(self, lane: _cuda.CuFileLane, group: SlotGroup, places: list[int]) -> tuple[list[int], bytes]:
        headers.seal(group, places, self._crcs(lane, group, places))
        leaving = self._begin_headers(group, places, group.headers[places], True)
        try:
            files, pieces = self._issue(lane, group, places)
            moved = self._results(lane, len(places), pieces)
            del files
        finally:  # their memory is given back after this
            sent = leaving.wait()
        for i, arrived in enumerate(sent):
            moved[i] = min(moved[i], arrived) if min(moved[i], arrived) < 0 else moved[i] + arrived
        return moved, bytes(len(places))

    def headers(self, group: SlotGroup, places: list[int], addresses: np.ndarray, write: bool) -> list[int]:
        """Move these pages' headers; bytes of each, or -errno."""
        return self._begin_headers(group, places, addresses, write).wait()

    def _begin_headers(self, group: SlotGroup, places: list[int], addresses: np.ndarray, write: bool) -> _Countdown:
        size, ended = group.io.shape.header_bytes, _Countdown(len(places))
        offsets, iovs = group.offsets[places].tolist(), np.empty((len(places), 1, 2), np.uint64)
        iovs[:, 0, 0], iovs[:, 0, 1] = addresses, size
        self._engine.submit(
            [
                Transfer(group.extents[place].fd, offset, iov, write, partial(ended.one, i))
                for i, (place, offset, iov) in enumerate(zip(places, offsets, iovs, strict=True))
            ]
        )
        return ended

    def payload(self, lane: _cuda.CuFileLane, group: SlotGroup, places: list[int]) -> tuple[list[int], np.ndarray]:
        """Read these pages' payloads into the device; bytes of each or -errno, and their checksums there: uint32[n,
        chunks]. In stream order the device goes from the one to the other by itself."""
        files, pieces = self._issue(lane, group, places)
        crcs = self._crcs(lane, group, places)
        moved = self._results(lane, len(places), pieces)
        del files  # not before nothing uses them any more
        return moved, crcs

    def _issue(self, lane: _cuda.CuFileLane, group: SlotGroup, places: list[int]) -> tuple[list[_cuda.CuFileFile], int]:
        """Begin to move these pages' payloads: the files that this uses, and how many pieces a page is."""
        shape, pieces = group.io.shape, _pieces(group, places)
        extents: dict[int, Extent] = {group.extents[place].serial: group.extents[place] for place in places}
        numbers = {serial: number for number, serial in enumerate(extents)}
        files = [self._file(extent) for extent in extents.values()]
        which = np.array([numbers[group.extents[place].serial] for place in places], np.uint32)
        starts = group.offsets[places] + np.uint64(shape.header_bytes)
        addresses = (group.payload[places][:, pieces.buffer] + pieces.start).reshape(-1)
        lengths = np.tile(pieces.length, len(places))
        offsets = (starts[:, None] + pieces.at).reshape(-1)
        bases = self._route.bases(addresses, lengths)
        which = np.repeat(which, len(pieces.length))
        lane.issue(self._route.way, group.write, files, which, bases, addresses, lengths, offsets)
        return files, len(pieces.length)

    def _results(self, lane: _cuda.CuFileLane, pages: int, pieces: int) -> list[int]:
        """Bytes of each page's payload, or -errno. pieces: of a page."""
        moved = np.zeros(pages * pieces, np.int64)
        lane.results(moved)
        rows = moved.reshape(pages, pieces)
        if not (rows < 0).any():
            self._route.well()
            return rows.sum(axis=1).tolist()
        codes = rows[rows <= -_CUFILE]
        codes = codes[codes != -_CUFILE_IO]
        if len(codes):
            self._route.failed(f"cuFile error {-int(codes[0])}")
        worst = rows.min(axis=1)
        worst = np.where(worst == -_CUFILE_IO, -errno.EIO, np.where(worst <= -_CUFILE, -MEMORY_TROUBLE, worst))
        return np.where(worst < 0, worst, rows.sum(axis=1)).tolist()

    def _crcs(self, lane: _cuda.CuFileLane, group: SlotGroup, places: list[int]) -> np.ndarray:
        """uint32[n, chunks], after what was issued."""
        buffer, start, length = _chunks(group.io.lengths)
        addresses = (group.payload[places][:, buffer] + start).reshape(-1)
        crcs = np.zeros(len(addresses), np.uint32)
        lane.crc32c(addresses, np.tile(length, len(places)), crcs, CHECKSUM_BLOCKS)
        return crcs.reshape(len(places), -1)

    def _file(self, extent: Extent) -> _cuda.CuFileFile:
        with self._lock:
            found = self._files.get(extent.serial)
            if found is None:
                found = self._files[extent.serial] = self._route.file(extent.fd)
            return found


@cache
def _leave_no_lane_behind() -> weakref.WeakSet[DeviceSlots]:
    """Those whose lanes are stopped before the interpreter ends: cuFile and the driver are taken down after it, and are
    then at work for nobody."""
    known: weakref.WeakSet[DeviceSlots] = weakref.WeakSet()

    def stop() -> None:
        for one in [one for one in known if one._process == os.getpid()]:
            if not one._stop_lanes(AT_EXIT_SECONDS):
                logger.warning("gds tier: cuFile did not come back before the process ended")

    atexit.register(stop)
    return known


class _Countdown:
    """Results of transfers that began together."""

    def __init__(self, count: int) -> None:
        self._results = [0] * count
        self._open = count
        self._lock = threading.Lock()
        self._done = threading.Event()

    def one(self, number: int, moved: int) -> None:
        with self._lock:
            self._results[number] = moved
            self._open -= 1
            if not self._open:
                self._done.set()

    def wait(self) -> list[int]:
        self._done.wait()
        return self._results


@dataclass(frozen=True)
class _Pieces:
    """A page's payload as it is moved. buffer: the one in which a piece begins; start: where in it, at: where in the
    payload (bytes)."""

    buffer: np.ndarray
    start: np.ndarray
    at: np.ndarray
    length: np.ndarray


def _pieces(group: SlotGroup, places: list[int]) -> _Pieces:
    lengths, rows = group.io.lengths, group.payload[places]
    starts = np.cumsum(lengths) - lengths
    whole = bool((rows[:, 1:] == rows[:, :-1] + lengths[:-1]).all())  # the buffers lie one behind the other
    each = zip(range(len(lengths)), starts.tolist(), lengths.tolist(), strict=True)
    spans = [(0, 0, int(lengths.sum()))] if whole else list(each)
    cut = [
        (buffer, first, at + first, min(PIECE_BYTES, length - first))
        for buffer, at, length in spans
        for first in range(0, length, PIECE_BYTES)
    ]
    buffer, start, at, length = zip(*cut, strict=True)
    return _Pieces(
        np.array(buffer, np.intp), np.array(start, np.uint64), np.array(at, np.uint64), np.array(length, np.uint64)
    )


def _chunks(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buffer, offset in it (uint64) and length (uint32) of each checksummed chunk of a page."""
    cut = [
        (buffer, first, min(CHUNK, length - first))
        for buffer, length in enumerate(lengths.tolist())
        for first in range(0, length, CHUNK)
    ]
    buffer, start, length = zip(*cut, strict=True)
    return np.array(buffer, np.intp), np.array(start, np.uint64), np.array(length, np.uint32)

"""The scrub: reads the slots of a directory and says of each whether it is whole. Changes nothing, locks nothing.

Belongs here: what verdict a slot's bytes deserve, the order and pace of reading, and fairness to a living writer.
Does not belong here: how a directory is laid out (survey.py), or healing (the serving tier quarantines what it meets).

A living writer may rewrite a slot while it is read here. So a slot that looks bad is set aside, and looked at again
after a pause, with the log as it is then: only what failed twice, with the same generation and the same name in the
log, is damage.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from storage_backends.buffers import OwnedMemory
from storage_backends.checksum import chunk_crcs
from storage_backends.format import (
    BLOCK,
    CHUNK,
    SLOT_MAGIC,
    ExtentHeader,
    FormatError,
    SlotHeader,
    UnknownVersion,
)
from storage_backends.local.files import is_locked
from storage_backends.local.folder import LOCK
from storage_backends.local.residency import NAME, Record
from storage_backends.local.survey import ExtentFile, FolderSurvey, LogView, Problem, Trouble, is_plain, survey

#: Slots larger than any extent that this version makes are not read.
_LARGEST_SLOT = 1 << 30
_PAUSE_SECONDS = 1.0
_MADE_UP_SECONDS = 0.1
#: How long a page that the log does not name yet may be on its way to the disk.
_IN_FLIGHT_SECONDS = 30.0


class SlotVerdict(StrEnum):
    VALID = "valid"  # header and every chunk are whole
    DAMAGED = "damaged"  # named by the log or begins like a slot, and is not whole
    EMPTY = "empty"  # holds no page: never written, or erased
    FOREIGN = "foreign"  # whole or not, not a page of this extent: of another namespace, of another use of this place
    CHANGING = "changing"  # its writer is at it now


@dataclass(frozen=True)
class Judgement:
    """generation and key are the header's, where it could be read."""

    verdict: SlotVerdict
    reason: str = ""
    key: bytes = b""
    generation: int = 0
    time_ns: int = 0


@dataclass(frozen=True)
class Damage:
    """One damaged slot. named: the log knows it as a page, so a lookup would have found it."""

    path: Path
    offset: int
    slot: int
    namespace: bytes
    key: bytes
    named: bool
    reason: str


@dataclass
class ScrubReport:
    counts: Counter[SlotVerdict] = field(default_factory=Counter)
    named: int = 0
    damaged: list[Damage] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    bytes_read: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Nothing is damaged, and nothing that may hold pages had to be left out."""
        harmless = (Trouble.NOT_OURS, Trouble.UNFINISHED)
        return not self.damaged and all(problem.kind in harmless for problem in self.problems)


@dataclass(frozen=True)
class Progress:
    slots: int
    total: int
    bytes_read: int
    damaged: int


def judge(raw: memoryview, address: int, extent: ExtentHeader, named: Record | None) -> Judgement:
    """What a slot holds. raw: its bytes from the start, as many as the file has; address: where they lie."""
    if len(raw) < BLOCK:
        return Judgement(SlotVerdict.DAMAGED, "beyond the end of the file") if named else Judgement(SlotVerdict.EMPTY)
    if bytes(raw[:8]) != SLOT_MAGIC:
        blank = not np.frombuffer(raw, np.uint8, BLOCK).any()
        if named:
            return Judgement(SlotVerdict.DAMAGED, "never reached the disk, or erased" if blank else "not a slot")
        return Judgement(SlotVerdict.EMPTY) if blank else Judgement(SlotVerdict.FOREIGN, "not a slot")
    try:
        header = SlotHeader.decode(raw)
    except UnknownVersion as error:
        return Judgement(SlotVerdict.DAMAGED if named else SlotVerdict.FOREIGN, str(error))
    except FormatError as error:
        return Judgement(SlotVerdict.DAMAGED, str(error))
    verdict, reason = _judge_page(raw, address, header, extent, named)
    return Judgement(verdict, reason, header.key, header.generation, header.time_ns)


def _judge_page(
    raw: memoryview, address: int, header: SlotHeader, extent: ExtentHeader, named: Record | None
) -> tuple[SlotVerdict, str]:
    if header.namespace != extent.namespace:
        return SlotVerdict.FOREIGN, "of another namespace"
    if header.generation <= extent.generation:
        return SlotVerdict.FOREIGN, "from before this extent was made"
    if named and header.key != named.key:
        return SlotVerdict.FOREIGN, "another page than the log names"
    start = int.from_bytes(raw[12:16], "little")
    if start + sum(header.lengths) > extent.slot_bytes:
        return SlotVerdict.DAMAGED, "larger than its slot"
    if start + sum(header.lengths) > len(raw):
        return SlotVerdict.DAMAGED, "cut off by the end of the file"
    lengths = np.array(header.lengths, np.uint64)
    addresses = np.cumsum(lengths, dtype=np.uint64) - lengths + np.uint64(address + start)
    wrong = np.flatnonzero(chunk_crcs(addresses, lengths) != header.crcs)
    if len(wrong):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return SlotVerdict.DAMAGED, f"checksum of chunk {wrong[0]} of {len(header.crcs)} ({CHUNK >> 10} KiB each){more}"
    return SlotVerdict.VALID, ""


class Pace:
    """Keeps the mean rate at or below `rate` bytes a second (None: no limit), in steps of at most one read."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next = time.monotonic()

    def spend(self, size: int) -> None:
        if self._rate:
            # The read itself took its time; only a stop that was longer than a read is not made up for.
            self._next = max(self._next, time.monotonic() - _MADE_UP_SECONDS) + size / self._rate
            time.sleep(max(0.0, self._next - time.monotonic()))


class _Reader:
    """Reads spans of one extent past the page cache: a scrub must not push out what a server has warm."""

    def __init__(self, path: Path, memory: OwnedMemory) -> None:
        self._path = path
        self._memory = memory
        self._direct = True
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = self._open_plain()

    def _open_plain(self) -> int:
        self._direct = False
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> memoryview:
        """The bytes there, fewer at the end of the file."""
        got = 0
        while got < length:
            try:
                step = os.preadv(self._fd, [self._memory.view[got:length]], offset + got)
            except OSError as error:
                # A device with larger sectors, or the unaligned rest after an end of file inside a sector.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                plain = self._open_plain()
                os.close(self._fd)
                self._fd = plain
                continue
            if not step:
                break
            got += step
        if not self._direct:
            os.posix_fadvise(self._fd, offset, got, os.POSIX_FADV_DONTNEED)
        return self._memory.view[:got]

    def close(self) -> None:
        os.close(self._fd)


class Scrub:
    """One pass over a directory. `run` once; `on_progress` is called a few times a second at most."""

    def __init__(
        self,
        path: Path,
        rate: float | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        pause: float = _PAUSE_SECONDS,
    ) -> None:
        self._survey = survey(path)
        self._pace = Pace(rate)
        self._on_progress = on_progress
        self._pause = pause
        self._memory = OwnedMemory(1 << 20)
        self._total = sum(folder.slots for folder in self._survey.folders)
        self._done = 0
        self._said = 0.0
        self.report = ScrubReport(problems=list(self._survey.problems))

    def run(self) -> ScrubReport:
        """Every slot of the extents that were there when this object was made."""
        start = time.monotonic()
        for folder in self._survey.folders:
            log = LogView(folder.path)
            try:
                for extent in folder.extents:
                    self._extent(folder, extent, log)
            finally:
                log.close()
        self.report.seconds = time.monotonic() - start
        self._progress(last=True)
        return self.report

    def _extent(self, folder: FolderSurvey, extent: ExtentFile, log: LogView) -> None:
        header = extent.header
        if header.slot_bytes > _LARGEST_SLOT:
            text = f"slots of {header.slot_bytes} bytes are none of this program's"
            self.report.problems.append(Problem(extent.path, Trouble.DAMAGED, text))
            return
        if self._memory.size < header.slot_bytes:
            self._memory.close()
            self._memory = OwnedMemory(header.slot_bytes)
        self._refresh(folder, log)
        try:
            reader = _Reader(extent.data, self._memory)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and extent.data == extent.path:
                self._done += header.slots
                return  # its writer deleted it, and all that it held
            self.report.problems.append(Problem(extent.data, Trouble.UNREADABLE, str(error.strerror)))
            return
        try:
            suspects: dict[int, tuple[Record | None, Judgement]] = {}
            for slot in self._slots(extent, log):
                named = log.pages.get(extent.number, {}).get(slot)
                judgement = self._look(reader, extent, slot, named)
                self._done += 1
                if judgement.verdict is SlotVerdict.DAMAGED or (named and judgement.verdict is SlotVerdict.FOREIGN):
                    suspects[slot] = (named, judgement)
                else:
                    self._count(extent, slot, named, judgement)
                self._progress()
            if suspects:
                self._look_again(folder, extent, log, reader, suspects)
        finally:
            reader.close()

    def _slots(self, extent: ExtentFile, log: LogView) -> Iterator[int]:
        """Slots to look at: those that begin inside the file, and those beyond its end that the log names."""
        header = extent.header
        inside = min(header.slots, max(0, -(-(extent.file_bytes - BLOCK) // header.slot_bytes)))
        yield from range(inside)
        beyond = sorted(slot for slot in log.pages.get(extent.number, {}) if inside <= slot < header.slots)
        yield from beyond
        self.report.counts[SlotVerdict.EMPTY] += header.slots - inside - len(beyond)
        self._done += header.slots - inside - len(beyond)

    def _look(self, reader: _Reader, extent: ExtentFile, slot: int, named: Record | None) -> Judgement:
        header = extent.header
        offset = header.slot_offset(slot)
        if offset >= extent.file_bytes:
            return judge(self._memory.view[:0], self._memory.address, header, named)
        try:
            if named is None:  # most such slots are empty, and a header says so
                raw = self._read(reader, extent.base + offset, BLOCK)
                if len(raw) < BLOCK or bytes(raw[:8]) != SLOT_MAGIC:
                    return judge(raw, self._memory.address, header, None)
            raw = self._read(reader, extent.base + offset, header.slot_bytes)
        except OSError as error:
            return Judgement(SlotVerdict.DAMAGED, f"read: {error.strerror}")
        return judge(raw, self._memory.address, header, named)

    def _read(self, reader: _Reader, offset: int, length: int) -> memoryview:
        raw = reader.read(offset, length)
        self.report.bytes_read += len(raw)
        self._pace.spend(len(raw))
        return raw

    def _look_again(
        self, folder: FolderSurvey, extent: ExtentFile, log: LogView, reader: _Reader,
        suspects: dict[int, tuple[Record | None, Judgement]],
    ) -> None:  # fmt: skip
        live = is_plain(folder.path / LOCK) and is_locked(folder.path / LOCK)
        if live:
            time.sleep(self._pause)
            self._refresh(folder, log)
            if not extent.path.exists():
                return  # deleted meanwhile, with all that it held
        for slot, (named_then, then) in suspects.items():
            named = log.pages.get(extent.number, {}).get(slot)
            now = self._look(reader, extent, slot, named) if live else then
            if live and now.verdict is SlotVerdict.DAMAGED:
                young = time.time() - now.time_ns / 1e9 < _IN_FLIGHT_SECONDS
                if named != named_then or now.generation != then.generation or (named is None and young):
                    now = Judgement(SlotVerdict.CHANGING, now.reason, now.key)
            self._count(extent, slot, named, now)

    def _count(self, extent: ExtentFile, slot: int, named: Record | None, judgement: Judgement) -> None:
        self.report.counts[judgement.verdict] += 1
        self.report.named += named is not None
        if judgement.verdict is SlotVerdict.DAMAGED:
            key = named.key if named else judgement.key
            self.report.damaged.append(
                Damage(
                    extent.data, extent.base + extent.header.slot_offset(slot), slot, extent.header.namespace, key,
                    named is not None, judgement.reason,
                )
            )  # fmt: skip

    def _refresh(self, folder: FolderSurvey, log: LogView) -> None:
        if not is_plain(folder.path / NAME):
            return
        try:
            log.refresh()
        except (UnknownVersion, OSError):
            pass  # the survey has said so; its slots are known by their headers alone

    def _progress(self, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._said > 0.2:
            self._said = now
            damaged = len(self.report.damaged)
            self._on_progress(Progress(self._done, self._total, self.report.bytes_read, damaged))

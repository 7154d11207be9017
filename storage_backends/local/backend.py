"""LocalBackend: the local tier as the cascade sees it. Lookup, read, write; one process's view of a shared directory.

Belongs here: the order of steps of a read and of a write, and the lock around the index. Does not belong here: the
format (format.py), files and folders (directory.py, writer.py), memory of a transfer (slots.py), I/O (engine.py).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ByteSize, Field

from hicache_ext.page import NO_PARENT, Namespace
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    OptionError,
    Outcome,
    PageBatch,
    Residency,
)
from storage_backends.buffers import OwnedMemory
from storage_backends.local import checksum
from storage_backends.local.directory import Directory
from storage_backends.local.engine import IoEngine, open_engine
from storage_backends.local.files import probe_direct
from storage_backends.local.folder import Extent
from storage_backends.local.format import BLOCK, FormatError, SlotShape
from storage_backends.local.index import Entry, Index
from storage_backends.local.recovery import scan
from storage_backends.local.slots import CancelFlag, SlotGroup, SlotIo, Verdict, slot_engine
from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)

_MAINTENANCE_SECONDS = 0.2
_SHARE_SECONDS = 2.0
_MIN_CAPACITY = 1 << 20


class LocalOptions(BackendOptions):
    """path: directory on the disk. capacity: bytes of disk for all processes that use the directory together.

    engine: what moves the bytes ("auto": the best that works here).
    """

    path: Path
    capacity: ByteSize = Field(ge=_MIN_CAPACITY)
    engine: Literal["auto", "native", "liburing", "threads"] = "auto"


@dataclass(slots=True, eq=False)
class _Flight:
    """Pages of one batch whose I/O begins together. entries: the pages being read, or what is published once written.

    The lists are by place in the group: pages[i] is the page's number in the batch.
    """

    completion: Completion
    pages: list[int]
    entries: list[Entry]
    extents: list[Extent]
    group: SlotGroup | None = None


class LocalBackend(Backend):
    """Slots in a directory of this machine, shared with other processes that open it. Thread-safe."""

    Options = LocalOptions
    options: LocalOptions

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        assert isinstance(options, LocalOptions)
        place = options.path
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise OptionError("path", str(options.path), f"{place} is not a directory", "name a directory")
        if not os.access(place, os.W_OK | os.X_OK):
            raise OptionError(
                "path", str(options.path), f"{place} is not writable for this user", "chown it, or name another"
            )
        disk = os.statvfs(place)
        ours = sum(extent.stat().st_size for extent in options.path.glob("w*/e*.ext"))
        room = disk.f_bavail * disk.f_frsize + ours
        if options.capacity > room:
            raise OptionError(
                "capacity", options.capacity.human_readable(), f"the disk has {ByteSize(room).human_readable()}",
                "lower it, or name a directory on a larger disk",
            )  # fmt: skip

    def __init__(self, options: LocalOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._index = Index()
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._ios: dict[tuple[tuple[int, ...], int], SlotIo] = {}
        self._closing = threading.Event()
        self._gone = False
        options.path.mkdir(parents=True, exist_ok=True)
        self._direct = probe_direct(options.path)
        try:
            self._directory = Directory(options.path, options.capacity, self._direct, self._index)
        except FormatError as error:  # a folder of a version that we do not know
            raise OptionError(
                "path", str(options.path), f"holds another format: {error}",
                "use the program version that wrote it, or another directory, or delete this one",
            ) from error  # fmt: skip
        self.capabilities = Capabilities(persistent=True, shared=True, alignment=self._direct.alignment, medium="DISK")
        # An engine that is asked for by name is taken as it is.
        direct = {"direct": self._direct.works} if options.engine == "auto" else {}
        self._engine: IoEngine = open_engine(options.engine, **direct)
        self._slots = slot_engine(self._engine)
        self._open_files: list[int] = []
        self._zeroes = OwnedMemory(BLOCK)
        logger.info(
            "local tier %s: %s, engine %s, %s, checksums by %s; %d pages known from the logs",
            options.path, options.capacity.human_readable(), self._engine.name,
            "O_DIRECT" if self._direct.works else f"buffered I/O ({self._direct.reason})",
            checksum.implementation(), len(self._index),
        )  # fmt: skip
        self._threads = [threading.Thread(target=self._maintain, name="hicache-local", daemon=True)]
        self._threads[0].start()

    # -- lookup --------------------------------------------------------------------------------------------------

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        with self._lock:
            self._directory.refresh()
            return self._lookup(batch)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        with self._lock:
            return self._lookup(batch)

    def _lookup(self, batch: KeyBatch) -> np.ndarray:
        found = np.zeros(len(batch), np.uint8)
        digest = batch.namespace.digest
        present = []
        for i in range(len(batch)):
            entry = self._index.get(digest, batch.key(i))
            if entry is not None:
                found[i] = 1
                present.append(entry.key)
                self._index.link(entry, batch.parent(i) or NO_PARENT)
        self._index.touch(digest, [*self._head(batch), *present])
        return found

    @staticmethod
    def _head(batch: KeyBatch) -> list[bytes]:
        """The parent of the batch's first page: its chain is in use even when none of the batch is here."""
        parent = batch.parent(0) if len(batch) else None
        return [] if parent is None else [parent]

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, batch: PageBatch) -> Completion:
        completion = Completion(len(batch), self.dispatcher)
        completion.cancelled = cancelled = CancelFlag()
        io = self._io(batch)
        bounced = io.must_bounce(batch)
        pages: list[int] = []
        entries: list[Entry] = []
        extents: list[Extent] = []
        missing = []
        with self._lock:
            found = self._entries(batch)
            if None in found:
                self._directory.refresh()
                found = self._entries(batch)
            for page, entry in enumerate(found):
                extent = None if entry is None else self._extent(entry)
                if entry is None or extent is None:
                    missing.append(page)
                    if entry is not None:
                        self._drop(entry, "lost")
                    continue
                entry.pins += 1
                extent.pins += 1
                pages.append(page)
                entries.append(entry)
                extents.append(extent)
            self._index.touch(batch.namespace.digest, [*self._head(batch), *(entry.key for entry in entries)])
            self._count_way(bounced, len(pages))
        completion.settle_many(missing, [Outcome.MISS] * len(missing))
        numbers = [entry.slot for entry in entries]
        at = 0
        while at < len(pages):
            flight = _Flight(completion, pages[at:], entries[at:], extents[at:])
            ended = partial(self._read_done, flight)
            group = io.group(batch, pages[at:], False, bounced, flight.extents, numbers[at:], cancelled, ended)
            at += len(group)
            flight.group = group
            self._slots.submit_slots(group)
        return completion

    def _entries(self, batch: KeyBatch) -> list[Entry | None]:
        digest = batch.namespace.digest
        return [self._index.get(digest, batch.key(page)) for page in range(len(batch))]

    def _extent(self, entry: Entry) -> Extent | None:
        writer = self._directory.writer
        if entry.own and writer is not None:
            return writer.extents.get(entry.extent)
        folder = self._directory.folders.get(entry.folder)
        return None if folder is None else folder.extent(entry.extent)

    def _read_done(self, flight: _Flight, places: Sequence[int], moved: Sequence[int], verdicts: bytes) -> None:
        assert flight.group is not None
        flight.group.io.give(flight.group, places)
        whole = verdicts.count(Verdict.VALID) == len(verdicts)
        with self._lock:
            outcomes = [
                Outcome.HIT if whole else self._read_outcome(flight, place, result, verdict)
                for place, result, verdict in zip(places, moved, verdicts, strict=True)
            ]
            self._unpin(flight, places)
        flight.completion.settle_many([flight.pages[place] for place in places], outcomes)

    def _read_outcome(self, flight: _Flight, place: int, moved: int, verdict: int) -> Outcome:
        """What became of one page, and what follows for the index. The page is still pinned."""
        entry = flight.entries[place]
        if moved == -errno.ECANCELED:
            return Outcome.TIMEOUT
        if moved < 0:
            self._say(f"read {errno.errorcode.get(-moved, -moved)}", "a read failed with %s", os.strerror(-moved))
            entry.failures += 1
            self._counts["io_errors"] += 1
            if entry.failures > 1:  # once may be the bus; twice is this page
                self._drop(entry, "io_error")
            return Outcome.FAILED
        if verdict == Verdict.VALID:
            return Outcome.HIT
        if verdict == Verdict.OTHER_PAGE and not entry.own:
            self._drop(entry, "lost_race")  # its writer reused the slot: the end of every eviction
            return Outcome.MISS
        what = Verdict(verdict).name.lower().replace("_", " ")
        self._say("corrupt", "a page failed verification (%s) and is quarantined", what)
        self._drop(entry, "corrupt")
        if entry.own:
            self._erase(flight.extents[place], entry.slot)
        return Outcome.CORRUPT

    def _drop(self, entry: Entry, reason: str) -> None:
        """Stop serving a page. Another writer's page is only forgotten here: its slot is not ours to free."""
        if entry.own and self._directory.writer is not None:
            self._directory.writer.forget([entry], reason)
        elif self._index.remove(entry):
            self._counts[reason] += 1

    def _erase(self, extent: Extent, slot: int) -> None:
        """Overwrite a slot's header, so that no later scan takes the page in again. The caller has it pinned."""
        try:
            if not extent.doomed:
                os.pwrite(extent.fd, self._zeroes.view, extent.header.slot_offset(slot))
        except OSError as error:
            self._say("erase", "a quarantined slot could not be erased: %s", error)

    def _unpin(self, flight: _Flight, places: Sequence[int]) -> None:
        at = self._index.at
        for place in places:
            entry, extent = flight.entries[place], flight.extents[place]
            entry.pins -= 1
            extent.unpin()
            if not entry.pins and entry.own and at(entry.folder, entry.extent, entry.slot) is not entry:
                # Removed while it was being read: its slot could not be freed then.
                self._writer.give_back(extent, entry.slot)

    # -- write ---------------------------------------------------------------------------------------------------

    def write(self, batch: PageBatch) -> Completion:
        completion = Completion(len(batch), self.dispatcher)
        completion.cancelled = cancelled = CancelFlag()
        io = self._io(batch)
        bounced = io.must_bounce(batch)
        pages: list[int] = []
        places: list[tuple[Extent, int, int]] = []
        known: list[tuple[int, Outcome]] = []
        with self._lock:
            self._directory.refresh()  # what another writer has is not written twice
            self._lookup(batch)  # links parents, touches the chain
            chain: frozenset[bytes] | None = None
            refused: set[bytes] = set()

            def protected() -> frozenset[bytes] | None:
                """What must not go for this page: its chain. And nothing may, when its parent is not here to stay."""
                nonlocal chain
                parent = batch.parent(page)
                if chain is None:
                    chain = frozenset(self._chain(batch))
                if parent is None or (parent in chain and parent not in refused):
                    return chain
                return None

            for page in range(len(batch)):
                if self._index.get(batch.namespace.digest, batch.key(page)) is not None:
                    known.append((page, Outcome.HIT))
                    continue
                try:
                    place = self._allocate(batch.namespace, io.shape, protected)
                except OSError as error:
                    self._say("allocate", "no room can be made: %s", error)
                    known.append((page, self._refused(-(error.errno or errno.EIO))))
                    continue
                if place is None:
                    self._counts["rejected_no_room"] += 1
                    known.append((page, Outcome.REJECTED))
                    refused.add(batch.key(page))
                    continue
                pages.append(page)
                places.append(place)
            self._count_way(bounced, len(pages))
        completion.settle_many([page for page, _ in known], [outcome for _, outcome in known])
        if not pages:
            return completion
        space, now = batch.namespace, time.time_ns()
        folder = self._writer.number
        extents = [extent for extent, _, _ in places]
        numbers = [slot for _, slot, _ in places]
        entries = [
            Entry(
                space.digest, batch.key(page), batch.parent(page) or NO_PARENT, folder, extent.number, slot, generation,
                own=True, time_ns=now,
            )
            for page, (extent, slot, generation) in zip(pages, places, strict=True)
        ]  # fmt: skip
        at = 0
        while at < len(pages):
            flight = _Flight(completion, pages[at:], entries[at:], extents[at:])
            ended = partial(self._write_done, flight)
            group = io.group(batch, pages[at:], True, bounced, flight.extents, numbers[at:], cancelled, ended)
            end = at + len(group)
            io.write_headers(group, batch, pages[at:end], [entry.generation for entry in entries[at:end]], now)
            at = end
            flight.group = group
            self._slots.submit_slots(group)
        return completion

    def _chain(self, batch: KeyBatch) -> Iterable[bytes]:
        """The batch's pages and all their known ancestors: what a write of this batch must not evict."""
        for page in range(len(batch)):
            yield batch.key(page)
        for key in self._head(batch):
            yield from self._index.ancestors(batch.namespace.digest, key)

    def _allocate(
        self, namespace: Namespace, shape: SlotShape, protected: Callable[[], frozenset[bytes] | None]
    ) -> tuple[Extent, int, int] | None:
        if self._gone:
            raise OSError(errno.ENOENT, "the tier's directory is gone")
        directory = self._directory
        if (writer := directory.writer) is None:
            writer = directory.claim(namespace.digest, self._removed)
            self._recover()
        while True:
            place = writer.allocate(namespace, shape, directory.share, protected)
            if place is not None:
                return *place, writer.next_generation()
            if not directory.reclaim_abandoned():
                return None

    @property
    def _writer(self) -> Writer:
        writer = self._directory.writer
        assert writer is not None
        return writer

    def _write_done(self, flight: _Flight, places: Sequence[int], moved: Sequence[int], _: bytes) -> None:
        group = flight.group
        assert group is not None
        group.io.give(group, places)
        length = int(group.iov[: len(group.iov) // len(group), 1].sum())
        outcomes = []
        stored: list[Entry] = []
        with self._lock:
            writer = self._writer
            for place, result in zip(places, moved, strict=True):
                entry, extent = flight.entries[place], flight.extents[place]
                if result == length and not extent.doomed:
                    outcomes.append(Outcome.HIT)
                    stored.append(entry)
                else:
                    outcomes.append(self._refused(result))
                    writer.give_back(extent, entry.slot)
            if stored:
                writer.publish(stored)
                self._index.touch(group.namespace, [entry.key for entry in stored])
                self._counts["stored"] += len(stored)
            for place in places:
                flight.extents[place].unpin()
        self.report(Residency.STORED, group.namespace, b"".join([entry.key for entry in stored]))
        flight.completion.settle_many([flight.pages[place] for place in places], outcomes)

    def _refused(self, moved: int) -> Outcome:
        if moved == -errno.ECANCELED:
            return Outcome.TIMEOUT
        if moved >= 0:  # cleared meanwhile, or the device took only a part
            self._counts["rejected_cleared" if moved else "io_errors"] += 1
            return Outcome.REJECTED
        self._counts["io_errors"] += 1
        self._say(f"write {errno.errorcode.get(-moved, -moved)}", "a write failed with %s", os.strerror(-moved))
        return Outcome.REJECTED if -moved in (errno.ENOSPC, errno.EDQUOT) else Outcome.FAILED

    def _removed(self, entry: Entry, reason: str) -> None:
        self._counts[reason] += 1
        self.report(Residency.REMOVED, entry.namespace, entry.key)

    # -- the rest of the contract --------------------------------------------------------------------------------

    def remove(self, batch: KeyBatch) -> int:
        removed = 0
        with self._lock:
            for page in range(len(batch)):
                entry = self._index.get(batch.namespace.digest, batch.key(page))
                if entry is None:
                    continue
                extent = self._extent(entry)
                if entry.own and extent is not None and not entry.pins:
                    self._erase(extent, entry.slot)
                self._drop(entry, "removed")
                removed += 1
        return removed

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        with self._lock:
            self._directory.clear({namespace.digest for namespace in namespaces})

    def register_memory(self, address: int, length: int) -> None:
        self._engine.register_memory(address, length)

    def stats(self) -> Mapping[str, int | float | str]:
        with self._lock:
            writer = self._directory.writer
            return {
                "pages": len(self._index),
                "own_bytes": writer.disk_bytes if writer else 0,
                "share_bytes": self._directory.share,
                "engine": self._engine.name,
                "engines_passed_over": "; ".join(f"{k}: {v}" for k, v in self._engine.passed_over.items()),
                "direct_io": "yes" if self._direct.works else self._direct.reason,
                "log_errors": writer.log_errors if writer else 0,
                "state": "directory gone" if self._gone else "disk full" if self._disk_full() else "ok",
                **self._counts,
            }

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        until = time.monotonic() + CLOSE_SECONDS - 1.0
        quiet = self._engine.close(until - time.monotonic())
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not quiet:
            logger.error("local tier: the device did not answer before the close; its files stay open")
        with self._lock:
            self._directory.close(quiet)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _io(self, batch: PageBatch) -> SlotIo:
        layout = batch.namespace.layout
        key = (layout.buffer_lengths, layout.page_size)
        io = self._ios.get(key)
        if io is None:
            with self._lock:
                io = self._ios.get(key)
                if io is None:
                    io = SlotIo(*key, self._direct.alignment, self._engine.register_memory)
                    self._ios[key] = io
        return io

    def _count_way(self, bounced: bool, pages: int) -> None:
        self._counts["pages_bounced" if bounced else "pages_direct"] += pages
        if bounced and pages:
            self._say(
                "bounce", "pages of this pool are not aligned for direct I/O and go through a bounce buffer%s", ""
            )

    def _say(self, kind: str, message: str, *args: object) -> None:
        """Log the first of its kind; the counts tell of the others."""
        with self._lock:
            if kind in self._said:
                return
            self._said.add(kind)
        logger.warning("local tier %s: " + message + " (said once; see stats)", self.options.path, *args)

    def _disk_full(self) -> bool:
        writer = self._directory.writer
        return writer is not None and time.monotonic() < writer.disk_full_until

    def _recover(self) -> None:
        """Look, beside the serving, for pages that the log of the folder we just took does not name."""
        thread = threading.Thread(target=self._scan, name="hicache-scan", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _scan(self) -> None:
        writer = self._directory.writer
        assert writer is not None
        with self._lock:
            places = writer.unscanned()
        found = scan(places, writer, self._lock, self._closing)
        with self._lock:
            self._counts["recovered_by_scan"] += found

    def _retain_files(self) -> None:
        """Tell the engine which extents are still open: what it registered of the others holds their space."""
        writer = self._directory.writer
        holders = [folder.extents for folder in self._directory.folders.values()]
        if writer is not None:
            holders.append(writer.extents)
        serials = [extent.serial for extents in holders for extent in extents.values()]
        if serials != self._open_files:
            self._open_files = serials
            self._slots.retain_files(serials)

    def _maintain(self) -> None:
        last_share = 0.0
        while not self._closing.wait(_MAINTENANCE_SECONDS):
            try:
                gone = self._directory.gone()
                if gone and not self._gone:
                    logger.error("local tier %s: the directory is gone; nothing more is stored", self.options.path)
                self._gone = gone
                with self._lock:
                    if gone or self._closing.is_set():
                        continue
                    self._directory.refresh()
                    self._retain_files()
                    if self._directory.writer is not None and time.monotonic() - last_share > _SHARE_SECONDS:
                        last_share = time.monotonic()
                        self._directory.update_share()
                        self._directory.writer.shrink(self._directory.share)
            except Exception:
                if "maintenance" not in self._said:
                    self._said.add("maintenance")
                    logger.exception("local tier %s: maintenance failed (said once)", self.options.path)

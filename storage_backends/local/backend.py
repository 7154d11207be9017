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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ByteSize, Field, model_validator

from hicache_ext.page import Namespace
from storage_backends import checksum
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
from storage_backends.format import BLOCK, FormatError, SlotShape
from storage_backends.local.directory import Directory
from storage_backends.local.engine import IoEngine, open_engine
from storage_backends.local.extents import Extent, ExtentFiles
from storage_backends.local.files import probe_direct
from storage_backends.local.index import Page
from storage_backends.local.index_choice import open_index
from storage_backends.local.policy import DEFAULT, Admission, Always, SecondHit, WriteBudget
from storage_backends.local.recovery import scan
from storage_backends.local.slots import CancelFlag, SlotGroup, SlotIo, Verdict, rows, slot_engine
from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)

_MAINTENANCE_SECONDS = 0.2
_SHARE_SECONDS = 2.0
_MIN_CAPACITY = 1 << 20
#: Refused pages that second-hit admission remembers at most, for each namespace.
_REMEMBERED = 1 << 18


class LocalOptions(BackendOptions):
    """path: directory on the disk. capacity: bytes of disk for all processes that use the directory together.

    engine: what moves the bytes ("auto": the best that works here). eviction: the order in which pages go when room is
    short, always the ends of chains first. admission: which pages are worth a write once the tier is full
    ("second_hit": those offered before, "write_budget": as many as write_bytes_per_day pay for).
    """

    path: Path
    capacity: ByteSize = Field(ge=_MIN_CAPACITY)
    engine: Literal["auto", "native", "liburing", "threads"] = "auto"
    eviction: Literal["credit", "lru", "s3fifo"] = DEFAULT  # type: ignore[assignment]
    admission: Literal["always", "second_hit", "write_budget"] = "always"
    write_bytes_per_day: ByteSize | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _budget_has_a_size(self) -> LocalOptions:
        if (self.admission == "write_budget") != (self.write_bytes_per_day is not None):
            raise ValueError("admission: write_budget and write_bytes_per_day go together; give both or neither")
        return self


@dataclass(slots=True, eq=False)
class _Flight:
    """Pages of one batch whose I/O begins together.

    The lists are by place in the group: pages[i] is the page's number in the batch. handles: of the pages being read
    (Index.pin). batch, generations, time_ns: of the pages being written, for when they are published.
    """

    completion: Completion
    pages: list[int]
    extents: list[Extent]
    slots: list[int]
    handles: list[int] = field(default_factory=list)
    batch: PageBatch | None = None
    generations: list[int] = field(default_factory=list)
    time_ns: int = 0
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
        self._index = open_index(options.eviction)
        self._admissions: dict[bytes, Admission] = {}
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._ios: dict[tuple[tuple[int, ...], int], SlotIo] = {}
        self._closing = threading.Event()
        self._gone = False
        options.path.mkdir(parents=True, exist_ok=True)
        self._direct = probe_direct(options.path)
        try:
            self._directory = Directory(options.path, options.capacity, ExtentFiles(self._direct), self._index)
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
            "local tier %s: %s, engine %s, %s, checksums by %s, %s index; %d pages known from the logs",
            options.path, options.capacity.human_readable(), self._engine.name,
            "O_DIRECT" if self._direct.works else f"buffered I/O ({self._direct.reason})",
            checksum.implementation(), self._index.name, len(self._index),
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

    def _lookup(self, batch: KeyBatch, used: bool = True) -> np.ndarray:
        return self._index.lookup(batch.namespace.digest, batch.keys, batch.parents, used)

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, batch: PageBatch) -> Completion:
        completion = Completion(len(batch), self.dispatcher)
        completion.cancelled = cancelled = CancelFlag()
        io = self._io(batch)
        bounced = io.must_bounce(batch)
        digest = batch.namespace.digest
        with self._lock:
            held = self._index.pin(digest, batch.keys, batch.parents)
            if len(held.pages) < len(batch):
                self._directory.refresh()
                self._index.unpin(held.handles)
                held = self._index.pin(digest, batch.keys, batch.parents)
            extents = [self._extent(*place) for place in zip(held.own, held.folders, held.extents, strict=True)]
            lost = [handle for handle, extent in zip(held.handles, extents, strict=True) if extent is None]
            for handle in lost:
                self._drop(self._index.pinned(handle), "lost")
            self._index.unpin(lost)
            flight = _Flight(completion, [], [], [])
            for page, handle, extent, slot in zip(held.pages, held.handles, extents, held.slots, strict=True):
                if extent is not None:
                    extent.pins += 1
                    flight.pages.append(page)
                    flight.handles.append(handle)
                    flight.extents.append(extent)
                    flight.slots.append(slot)
            self._count_way(bounced, len(flight.pages))
        missing = list(set(range(len(batch))).difference(flight.pages))
        completion.settle_many(missing, [Outcome.MISS] * len(missing))
        while flight.pages:
            ended = partial(self._read_done, flight)
            group = io.group(batch, flight.pages, False, bounced, flight.extents, flight.slots, cancelled, ended)
            flight.group = group
            at = len(group)
            rest = _Flight(completion, flight.pages[at:], flight.extents[at:], flight.slots[at:], flight.handles[at:])
            self._slots.submit_slots(group)
            flight = rest
        return completion

    def _extent(self, own: bool, folder_number: int, number: int) -> Extent | None:
        writer = self._directory.writer
        if own and writer is not None:
            return writer.extents.get(number)
        folder = self._directory.folders.get(folder_number)
        return None if folder is None else folder.extent(number)

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
        handle = flight.handles[place]
        if moved == -errno.ECANCELED:
            return Outcome.TIMEOUT
        if moved < 0:
            self._say(f"read {errno.errorcode.get(-moved, -moved)}", "a read failed with %s", os.strerror(-moved))
            self._counts["io_errors"] += 1
            if self._index.fail(handle) > 1:  # once may be the bus; twice is this page
                self._drop(self._index.pinned(handle), "io_error")
            return Outcome.FAILED
        if verdict == Verdict.VALID:
            return Outcome.HIT
        page = self._index.pinned(handle)
        if verdict == Verdict.OTHER_PAGE and not page.own:
            self._drop(page, "lost_race")  # its writer reused the slot: the end of every eviction
            return Outcome.MISS
        what = Verdict(verdict).name.lower().replace("_", " ")
        self._say("corrupt", "a page failed verification (%s) and is quarantined", what)
        self._drop(page, "corrupt")
        if page.own:
            self._erase(flight.extents[place], page.slot)
        return Outcome.CORRUPT

    def _drop(self, page: Page, reason: str) -> None:
        """Stop serving a page. Another writer's page is only forgotten here: its slot is not ours to free."""
        if page.own and self._directory.writer is not None:
            self._directory.writer.forget([page], reason)
        elif self._index.remove(page):
            self._counts[reason] += 1

    def _erase(self, extent: Extent, slot: int) -> None:
        """Overwrite a slot's header, so that no later scan takes the page in again. The caller has it pinned."""
        try:
            if not extent.doomed:
                os.pwrite(extent.fd, self._zeroes.view, extent.offset(slot))
        except OSError as error:
            self._say("erase", "a quarantined slot could not be erased: %s", error)

    def _unpin(self, flight: _Flight, places: Sequence[int]) -> None:
        writer = self._directory.writer
        handles = [flight.handles[place] for place in places]
        # A page of ours that was removed while it was being read: its slot could not be freed then.
        own = [self._index.pinned(handle).own for handle in handles] if writer is not None else []
        freed = self._index.unpin(handles)
        for at, place in enumerate(places):
            extent = flight.extents[place]
            extent.unpin()
            if freed[at] and writer is not None and own[at]:
                writer.give_back(extent, flight.slots[place])

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
            found = self._lookup(batch, used=False)  # links parents, touches the chain
            admitted: dict[int, bool] = {}
            chain: frozenset[bytes] | None = None
            refused: set[bytes] = set()

            def protected() -> frozenset[bytes] | None:
                """What must not go for this page: its chain. And nothing may, when its parent is not here to stay."""
                nonlocal chain
                parent = batch.parent(page)
                # Asked even where a refused parent decides: so the whole chain is known the next time.
                if page not in admitted:
                    admitted[page] = self._admit(batch, page, io.shape.slot_bytes)
                if not admitted[page]:
                    return None
                if chain is None:
                    chain = frozenset(self._chain(batch))
                if parent is None or (parent in chain and parent not in refused):
                    return chain
                return None

            for page in range(len(batch)):
                if found[page] and self._index.has(batch.namespace.digest, batch.key(page)):
                    known.append((page, Outcome.HIT))
                    continue
                try:
                    place = self._allocate(batch.namespace, io.shape, protected, lambda: admitted.get(page, True))  # noqa: B023
                except OSError as error:
                    self._say("allocate", "no room can be made: %s", error)
                    known.append((page, self._refused(-(error.errno or errno.EIO))))
                    continue
                if place is None:
                    parent = batch.parent(page)
                    if not admitted.get(page, True):
                        self._counts[f"rejected_{self.options.admission}"] += 1
                    else:
                        self._counts["rejected_unreachable" if parent in refused else "rejected_no_room"] += 1
                    known.append((page, Outcome.REJECTED))
                    refused.add(batch.key(page))
                    continue
                pages.append(page)
                places.append(place)
            self._count_way(bounced, len(pages))
        completion.settle_many([page for page, _ in known], [outcome for _, outcome in known])
        if not pages:
            return completion
        now = time.time_ns()
        extents = [extent for extent, _, _ in places]
        slots = [slot for _, slot, _ in places]
        generations = [generation for _, _, generation in places]
        at = 0
        while at < len(pages):
            flight = _Flight(
                completion, pages[at:], extents[at:], slots[at:], batch=batch, generations=generations[at:], time_ns=now
            )
            ended = partial(self._write_done, flight)
            group = io.group(batch, pages[at:], True, bounced, flight.extents, flight.slots, cancelled, ended)
            end = at + len(group)
            io.write_headers(group, batch, pages[at:end], generations[at:end], now)
            at = end
            flight.group = group
            self._slots.submit_slots(group)
        return completion

    def _admit(self, batch: PageBatch, page: int, slot_bytes: int) -> bool:
        """Whether a page is worth a write that something else must go for."""
        space = batch.namespace.digest
        # Budgets are the tier's, what was seen is the namespace's.
        name = b"" if self.options.write_bytes_per_day else space
        rule = self._admissions.get(name)
        if rule is None:
            rule = self._admissions[name] = _admission(self.options, slot_bytes)
        return rule.admit(batch.key(page), slot_bytes, time.monotonic())

    def _chain(self, batch: KeyBatch) -> Iterable[bytes]:
        """The batch's pages and all their known ancestors: what a write of this batch must not evict."""
        for page in range(len(batch)):
            yield batch.key(page)
        parent = batch.parent(0) if len(batch) else None
        if parent is not None:
            yield from self._index.ancestors(batch.namespace.digest, parent)

    def _allocate(
        self, namespace: Namespace, shape: SlotShape, protected: Callable[[], frozenset[bytes] | None],
        admitted: Callable[[], bool],
    ) -> tuple[Extent, int, int] | None:  # fmt: skip
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
            if not admitted() or not directory.reclaim_abandoned():
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
        batch = flight.batch
        assert batch is not None
        outcomes = []
        stored: list[int] = []
        with self._lock:
            writer = self._writer
            for place, result in zip(places, moved, strict=True):
                extent = flight.extents[place]
                if result == length and not extent.doomed:
                    outcomes.append(Outcome.HIT)
                    stored.append(place)
                else:
                    outcomes.append(self._refused(result))
                    writer.give_back(extent, flight.slots[place])
            stored.sort()  # they end in any order, and the batch's keys are taken out in its own
            pages = [flight.pages[place] for place in stored]
            keys = rows(batch.keys, pages)
            if stored:
                writer.publish(
                    group.namespace, keys, None if batch.parents is None else rows(batch.parents, pages),
                    [(flight.extents[place], flight.slots[place]) for place in stored],
                    [flight.generations[place] for place in stored], flight.time_ns,
                )  # fmt: skip
                self._counts["stored"] += len(stored)
            for place in places:
                flight.extents[place].unpin()
        self.report(Residency.STORED, group.namespace, keys)
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

    def _removed(self, page: Page, reason: str) -> None:
        self._counts[reason] += 1
        self.report(Residency.REMOVED, page.namespace, page.key)

    # -- the rest of the contract --------------------------------------------------------------------------------

    def remove(self, batch: KeyBatch) -> int:
        removed = 0
        with self._lock:
            for page in range(len(batch)):
                known = self._index.get(batch.namespace.digest, batch.key(page))
                if known is None:
                    continue
                extent = self._extent(known.own, known.folder, known.extent)
                if known.own and extent is not None and not known.pins:
                    self._erase(extent, known.slot)
                self._drop(known, "removed")
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
                "index": self._index.name,
                "index_bytes": self._index.memory(),
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


def _admission(options: LocalOptions, slot_bytes: int) -> Admission:
    """A rule for pages of this size; asked only when the tier is full."""
    if options.admission == "second_hit":
        return SecondHit(max(1, min(_REMEMBERED, options.capacity // slot_bytes)))
    if options.write_bytes_per_day is not None:
        # A quiet time saves up at most an hour's bytes, so that a burst is no day's wear.
        return WriteBudget(options.write_bytes_per_day, max(options.write_bytes_per_day / 24, slot_bytes))
    return Always()

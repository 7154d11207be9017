"""What the parts of one open tier share: its index and the lock around it, its disks, its counts.

Belongs here: what both reads and writes need to know or to say. Does not belong here: the order of steps of either
(reads.py, writes.py), or opening and closing (backend.py).

What is counted (`stats`), pages unless said otherwise:

    stored               written and published
    evicted              our pages that made room for pages of their own namespace
    reclaimed            our pages that went with an extent for another namespace or writer, or below such pages
    expired              our pages past their time to live
    removed, cleared     because somebody asked for it (`remove`, `clear`)
    corrupt              that failed verification; their slots are erased
    io_error             that could not be read twice
    lost                 whose extent was not there
    lost_race            of another writer, which had reused the slot
    rejected_second_hit, rejected_write_budget   not worth a write, by the tier's `admission`
    rejected_no_room     nothing could go for them
    rejected_unreachable whose parent was rejected
    rejected_pinned_full of a pinned namespace that fills its room
    rejected_starting    that came before any disk had answered, or while the tier was being closed
    rejected_cleared     whose namespace was cleared while they were being written
    io_errors            reads and writes that failed, of pages or for want of an extent
    memory_errors        reads and writes that failed for what the caller's memory lies in, a GPU
    pages_direct, pages_bounced   moved straight from or to the caller's memory, or through a buffer of ours
    recovered_by_scan    that the header scan brought back
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from storage_backends.base import Completion, Dispatcher, Notes, Residency
from storage_backends.buffers import OwnedMemory
from storage_backends.format import BLOCK
from storage_backends.local.disk import Around
from storage_backends.local.disks import Disks
from storage_backends.local.engine import IoEngine
from storage_backends.local.expiry import Expiry
from storage_backends.local.extents import Extent
from storage_backends.local.folder import Folder
from storage_backends.local.index import Page
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.options import LocalOptions
from storage_backends.local.rules import Rules
from storage_backends.local.slots import CancelFlag, SlotEngine
from storage_backends.local.writer import Writer
from storage_backends.local.writers import Writers

logger = logging.getLogger(__name__)


Place = tuple[int, int]
"""An extent: folder and number."""


class Report(Protocol):
    """As Backend.report."""

    def __call__(self, change: Residency, namespace: bytes, keys: bytes, notes: Notes | None = None) -> None: ...


class Tier:
    """lock: around the index, the disks and everything below them."""

    def __init__(
        self, options: LocalOptions, dispatcher: Dispatcher, report: Report, index: AnyIndex, rules: Rules,
        slots: Callable[[IoEngine], SlotEngine],
    ) -> None:  # fmt: skip
        """slots: see Around. Raises OptionError when no disk can be used."""
        self.options = options
        self.report = report
        self.index = index
        self.expiry = Expiry(rules, index)
        self.lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self._dispatcher = dispatcher
        self._said: set[str] = set()
        self._zeroes = OwnedMemory(BLOCK)
        places = options.places
        self.several = len(places) > 1
        peers = self._peers = dict[int, Writer]()
        around = Around(
            index, rules, self.lock, peers, options.engine, options.sqpoll, options.iopoll, self.several, slots,
            options.metadata,
        )  # fmt: skip
        self.disks = Disks(places, around, self.removed, self._expire)
        self.writers = Writers(index, self.disks, peers, self.removed)

    def completion(self, pages: int) -> tuple[Completion, CancelFlag]:
        completion = Completion(pages, self._dispatcher)
        completion.cancelled = cancelled = CancelFlag()
        return completion, cancelled

    def extent(self, folder: int, number: int) -> Extent | None:
        """One that is open; the others `unopened` names."""
        disk = self.disks.of(folder)
        return None if disk is None else disk.extent(folder, number)

    def unopened(self, places: Iterable[Place]) -> list[tuple[Folder, int]]:
        """Which of these extents, told by folder and number, nobody has opened yet: other writers'."""
        found = []
        for folder, number in set(places):
            disk = self.disks.of(folder)
            owner = None if disk is None else disk.unopened(folder, number)
            if owner is not None:
                found.append((owner, number))
        return found

    def open(self, extents: list[tuple[Folder, int]]) -> None:
        """Open what `unopened` found. Call without the lock: a disk may take its time."""
        opened = [(folder, number, folder.open(number)) for folder, number in extents]
        with self.lock:
            for folder, number, extent in opened:
                if extent is None:
                    continue
                disk = self.disks.of(folder.number)
                # What was given up meanwhile must not be held open, nor what somebody else opened too.
                wanted = disk is not None and disk.directory.folders.get(folder.number) is folder
                if wanted and number not in folder.extents and len(self.index.used_slots(folder.number, number)):
                    folder.extents[number] = extent
                else:
                    extent.doom()

    def let_go(self, extent: Extent, slot: int, free: bool) -> None:
        """Unpin an extent. free: its slot held a page of ours that is gone."""
        extent.unpin()
        if free:
            for writer in self._peers.values():
                if writer.extents.get(extent.number) is extent:
                    writer.give_back(extent, slot)

    def drop(self, page: Page, reason: str) -> None:
        """Stop serving a page. Another writer's page is only forgotten here: its slot is not ours to free."""
        if page.own:
            self.writers.forget([page], reason)
        elif self.index.remove(page):
            self.counts[reason] += 1
            self.report(Residency.REMOVED, page.namespace, page.key)

    def removed(self, pages: list[Page], reason: str) -> None:
        """Our writer stopped holding these pages."""
        self.counts[reason] += len(pages)
        keys: dict[bytes, list[bytes]] = {}
        for page in pages:
            keys.setdefault(page.namespace, []).append(page.key)
        for namespace, gone in keys.items():
            self.report(Residency.REMOVED, namespace, b"".join(gone))

    def erase(self, extent: Extent, slot: int) -> None:
        """Overwrite a slot's header, so that no later scan takes the page in again. The caller has the extent pinned,
        and does without the lock: this waits for the device."""
        try:
            if not extent.doomed:
                os.pwrite(extent.fd, self._zeroes.view, extent.offset(slot))
        except OSError as error:
            self.say("erase", "a quarantined slot could not be erased: %s", error)

    def _expire(self) -> None:
        """Remove pages that are past their time, a few at a time."""
        with self.lock:
            self.expiry.advance()
            for namespace, description in self.writers.descriptions():
                self.expiry.know(namespace, description)
            self.expiry.sweep(self.writers.forget)

    def count_way(self, bounced: bool, pages: int) -> None:
        self.counts["pages_bounced" if bounced else "pages_direct"] += pages
        if bounced and pages:
            self.say("bounce", "pages of this pool are not aligned for direct I/O and go through a bounce buffer%s", "")

    def say(self, kind: str, message: str, *args: object) -> None:
        """Log the first of its kind; the counts tell of the others."""
        with self.lock:
            if kind in self._said:
                return
            self._said.add(kind)
        logger.warning("local tier %s: " + message + " (said once; see stats)", self.options.names, *args)

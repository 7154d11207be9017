"""What the parts of one open tier share: its index and the lock around it, its directory, its engine, its counts.

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
    rejected_cleared     whose namespace was cleared while they were being written
    io_errors            reads and writes that failed, of pages or for want of an extent
    pages_direct, pages_bounced   moved straight from or to the caller's memory, or through a buffer of ours
    recovered_by_scan    that the header scan brought back
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable

from storage_backends.base import Completion, Dispatcher, PageBatch, Residency
from storage_backends.buffers import OwnedMemory
from storage_backends.format import BLOCK
from storage_backends.local.directory import Directory
from storage_backends.local.engine import IoEngine
from storage_backends.local.expiry import Expiry
from storage_backends.local.extents import Extent
from storage_backends.local.files import DirectIo
from storage_backends.local.index import Page
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.options import LocalOptions
from storage_backends.local.slots import CancelFlag, SlotEngine, SlotIo

logger = logging.getLogger(__name__)

Report = Callable[[Residency, bytes, bytes], None]
"""(change, namespace digest, packed keys)"""


class Tier:
    """lock: around the index, the directory and everything below it. gone: the directory is no longer there."""

    def __init__(
        self, options: LocalOptions, dispatcher: Dispatcher, report: Report, index: AnyIndex, direct: DirectIo,
        directory: Directory, engine: IoEngine, slots: SlotEngine,
    ) -> None:  # fmt: skip
        self.options = options
        self.report = report
        self.index = index
        self.directory = directory
        self.engine = engine
        self.slots = slots
        self.expiry = Expiry(directory.rules, index)
        self.lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.gone = False
        self._dispatcher = dispatcher
        self._direct = direct
        self._said: set[str] = set()
        self._ios: dict[tuple[tuple[int, ...], int], SlotIo] = {}
        self._zeroes = OwnedMemory(BLOCK)

    def completion(self, pages: int) -> tuple[Completion, CancelFlag]:
        completion = Completion(pages, self._dispatcher)
        completion.cancelled = cancelled = CancelFlag()
        return completion, cancelled

    def io(self, batch: PageBatch) -> SlotIo:
        layout = batch.namespace.layout
        key = (layout.buffer_lengths, layout.page_size)
        io = self._ios.get(key)
        if io is None:
            with self.lock:
                io = self._ios.get(key)
                if io is None:
                    io = SlotIo(*key, self._direct.alignment, self.engine.register_memory)
                    self._ios[key] = io
        return io

    def extent(self, folder_number: int, number: int) -> Extent | None:
        writer = self.directory.writer
        if writer is not None and folder_number == writer.number:
            return writer.extents.get(number)
        folder = self.directory.folders.get(folder_number)
        return None if folder is None else folder.extent(number)

    def drop(self, page: Page, reason: str) -> None:
        """Stop serving a page. Another writer's page is only forgotten here: its slot is not ours to free."""
        if page.own and self.directory.writer is not None:
            self.directory.writer.forget([page], reason)
        elif self.index.remove(page):
            self.counts[reason] += 1

    def removed(self, pages: list[Page], reason: str) -> None:
        """Our writer stopped holding these pages."""
        self.counts[reason] += len(pages)
        keys: dict[bytes, list[bytes]] = {}
        for page in pages:
            keys.setdefault(page.namespace, []).append(page.key)
        for namespace, gone in keys.items():
            self.report(Residency.REMOVED, namespace, b"".join(gone))

    def erase(self, extent: Extent, slot: int) -> None:
        """Overwrite a slot's header, so that no later scan takes the page in again. The caller has it pinned."""
        try:
            if not extent.doomed:
                os.pwrite(extent.fd, self._zeroes.view, extent.offset(slot))
        except OSError as error:
            self.say("erase", "a quarantined slot could not be erased: %s", error)

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
        logger.warning("local tier %s: " + message + " (said once; see stats)", self.options.path, *args)

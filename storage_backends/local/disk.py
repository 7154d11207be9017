"""One disk of the tier, open: its directory, its I/O engine, and how it does.

Belongs here: what one path has for its own, so that a disk that hangs takes nothing from the others. Does not belong
here: which disk a page goes to (writers.py), or a disk's coming and going (disks.py).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage_backends.base import OptionError, PageBatch
from storage_backends.direct_io import probe_direct
from storage_backends.format import FormatError
from storage_backends.local.device import Device, home_of
from storage_backends.local.directory import FOLDERS, Directory
from storage_backends.local.engine import IoEngine, open_engine
from storage_backends.local.extents import Extent, ExtentFiles
from storage_backends.local.folder import YIELD_SECONDS, Folder
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.rules import Rules
from storage_backends.local.slots import MEMORY_TROUBLE, CancelFlag, SlotEngine, SlotIo
from storage_backends.local.supply import Supply
from storage_backends.local.upkeep import Upkeep
from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)

#: Failed transfers in a row that put a disk out of use.
FAILURES = 8
#: Errors that say nothing about the disk's health.
_HARMLESS = frozenset({errno.ECANCELED, errno.ENOSPC, errno.EDQUOT, MEMORY_TROUBLE})


@dataclass(frozen=True)
class Around:
    """What every disk of a tier is opened with. several: the tier has more than one, and may go on without this one.
    slots: makes what moves slots out of what moves bytes."""

    index: AnyIndex
    rules: Rules
    lock: threading.RLock
    peers: dict[int, Writer]
    engine: str
    sqpoll: bool
    iopoll: bool
    several: bool
    slots: Callable[[IoEngine], SlotEngine]
    metadata: Path | None = None


class Disk:
    """Not thread-safe, but for `io` and `maintain`: the tier's lock is around it.

    path: as configured, a directory or a device. home: the directory of its folders.

    gone: the directory is no longer there. out: why the disk is out of use ("": it is not); it does not come back, but
    another Disk may take its place. flying: pages on their way. answered: when one of them last ended, seen: when the
    directory was last looked after (monotonic seconds). making: extents that writes make now. errors: transfers that
    failed.
    """

    def __init__(self, number: int, path: Path, capacity: int, around: Around, seconds: float | None) -> None:
        """seconds: for what is known at once of the pages there (Directory.refresh). Raises OptionError, OSError."""
        self.number, self.path, self.capacity = number, path, capacity
        self._around = around
        self._lock = around.lock
        self.stopping = CancelFlag()
        home = self.home = home_of(path, around.metadata)
        if home == path:
            path.mkdir(parents=True, exist_ok=True)
            files = ExtentFiles(probe_direct(path))
        else:
            files = Device(path, home)
        direct = self.direct = files.direct
        try:
            self.directory = Directory(
                home, capacity, files, around.index, around.rules, self._lock, number * FOLDERS, around.peers, seconds
            )
        except FormatError as error:  # a folder of a version that we do not know
            raise OptionError(
                "path", str(path), f"holds another format: {error}",
                "use the program version that wrote it, or another directory, or delete this one",
            ) from error  # fmt: skip
        # An engine that is asked for by name is taken as it is.
        hints = {"direct": direct.works} if around.engine == "auto" else {}
        self.engine: IoEngine = open_engine(
            around.engine, sqpoll=around.sqpoll, iopoll=around.iopoll, directory=path, **hints
        )
        self.slots = around.slots(self.engine)
        self.upkeep = Upkeep(around.index, self._lock, self.stopping)
        self.supply = Supply(self.directory, around.index, self._lock)
        self.gone = False
        self.out = ""
        self.flying = self.making = self.errors = 0
        self.answered = self.seen = time.monotonic()
        self._failures = 0
        self._ios: dict[tuple[tuple[int, ...], int], SlotIo] = {}
        self._open_files: list[int] = []

    def io(self, batch: PageBatch) -> SlotIo:
        """Memory for transfers of this batch's pages: each disk its own, so that none waits for what another holds."""
        layout = batch.namespace.layout
        key = (layout.buffer_lengths, layout.page_size)
        io = self._ios.get(key)
        if io is None:
            with self._lock:
                io = self._ios.get(key)
                if io is None:
                    io = SlotIo(*key, self.direct.alignment, self.engine.register_memory)
                    self._ios[key] = io
        return io

    def extent(self, folder_number: int, number: int) -> Extent | None:
        """One that is open."""
        writer = self.directory.writer
        if writer is not None and folder_number == writer.number:
            return writer.extents.get(number)
        folder = self.directory.folders.get(folder_number)
        return None if folder is None else folder.extents.get(number)

    def unopened(self, folder_number: int, number: int) -> Folder | None:
        """The folder of another writer's extent that nobody has opened yet."""
        folder = self.directory.folders.get(folder_number)
        return None if folder is None or number in folder.extents else folder

    # -- health --------------------------------------------------------------------------------------------------

    def begun(self, pages: int) -> None:
        if not self.flying:
            self.answered = time.monotonic()
        self.flying += pages

    def ended(self, moved: Sequence[int]) -> None:
        """So many bytes were moved, or -errno, for each page that ended."""
        self.flying -= len(moved)
        self.answered = time.monotonic()
        for result in moved if min(moved, default=0) < 0 else ():
            if result >= 0:
                self._failures = 0
            elif -result not in _HARMLESS:
                self.failed(-result)
        if moved and moved[-1] >= 0:
            self._failures = 0

    def failed(self, error: int) -> None:
        """The disk answered with this errno."""
        self.errors += 1
        self._failures += 1
        if self._failures >= FAILURES:
            self.put_out(f"{self._failures} transfers in a row failed, the last with {os.strerror(error)}")

    def put_out(self, reason: str) -> None:
        """No more use is made of it, if there is another; whoever has it in flight still ends."""
        if self._around.several and not self.out:
            self.out = reason
            self.supply.close()

    def is_full(self) -> bool:
        writer = self.directory.writer
        return writer is not None and time.monotonic() < writer.disk_full_until

    @property
    def state(self) -> str:
        return self.out or ("directory gone" if self.gone else "disk full" if self.is_full() else "ok")

    # -- upkeep --------------------------------------------------------------------------------------------------

    def maintain(self) -> None:
        """One turn of what is due now and then; takes the lock itself. seen: when it last came to an end."""
        gone = self.directory.gone()
        if gone and not self.gone and not self._around.several:
            logger.error("local tier %s: the directory is gone; nothing more is stored", self.path)
        self.gone = gone
        self._catch_up()
        with self._lock:
            if gone:
                self.put_out("the directory is gone")
            if gone or self.out or self.stopping.is_set():
                return
            self._retain_files()
            if self.directory.writer is not None:
                self.upkeep.turn(self.directory.writer)
        self.seen = time.monotonic()

    def _catch_up(self) -> None:
        """Read the other writers' logs to their ends, in turns with whoever wants the lock."""
        while not self.gone:
            if self.stopping.is_set() or self.out:
                return
            self.directory.refresh()
            with self._lock:
                if not self.directory.behind:
                    return
            time.sleep(YIELD_SECONDS)

    def _retain_files(self) -> None:
        """Tell the engine which extents are still open: what it registered of the others holds their space."""
        writer = self.directory.writer
        holders = [folder.extents for folder in self.directory.folders.values()]
        if writer is not None:
            holders.append(writer.extents)
        serials = [extent.serial for extents in holders for extent in extents.values()]
        if serials != self._open_files:
            self._open_files = serials
            self.slots.retain_files(serials)

    def close(self, until: float) -> bool:
        """Let go of everything by `until` (monotonic seconds); whether the device answered all that was asked of it."""
        self.stopping.set()
        self.supply.close()
        quiet = self.slots.stop(until - time.monotonic())
        quiet = self.engine.close(until - time.monotonic()) and quiet
        for thread in (self.supply.thread, *self.upkeep.threads):
            thread.join(max(0.0, until - time.monotonic()))
        while self.making and time.monotonic() < until:
            time.sleep(YIELD_SECONDS)
        with self._lock:
            quiet = quiet and not self.making
            self.directory.close(quiet)
            claim = self.supply.claiming
            if claim is not None and claim.writer is not None:
                claim.writer.close(quiet)
        return quiet

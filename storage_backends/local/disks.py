"""The disks of a tier: which are in use, and how one goes out of use and comes back.

Belongs here: the bays, watching them, emptying the index of a disk that went, and probing for its return. Does not
belong here: one disk (disk.py), or what goes onto which (writers.py).

A disk goes out of use when its transfers fail one after the other, when its directory is gone, or when it does not
answer. Its pages leave the index at once; transfers in flight are waited for, however long that takes, since their
memory is in the device's hands. Then its files are let go of, and a thread of its own looks for it: when the directory
is there again and takes and gives bytes, it is opened anew, and what its logs say is taken in. The tier's only disk
never goes out of use: then the cascade above has that to decide.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from storage_backends.base import OptionError
from storage_backends.buffers import OwnedMemory
from storage_backends.direct_io import probe_direct
from storage_backends.local import device
from storage_backends.local.device import home_of
from storage_backends.local.directory import FOLDERS, FORMAT
from storage_backends.local.disk import Around, Disk
from storage_backends.local.files import open_extent
from storage_backends.local.index import Page

logger = logging.getLogger(__name__)

_TURN_SECONDS = 0.2
#: How long news of another writer on one of several disks may take (`Disks.refresh`).
_SEVERAL_SECONDS = 0.05
#: A disk that has ended no transfer for so long, though some are on their way, or whose directory cannot be looked at.
SILENT_SECONDS = 10.0
_FIRST_PROBE_SECONDS = 1.0
_LONGEST_PROBE_SECONDS = 60.0
#: A disk that was in use for so long is not taken for one that comes and goes.
_STAYED_SECONDS = 600.0
_PROBE_BYTES = 4096
_PROBE_READS = 256


class Bay:
    """Place for one disk. disk: the open one, in use or on its way out; None: there is none, for this `reason`."""

    def __init__(self, number: int, path: Path, capacity: int) -> None:
        self.number, self.path, self.capacity = number, path, capacity
        self.disk: Disk | None = None
        self.reason = ""
        self.emptied = False
        self.past_errors = 0
        self.probe_at = self._pause = self._back_since = 0.0

    def wait(self, now: float) -> None:
        """Look for the disk again after a while: after a longer one each time, as long as it does not stay."""
        if self._back_since and now - self._back_since > _STAYED_SECONDS:
            self._pause = 0.0
        self._back_since = 0.0
        self._pause = min(max(2 * self._pause, _FIRST_PROBE_SECONDS), _LONGEST_PROBE_SECONDS)
        self.probe_at = now + self._pause

    def take_in(self, disk: Disk) -> None:
        self.disk, self.reason, self.emptied, self._back_since = disk, "", False, time.monotonic()

    @property
    def errors(self) -> int:
        """Transfers that failed here, of this disk and those before."""
        return self.past_errors + (0 if self.disk is None else self.disk.errors)

    @property
    def bytes(self) -> int:
        """What our extents take on the disk."""
        writer = None if self.disk is None else self.disk.directory.writer
        return 0 if writer is None else writer.disk_bytes

    @property
    def state(self) -> str:
        return self.reason if self.disk is None else self.disk.state


class Disks:
    """removed: hears of our pages that leave with a disk. tidy: what else is to be done now and then."""

    def __init__(
        self, places: Sequence[tuple[Path, int]], around: Around, removed: Callable[[list[Page], str], None],
        tidy: Callable[[], None],
    ) -> None:  # fmt: skip
        """places: path and capacity (bytes) of each. Raises OptionError when none can be used, or one is of another
        format."""
        self._around, self._lock, self._removed, self._tidy = around, around.lock, removed, tidy
        self._closing = threading.Event()
        self._memory: list[tuple[int, int]] = []
        self.returns = 0  # how often a disk came back, with pages that nobody has reported
        self.bays = [Bay(number, path, capacity) for number, (path, capacity) in enumerate(places)]
        self.in_use: list[Disk] = []
        first: OptionError | None = None
        for bay in self.bays:
            try:
                bay.disk = Disk(bay.number, bay.path, bay.capacity, around, None)
            except (OptionError, OSError) as error:
                problem = _as_option_error(bay.path, error)
                if not around.several or not _is_trouble(error):
                    self._close_all()
                    raise problem from error
                bay.reason, first = str(error), first or problem
                logger.error("local tier: disk %s cannot be used, the others serve: %s", bay.path, error)
        self._count()
        if not self.in_use:
            assert first is not None
            raise first
        self._threads = [threading.Thread(target=self._keep, args=(bay,), daemon=True) for bay in self.bays]
        if around.several:
            self._threads.append(threading.Thread(target=self._watch, daemon=True))

    def start(self) -> None:
        """Look after the disks from now on."""
        for thread in self._threads:
            thread.name = "hicache-local"
            thread.start()

    def of(self, folder: int) -> Disk | None:
        """The disk of a folder in the index, if it is in use."""
        disk = self.bays[folder // FOLDERS].disk
        return None if disk is None or disk.out else disk

    def refresh(self) -> bool:
        """Look for news of other writers; whether there was any. Call without the lock.

        Of several disks none is asked here: each has a thread of its own that does so all the time, since one that
        hangs must not keep whoever wants the others' pages.
        """
        if self._around.several:
            return False
        return any(disk.directory.refresh() for disk in self.in_use if not disk.out)

    def register_memory(self, address: int, length: int) -> None:
        with self._lock:
            self._memory.append((address, length))
            disks = list(self.in_use)
        for disk in disks:
            disk.engine.register_memory(address, length)

    def close(self, until: float) -> bool:
        """By `until` (monotonic seconds); whether every device answered."""
        with self._lock:
            self._closing.set()
            disks = self._open()
        for disk in disks:
            disk.stopping.set()
        quiet: list[bool] = []
        closers = [threading.Thread(target=lambda d=disk: quiet.append(d.close(until)), daemon=True) for disk in disks]
        for thread in closers:
            thread.start()
        for thread in (*closers, *self._threads):
            thread.join(max(0.0, until - time.monotonic()))
        return len(quiet) == len(disks) and all(quiet)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _open(self) -> list[Disk]:
        return [bay.disk for bay in self.bays if bay.disk is not None]

    def _count(self) -> None:
        self.in_use = [disk for disk in self._open() if not disk.out]

    def _close_all(self) -> None:
        for disk in self._open():
            disk.close(time.monotonic() + 1.0)

    def _keep(self, bay: Bay) -> None:
        """A bay's own thread: only this one waits for a disk that does not answer."""
        said = False
        while not self._closing.wait(_SEVERAL_SECONDS if self._around.several else _TURN_SECONDS):
            try:
                disk = bay.disk
                if disk is None:
                    self._look_for(bay)
                elif not disk.out:
                    disk.maintain()
                    self._tidy()
                elif bay.emptied and not disk.flying and not disk.making:
                    disk.close(time.monotonic() + 1.0)
                    bay.disk, bay.past_errors = None, bay.errors
                    bay.wait(time.monotonic())
            except Exception:
                if not said:
                    said = True
                    logger.exception("local tier %s: maintenance failed (said once)", bay.path)

    def _look_for(self, bay: Bay) -> None:
        if time.monotonic() < bay.probe_at:
            return
        try:
            probe(bay.path, home_of(bay.path, self._around.metadata))
            disk = Disk(bay.number, bay.path, bay.capacity, self._around, 0.0)
        except (OptionError, OSError) as error:
            bay.reason = str(error)
            bay.wait(time.monotonic())
            return
        with self._lock:
            closing, memory = self._closing.is_set(), list(self._memory)
            if not closing:
                bay.take_in(disk)
                self.returns += 1
                self._count()
        if closing:
            disk.close(time.monotonic() + 1.0)
            return
        for address, length in memory:
            disk.engine.register_memory(address, length)
        logger.warning("local tier: disk %s is in use again", bay.path)

    def _watch(self) -> None:
        """Takes disks out of use. Asks nothing of any disk, so that none can hold it up."""
        while not self._closing.wait(_TURN_SECONDS):
            now = time.monotonic()
            for bay in self.bays:
                disk = bay.disk
                if disk is None or bay.emptied:
                    continue
                with self._lock:
                    late = disk.flying and now - disk.answered > SILENT_SECONDS
                    if late or now - disk.seen > SILENT_SECONDS:
                        disk.put_out(f"it did not answer for {SILENT_SECONDS:.0f} s")
                    if disk.out:
                        self._count()
                if disk.out:
                    logger.error("local tier: disk %s is out of use, the others serve: %s", bay.path, disk.out)
                    self._empty(bay, disk)

    def _empty(self, bay: Bay, disk: Disk) -> None:
        """The disk's pages leave the index, an extent at a time."""
        index, lock = self._around.index, self._lock
        with lock:
            bay.reason = disk.out
            writer = disk.directory.writer
            folders = [*disk.directory.folders, *([] if writer is None else [writer.number])]
        for folder in folders:
            with lock:
                extents = index.extents(folder)
            for extent in extents:
                with lock:
                    if writer is None or folder != writer.number:
                        index.trim(folder, extent, bytes(16), 0)
                        continue
                    gone, _ = index.forget(index.in_extent(folder, extent), False, time.time_ns())
                    if gone:
                        self._removed(gone, "disk_out")
        with lock:
            if writer is not None:
                del self._around.peers[writer.number]
        bay.emptied = True


def probe(path: Path, home: Path) -> None:
    """Whether a disk is there, and takes and gives bytes, old ones too. Makes nothing that stays.

    home: the directory of its folders; another than `path` where that is a device.

    Raises OSError.
    """
    os.stat(home / FORMAT)
    if home != path:
        device.probe(path)
    data, file = os.urandom(_PROBE_BYTES), home / f".probe-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with open(file, "xb", buffering=0) as target:
            target.write(data)
            os.fsync(target.fileno())
            os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read_bytes() != data:
            raise OSError("gives other bytes than it took")
    finally:
        file.unlink(missing_ok=True)
    extents = list(home.glob("w*/e*.ext"))
    memory, direct = OwnedMemory(_PROBE_BYTES), probe_direct(home)
    for extent in random.choices(extents, k=_PROBE_READS) if extents else ():
        fd = open_extent(extent, direct, write=False)
        try:
            blocks = max(1, os.fstat(fd).st_size // _PROBE_BYTES)
            os.preadv(fd, [memory.view], random.randrange(blocks) * _PROBE_BYTES)
        finally:
            os.close(fd)


def _is_trouble(error: Exception) -> bool:
    """Whether this is about a disk that fails or is missing, and not about what is on it or how it is configured."""
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)


def _as_option_error(path: Path, error: Exception) -> OptionError:
    if isinstance(error, OptionError):
        return error
    return OptionError("path", str(path), f"cannot be used: {error}", "name a directory that this user may write")

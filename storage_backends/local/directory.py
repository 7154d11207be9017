"""The directory of a local tier: its format line, its writer folders, who lives in them, and how room is shared.

Belongs here: what concerns several processes. Does not belong here: one folder's extents and pages (folder.py,
writer.py), or I/O of pages (backend.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from hicache_ext.page import Namespace
from storage_backends.base import OptionError
from storage_backends.direct_io import remove_old_probes
from storage_backends.format import BLOCK, FORMAT_LINE, VERSION, ExtentHeader, FormatError, SlotShape, UnknownVersion
from storage_backends.local.extents import ExtentFiles, extent_numbers
from storage_backends.local.files import try_lock
from storage_backends.local.folder import LOCK, POLL_SECONDS, Folder, folder_number
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.residency import NAME, Kind, LogWriter, Record
from storage_backends.local.rules import Rules
from storage_backends.local.shares import Use, shares
from storage_backends.local.use import Told, read_use
from storage_backends.local.writer import Writer

logger = logging.getLogger(__name__)

FORMAT = "FORMAT"
#: Folder numbers in the index that each disk has for its own.
FOLDERS = 1 << 24
#: Evicting or refusing makes a writer one that wants more, for this long.
_WANTING_SECONDS = 10.0
#: Folders of others are not looked through again for room for this long, when they left none.
_CROWDED_SECONDS = 0.2
#: The largest extent that a write makes itself: quick on a disk that is well.
_IN_A_WRITE = 64 << 20


class Seen(NamedTuple):
    """Another writer's folder. held: bytes on disk."""

    number: int
    living: bool
    held: int
    told: Told | None


def look(folders: list[Folder]) -> list[Seen]:
    """What the folders hold and say now. Needs no lock."""
    return [Seen(f.number, f.has_owner(), f.disk_bytes(), read_use(f.path)) for f in folders]


def use_of(told: Told | None, held: int) -> Use:
    return Use(held) if told is None else Use(held, told.hit, told.stored, told.wants_more, told.pinned)


class Directory:
    """Every folder of the tier, one of which may be ours. Not thread-safe: the backend's lock is around it.

    share: bytes that this writer may hold. wanted_at: when it last wanted more (monotonic, s). short: namespaces that
    run out of free slots; wake: set when there is work for supply.py. slow_from: the moment from which what supply.py
    does now counts as slow. helpless_until: when it is worth waking again for a namespace that runs short, after it
    could do nothing for one.
    """

    def __init__(
        self, path: Path, capacity: int, files: ExtentFiles, index: AnyIndex, rules: Rules, lock: threading.RLock,
        base: int = 0, peers: dict[int, Writer] | None = None, seconds: float | None = None,
    ) -> None:  # fmt: skip
        """lock: the tier's, taken only to let the index know of pages. base: of this disk's folder numbers in the
        index, FOLDERS apart for each disk. peers: Writer.peers.

        seconds: of `refresh`, for what is known at once of the pages that are here. Raises OptionError, FormatError.
        """
        self.path = path
        self.capacity = capacity
        self.files = files
        self.index = index
        self.rules = rules
        self.base = base
        self.peers = {} if peers is None else peers
        self.folders: dict[int, Folder] = {}
        self.writer: Writer | None = None
        self.share = capacity
        self.wanted_at = self._crowded_until = self._parted_until = -math.inf
        self.slow_from = math.inf
        self.helpless_until = -math.inf
        self.short: dict[bytes, tuple[Namespace, SlotShape]] = {}
        self.wake = threading.Event()
        self._seen_mtime = -1
        self._open = False
        self._unknown: set[int] = set()
        self._inode = _prepare(path)
        remove_old_probes(path)
        self._lock = lock
        self.refresh(seconds)
        for folder in self.folders.values():
            folder.namespaces()  # an extent of an unknown version refuses now, not at the first write
        self._open = True

    def gone(self) -> bool:
        """Whether the directory that was opened is no longer there (removed, unmounted, replaced)."""
        try:
            return os.stat(self.path / FORMAT).st_ino != self._inode
        except OSError:
            return True

    def refresh(self, seconds: float | None = POLL_SECONDS) -> bool:
        """Notice new folders, and what other writers stored and removed; whether there was anything of that. Takes the
        lock itself, and not while it looks at files.

        seconds: for each folder, roughly, so that a log that must be read anew holds up nobody; `behind` says whether
        there is more. None: no limit.
        """
        with contextlib.suppress(OSError):
            mtime = os.stat(self.path).st_mtime_ns
            if mtime != self._seen_mtime:
                names = sorted(name for name in os.listdir(self.path) if (self.path / name).is_dir())
                with self._lock:
                    self._seen_mtime = mtime
                    self._meet(names)
        with self._lock:
            folders = list(self.folders.values())
        return sum(self._poll(folder, seconds) for folder in folders) > 0

    def _meet(self, names: list[str]) -> None:
        for name in names:
            k = folder_number(name)
            if k is None or self.base + k in self.folders:
                continue
            if k >= FOLDERS:
                logger.warning("%s: no writer has a number that large; not looked at", self.path / name)
            elif self.writer is None or self.writer.number != self.base + k:
                self.folders[self.base + k] = Folder(self.path / name, self.files, self.base, self._lock)

    @property
    def behind(self) -> bool:
        """Whether the last `refresh` left something for the next."""
        return any(folder.behind for folder in self.folders.values())

    def _poll(self, folder: Folder, seconds: float | None) -> bool:
        """Read on in a folder's log. One that cannot be read, or not understood, hides none of the others."""
        try:
            return folder.poll(self.index, seconds)
        except OSError:
            folder.behind = False
        except UnknownVersion as error:
            if not self._open:
                raise  # at the start: this program is too old for the directory
            folder.behind = False
            if folder.number not in self._unknown:
                self._unknown.add(folder.number)
                logger.warning("%s: %s: a newer program writes here; its pages are not seen", folder.path, error)
        return False

    def settle(self, writer: Writer, seen: list[Seen]) -> None:
        """A claimed folder's pages are ours: from now on this process writes it. seen: the other folders."""
        self.folders.pop(writer.number).close()
        self.writer = writer
        self.part(seen)
        self.wake.set()

    def update_share(self) -> None:
        """Set this writer's part of the capacity."""
        self.part(look(list(self.folders.values())))

    def part(self, seen: list[Seen]) -> None:
        """Set this writer's part of what abandoned folders leave, by its use and the others' (shares.py)."""
        assert self.writer is not None
        uses = {self.writer.number: use_of(self.told(), self.writer.disk_bytes)}
        uses |= {other.number: use_of(other.told, other.held) for other in seen if other.living}
        abandoned = sum(other.held for other in seen if not other.living)
        self.share = shares(self.capacity - abandoned, uses)[self.writer.number]

    def told(self) -> Told:
        """What this writer says of itself."""
        writer = self.writer
        assert writer is not None
        wants_more = time.monotonic() - self.wanted_at < _WANTING_SECONDS
        return writer.recent.told(time.time_ns(), writer.disk_bytes, writer.pinned_bytes, wants_more)

    def plan(self, namespace: Namespace, shape: SlotShape, most: int = 1 << 62) -> ExtentHeader | None:
        """Writer.plan within this writer's part and within what is free in fact: others may not have shrunk yet."""
        writer = self.writer
        assert writer is not None
        least = BLOCK + shape.slot_bytes
        if self.share - writer.disk_bytes < least and time.monotonic() >= self._parted_until:
            # That part is as of a while ago, when we may have wanted nothing. What nobody holds is for who wants it.
            self._parted_until = time.monotonic() + _CROWDED_SECONDS
            self.wanted_at = time.monotonic()
            self.update_share()
        if self.share - writer.disk_bytes < least or time.monotonic() < self._crowded_until:
            return None
        share = min(self.share, self.capacity - sum(folder.disk_bytes() for folder in self.folders.values()))
        if share - writer.disk_bytes < least:
            self._crowded_until = time.monotonic() + _CROWDED_SECONDS
        return writer.plan(namespace, shape, share, most)

    def plan_for_now(self, namespace: Namespace, shape: SlotShape) -> ExtentHeader | None:
        """As `plan`, of a small extent that a write makes itself.

        None while the disk is slow to make or delete files: nobody waits for that but supply.py.
        """
        return None if time.monotonic() > self.slow_from else self.plan(namespace, shape, _IN_A_WRITE)

    def want(self, namespace: Namespace, shape: SlotShape) -> None:
        """This namespace runs short of free slots: somebody should see to it before it has none."""
        self.short[namespace.digest] = namespace, shape
        if time.monotonic() >= self.helpless_until:
            self.wake.set()

    def take_abandoned(self, namespace: Namespace, shape: SlotShape) -> bool:
        """Turn the oldest extent of an abandoned folder into one of ours, in O(1); whether there was one.

        Those too small for a page are given up instead.
        """
        for number, folder in sorted(self.folders.items()):
            extents = [number for number in extent_numbers(folder.path) if not self._is_pinned(folder, number)]
            if not extents:
                continue
            lock_fd = try_lock(folder.path / LOCK)
            if lock_fd is None:
                continue
            try:
                for number in extents:
                    if self._take(folder, number, namespace, shape):
                        logger.info("%s has no writer any more: extent %d is ours now", folder.path, number)
                        self.update_share()
                        return True
            except (OSError, FormatError) as error:
                logger.warning("%s: cannot be reclaimed: %s", folder.path, error)
            finally:
                os.close(lock_fd)
        return False

    def _take(self, folder: Folder, number: int, namespace: Namespace, shape: SlotShape) -> bool:
        assert self.writer is not None
        try:
            extent = self.files.open(folder.path, number, write=True)
        except FormatError:
            self.files.retire(folder.path, number)
            return False
        # The lock is ours for a moment: the log may be written, and whoever reads it learns what went.
        log = LogWriter(folder.path / NAME)
        log.append([Record(Kind.EXTENT_GONE, number, time_ns=time.time_ns())])
        log.close()
        folder.poll(self.index)
        if extent.header.extent_bytes < BLOCK + shape.slot_bytes:
            extent.doom()
            self.files.retire(folder.path, number)
            self.wake.set()
            return False
        self.writer.turn(extent, namespace, shape)
        return True

    def _is_pinned(self, folder: Folder, number: int) -> bool:
        if not self.rules.any_pin:
            return False
        try:
            header = self.files.header(folder.path, number)
        except (FormatError, OSError):
            return False
        return self.rules.of(header.namespace, header.description).pin

    def clear(self, namespaces: set[bytes]) -> None:
        """Forget these namespaces: delete our and abandoned folders' extents, disregard other writers' pages."""
        if self.writer is not None:
            for digest in namespaces:
                self.writer.drop_namespace(digest)
        for folder in self.folders.values():
            lock_fd = try_lock(folder.path / LOCK)
            if lock_fd is not None:
                try:
                    self._clear_abandoned(folder, namespaces)
                finally:
                    os.close(lock_fd)
            for digest in namespaces:
                self.index.drop(folder.number, digest)

    def _clear_abandoned(self, folder: Folder, namespaces: set[bytes]) -> None:
        log = LogWriter(folder.path / NAME)
        for number in extent_numbers(folder.path):
            try:
                namespace = self.files.header(folder.path, number).namespace
            except (FormatError, OSError):
                continue
            if namespace in namespaces:
                self.files.retire(folder.path, number)
                log.append([Record(Kind.EXTENT_GONE, number, time_ns=time.time_ns())])
        log.close()
        folder.poll(self.index)

    def close(self, quiet: bool) -> None:
        """quiet: no I/O of ours is in flight."""
        if self.writer is not None:
            self.writer.close(quiet)
        if quiet:
            for folder in self.folders.values():
                folder.close()


def _prepare(path: Path) -> int:
    """Make the directory and its format line, or check it; the line's inode. Raises OptionError."""
    marker = path / FORMAT
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.write(fd, FORMAT_LINE.format(VERSION).encode())
            os.close(fd)
        except FileExistsError:
            line = marker.read_text()
            # Another process may be between making the file and writing the line.
            until = time.monotonic() + 1.0
            while not line and time.monotonic() < until:
                time.sleep(0.01)
                line = marker.read_text()
            if line != FORMAT_LINE.format(VERSION):
                raise OptionError(
                    "path", str(path), f"holds {line.strip()[:80]!r}, and this program writes format {VERSION}",
                    "use the program version that wrote it, or another directory, or delete this one",
                ) from None  # fmt: skip
        return os.stat(marker).st_ino
    except OSError as error:
        raise OptionError(
            "path", str(path), f"cannot be used: {error.strerror}", "name a directory that this user may write"
        ) from error

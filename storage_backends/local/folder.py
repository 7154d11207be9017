"""A writer folder as any process sees it: its extents, opened when first read, and its residency log, tailed.

Belongs here: reading somebody's folder into the index. Does not belong here: changing it (writer.py).
"""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from pathlib import Path

from storage_backends.format import FormatError, UnknownVersion
from storage_backends.local.extents import Extent, ExtentFiles, extent_numbers, extent_path
from storage_backends.local.files import is_locked
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.residency import BLOCK_RECORDS, NAME, LogReader

logger = logging.getLogger(__name__)

LOCK = "lock"
#: What reading a log may take at a time under the lock, and for how long it is then left to others: it is not fair by
#: itself.
POLL_SECONDS, YIELD_SECONDS = 0.002, 0.0005
_PATIENCE_SECONDS = 0.25
#: Records that are taken in between two looks at the clock: about a millisecond's worth.
_PIECE_RECORDS = 1024


def folder_number(name: str) -> int | None:
    """The number in a writer folder's name; None for a name that no writer gives."""
    return int(name[1:]) if re.fullmatch(r"w(0|[1-9][0-9]{0,8})", name) else None


class Folder:
    """One `w<k>`, read only. Not thread-safe, but for `poll`: the backend's lock is around it."""

    def __init__(self, path: Path, files: ExtentFiles, base: int = 0, lock: threading.RLock | None = None) -> None:
        """base: of the disk's folder numbers in the index. lock: the tier's, around the index."""
        self.path = path
        self.number = base + int(path.name[1:])
        self.files = files
        self.extents: dict[int, Extent] = {}
        self.lost: set[int] = set()  # extents that the log names and that are not there
        self.ours = False  # this process appends to the log: nothing in it is news
        self.behind = False  # more of the log is there than was taken in
        self.damaged = 0  # records of the log that did not pass their checksums
        self._lock = lock or threading.RLock()
        self._reading = threading.Lock()
        self._log = LogReader(path / NAME)
        self._forgetting = False

    def has_owner(self) -> bool:
        """Whether a living process writes here."""
        return is_locked(self.path / LOCK)

    def poll(self, index: AnyIndex, seconds: float | None = None, final: bool = False) -> bool:
        """Bring the index up to date with this folder's log; whether there was anything new in it.

        seconds: stop after a piece when so much time went by, `behind`, to be called again; None: go to the end.
        final: nobody writes to the log now, and what its last record lacks will not come; waits for whoever reads it.

        The log is read without the tier's lock, unless the caller holds it. Another thread that reads it is waited for,
        and not for long: it may be that the disk does not answer.
        """
        if not self._reading.acquire(timeout=-1 if final else _PATIENCE_SECONDS):
            return False
        try:
            return not self.ours and self._poll(index, seconds, final)
        finally:
            self._reading.release()

    def _poll(self, index: AnyIndex, seconds: float | None, final: bool) -> bool:
        until = None if seconds is None else time.monotonic() + seconds
        changed, self.behind = False, True
        for block in self._log.blocks(BLOCK_RECORDS if seconds is None else _PIECE_RECORDS):
            changed = True
            with self._lock:
                if not self._forget(index, until):
                    return True
                taken, damaged, gone = index.apply_log(self.number, block.data, block.at_end and not final)
                self._log.took(taken)
                if index.heard is not None:
                    index.heard(self.number, block.data[:taken])
                self.damaged += damaged
                for number in gone:
                    extent = self.extents.pop(number, None)
                    if extent is not None:
                        extent.doom()
            if until is not None and time.monotonic() >= until and not block.at_end:
                return True
        changed |= self._log.restarted or self._forgetting
        with self._lock:
            self.behind = not self._forget(index, until)  # replaced by a log without records
        return changed

    def _forget(self, index: AnyIndex, until: float | None) -> bool:
        """Forget what a log said that was replaced by one that does not continue it; False when time ran out."""
        if self._log.restarted:
            self._log.restarted = False
            self._forgetting = True
            self.damaged = 0
        if not self._forgetting:
            return True
        for number in index.extents(self.number):
            index.trim(self.number, number, bytes(16), 0)
            if until is not None and time.monotonic() >= until:
                return False
        self._forgetting = False
        return True

    def open(self, number: int) -> Extent | None:
        """An extent of which a page is read for the first time; None when it is gone or not readable as one (its pages
        are then misses). Needs no lock, and may take long. It is the caller's until it is in `extents`."""
        try:
            return self.files.open(self.path, number, write=False)
        except FormatError as error:
            logger.warning("%s: %s; its pages count as misses", extent_path(self.path, number), error)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                self.lost.add(number)
            else:
                logger.warning("%s: %s; its pages count as misses", extent_path(self.path, number), error)
        return None

    def namespaces(self) -> dict[bytes, int]:
        """Extents per namespace, from the headers on disk: what this folder is for, log or no log.

        Raises UnknownVersion when an extent is of a format that this program does not know.
        """
        found: dict[bytes, int] = {}
        for number in extent_numbers(self.path):
            try:
                namespace = self.files.header(self.path, number).namespace
                found[namespace] = found.get(namespace, 0) + 1
            except UnknownVersion:
                raise
            except (FormatError, OSError):
                continue
        return found

    def disk_bytes(self) -> int:
        """Bytes of its extents on disk."""
        return self.files.disk_bytes(self.path)

    def close(self) -> None:
        self._log.close()
        for extent in self.extents.values():
            extent.doom()
        self.extents.clear()

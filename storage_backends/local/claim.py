"""Becoming the writer of a folder, without keeping anybody from reading.

Belongs here: which folder, and the steps. Does not belong here: what a writer does then (writer.py), or who asks for
one (writers.py).

    1  on the disk's own thread (supply.py)   lock the folder, read its log to the end, open its extents
    2  on the thread of who wants to write    its pages join the order of eviction (`adopt`), its free slots are counted
    3  under the tier's lock                  Directory.settle

A million pages take about a second, of which the tier's lock is held for milliseconds at a time; a disk that hangs in
the first step holds up nobody but who wants to write, and that one not for ever.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from storage_backends.format import UnknownVersion
from storage_backends.local.directory import Directory, Seen, look
from storage_backends.local.files import try_lock
from storage_backends.local.folder import LOCK, YIELD_SECONDS, Folder
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.writer import RemovedListener, Writer

logger = logging.getLogger(__name__)


class Claim:
    """One attempt to become the writer of a folder of `directory`. Any thread may look at it once it is `done`.

    namespace: that of the pages that are to be written. began: monotonic seconds. seen: the other folders.
    """

    def __init__(self, directory: Directory, namespace: bytes, removed: RemovedListener, lock: threading.RLock) -> None:
        self.began = time.monotonic()
        self.done = threading.Event()
        self.writer: Writer | None = None
        self.error: OSError | None = None
        self.seen: list[Seen] = []
        self._directory, self._namespace, self._removed, self._lock = directory, namespace, removed, lock

    def run(self) -> None:
        try:
            self.writer = self._claim()
            with self._lock:
                others = [f for number, f in self._directory.folders.items() if number != self.writer.number]
            self.seen = look(others)
        except OSError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("%s: no folder can be written", self._directory.path)
            self._fail(OSError(errno.EIO, str(error)))
        finally:
            self.done.set()

    def cancel(self) -> None:
        """It will not be run."""
        if not self.done.is_set():
            self.error = OSError(errno.ENODEV, "the disk is being closed")
            self.done.set()

    def _fail(self, error: OSError) -> None:
        self.error = error
        if self.writer is not None:
            self.writer.close(quiet=True)
            self.writer = None

    def _claim(self) -> Writer:
        """An abandoned folder that holds this namespace, else a new one.

        Abandoned folders of other namespaces are left to whoever comes back for them; their room is taken from the
        oldest when room is short.
        """
        directory = self._directory
        directory.refresh()
        with self._lock:
            folders = dict(directory.folders)
        idle = [(folder.namespaces().get(self._namespace, 0), number) for number, folder in folders.items()]
        for count, number in sorted(idle, key=lambda pair: (-pair[0], pair[1])):
            if count and (writer := self._try(folders[number])):
                return writer
        number = directory.base
        while True:
            if number not in folders and (writer := self._make(number)):
                return writer
            number += 1

    def _make(self, number: int) -> Writer | None:
        directory = self._directory
        with self._lock:
            if number in directory.folders:  # somebody else was faster
                return None
            # Known from the beginning, so that nobody takes it for another's.
            path = directory.path / f"w{number - directory.base}"
            folder = Folder(path, directory.files, directory.base, self._lock)
            directory.folders[number] = folder
        writer = None
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            writer = self._try(folder)
        finally:
            if writer is None and not folder.path.exists():
                with self._lock:
                    del directory.folders[number]
        return writer

    def _try(self, folder: Folder) -> Writer | None:
        """None when it has an owner, or is a newer program's."""
        directory = self._directory
        if folder.has_owner():
            return None
        lock_fd = try_lock(folder.path / LOCK)
        if lock_fd is None:
            return None
        try:
            # What the folder's last owner wrote is read to its end now that the lock is ours.
            return Writer(
                folder, lock_fd, directory.index, directory.rules, directory.peers, self._removed, self._lock
            )  # fmt: skip
        except BaseException as error:
            os.close(lock_fd)
            folder.ours = False
            if not isinstance(error, UnknownVersion):
                raise
            logger.warning("%s: %s: left to a newer program", folder.path, error)
            return None


def adopt(index: AnyIndex, lock: threading.RLock, folders: Sequence[int]) -> None:
    """The pages of these folders are ours to evict: Index.adoption, in steps. Call without the lock."""
    steps: Any = index  # each index knows its own adoptions
    adoption = steps.adoption(*folders)
    _in_turns(lock, partial(steps.gather, adoption))
    adoption.sort()
    _in_turns(lock, partial(steps.adopt, adoption))


def _in_turns(lock: threading.RLock, step: Callable[[], bool]) -> None:
    while True:
        with lock:
            if step():
                return
        time.sleep(YIELD_SECONDS)

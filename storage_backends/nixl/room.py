"""How much lies in a directory of page files, and what goes when that is too much: what was used longest ago.

Belongs here: counting and removing. Does not belong here: whose pages they are, or how they are read.

Several processes may use a directory. Each counts what it wrote since it last looked, looks again (a walk over all
files, on a thread of its own) when that has become a twentieth of the capacity, and removes what was used longest ago
where there is too much. So the directory can be over its capacity by a twentieth for each further process, for as
long as a walk takes. A page's time of use is its file's mtime.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

_PART = 20
#: Files that one walk remembers to remove, and seconds that a writer waits for one.
_KNOWN = 1 << 16
_WAIT = 0.5
_LOOKS = 2
#: Files without a page that are kept for the next ones.
_SPARES = 32
#: A walk after every so many seconds, for what other processes wrote.
_EVERY = 60.0


class Taken(IntEnum):
    """What a writer got: no room, room for a file, or a file of that size that another page had."""

    NOTHING = 0
    ROOM = 1
    FILE = 2


class Room:
    """capacity: bytes of all files below `root`. gone: hears of every file removed here to make room.

    passing: the folder of files on their way: they count, and are nobody's to remove.
    """

    def __init__(self, root: Path, capacity: int, passing: Path, gone: Callable[[str], None]) -> None:
        self._root, self._capacity, self._gone = root, capacity, gone
        self._passing = str(passing)
        self._used = 0  # of all files, as far as we know
        self._since = 0  # taken since the last look began
        self._coming = 0  # taken, and not yet files that a look would see
        self._oldest: deque[tuple[float, int, str]] = deque()
        self._spares: list[tuple[int, str]] = []  # files of pages that went before anybody needed their room
        self._lock = threading.Lock()
        self._looked = threading.Condition(self._lock)
        self._looks = 0
        self._too_slow = -1  # the look that somebody waited for in vain: nobody else waits
        self._wanted = threading.Event()
        self._closing = False
        self.evicted = 0
        self._thread = threading.Thread(target=self._run, name="nixl-room", daemon=True)
        self._wanted.set()
        self._thread.start()

    @property
    def used(self) -> int:
        return self._used

    def take(self, size: int, name: str = "") -> Taken:
        """Room for a file of `size` bytes, by removing others if need be. name: what one of exactly that size that goes
        is called from now on, where there is one; empty: it is removed like the others."""
        if name and self._spare(size, name):
            return Taken.FILE
        with self._lock:
            if not self._looks:
                self._wait_for_a_look()
            victims = self._victims(size)
            for _ in range(_LOOKS):  # what came during the first may have been counted twice
                if victims is not None or not self._wait_for_a_look():
                    break
                victims = self._victims(size)
            if victims is None or not self._looks:
                return Taken.NOTHING
            self._used += size
            self._since += size
            self._coming += size
            if self._since > self._capacity // _PART:
                self._wanted.set()
        taken = Taken.ROOM
        for path, length in victims:
            if name and length == size and taken is Taken.ROOM and _renamed(path, name):
                taken = Taken.FILE
            elif not (name and length == size and self._keep(path, length)):
                try:
                    os.unlink(path)
                except OSError:
                    continue  # somebody else's victim too
            if not path.startswith(self._passing):
                self.evicted += 1
                self._gone(path)
        return taken

    def _spare(self, size: int, name: str) -> bool:
        """Whether there was a spare file of this size, and it is called so now."""
        with self._lock:
            found = next((spare for spare in self._spares if spare[0] == size), None)
            if found is None:
                return False
            self._spares.remove(found)
            self._coming += size
        if _renamed(found[1], name):
            return True
        with self._lock:
            self._coming -= size
            self._used -= size
        return False

    def _keep(self, path: str, length: int) -> bool:
        """Whether a file that goes is kept for the next page of its size: more than had to go went, since what was
        written during a look may have been counted twice."""
        spare = f"{self._passing}/{os.urandom(12).hex()}.spare"
        if len(self._spares) >= _SPARES or self._closing or not _renamed(path, spare):
            return False
        with self._lock:
            self._spares.append((length, spare))
            self._used += length
        return True

    def made(self, size: int) -> None:
        """What was taken is a file of that size now."""
        with self._lock:
            self._coming -= size

    def give(self, size: int) -> None:
        """A file of this size is gone again."""
        with self._lock:
            self._used -= size

    def remove(self, path: str) -> bool:
        """Remove one file; whether it was there."""
        try:
            size = os.stat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            return False
        self.give(size)
        return True

    def look(self) -> None:
        """Walk over the directory soon."""
        self._wanted.set()

    def close(self) -> None:
        self._closing = True
        self._wanted.set()
        self._thread.join(2)
        with self._lock:
            spares, self._spares = self._spares, []
        for _, path in spares:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _wait_for_a_look(self) -> bool:
        """Whether one was finished within a moment. Under the lock."""
        looks = self._looks
        self._wanted.set()
        if self._too_slow == looks:
            return False
        if self._looked.wait_for(lambda: self._looks > looks, _WAIT):
            return True
        self._too_slow = looks
        return False

    def _victims(self, size: int) -> list[tuple[str, int]] | None:
        """(path, bytes) of what has to go for `size` more, forgotten here already; None: not enough is known. Under the
        lock."""
        victims: list[tuple[float, int, str]] = []
        while self._used + size > self._capacity and self._spares:
            length, path = self._spares.pop(0)
            victims.append((0.0, length, path))
            self._used -= length
        while self._used + size > self._capacity and self._oldest:
            time, length, path = self._oldest.popleft()
            try:
                if os.stat(path).st_mtime > time:
                    continue  # used since
            except OSError:
                continue  # gone; the next look tells how much that was
            victims.append((time, length, path))
            self._used -= length
        if self._used + size <= self._capacity:
            return [(path, length) for _, length, path in victims]
        self._oldest.extendleft(reversed(victims))
        self._used += sum(length for _, length, _ in victims)
        return None

    def _run(self) -> None:
        while not self._closing:
            self._wanted.wait(_EVERY)
            self._wanted.clear()
            if self._closing:
                return
            with self._lock:
                self._since = 0
                coming = self._coming
            used, oldest = self._walk()
            with self._lock:
                self._used = used + coming + self._since  # what came meanwhile may count twice, until the next look
                self._oldest = deque(oldest)
                self._looks += 1
                self._looked.notify_all()

    def _walk(self) -> tuple[int, list[tuple[float, int, str]]]:
        """Bytes of all files, and (mtime, bytes, path) of those to go first."""
        used, oldest = 0, []
        folders = [str(self._root)]
        while folders and not self._closing:
            folder = folders.pop()
            with contextlib.suppress(OSError), os.scandir(folder) as entries:  # gone meanwhile, or not ours to see
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    found = entry.stat(follow_symlinks=False)
                    used += found.st_size
                    if not entry.path.startswith(self._passing):
                        oldest.append((found.st_mtime, found.st_size, entry.path))
            if len(oldest) >= 2 * _KNOWN:
                oldest = heapq.nsmallest(_KNOWN, oldest)
        return used, heapq.nsmallest(_KNOWN, oldest)


def _renamed(path: str, name: str) -> bool:
    try:
        os.rename(path, name)
    except OSError:
        return False
    return True

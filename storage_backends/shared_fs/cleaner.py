"""Room on the share, and the end of old segments: what any number of hosts may do at the same time.

Belongs here: finding out what is there, and removing it. Does not belong here: what goes first (cleaning.py), or what
that means to readers here (the backend hears of it).

A process that has a capacity or a ttl adds up names (a segment's size is in its name): all of them once, later the
recent buckets, and another old one each time. A segment counts as used when its bucket began; one that is next to go is
looked at, and stays when its mtime says that it was used since (readers touch what they read). Removing what another
host has just removed is no error. Two hosts that make room at once may both be right and both too late, so the share
may hold one segment more than its capacity for every segment that is being written.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from storage_backends.shared_fs.cleaning import Known, Ledger
from storage_backends.shared_fs.directory import bucket_ns, buckets, is_recent, namespaces, to_list
from storage_backends.shared_fs.options import SKEW_SECONDS
from storage_backends.shared_fs.segment import TEMPORARY, SegmentName
from storage_backends.shared_fs.share import Share

_NS = 10**9
#: Seconds without a write after which a temporary is nobody's.
ORPHAN_SECONDS = 2 * SKEW_SECONDS
_UPKEEP_SECONDS = 60.0
_AGAIN_SECONDS = 1.0


class Cleaner:
    """capacity, ttl: 0 for none. gone: called with the name of each segment that is found to be gone. Thread-safe."""

    def __init__(
        self, share: Share, capacity: int, ttl: float, gone: Callable[[str], None], failed: Callable[[OSError], None]
    ) -> None:
        self._share, self._capacity, self._ttl = share, capacity, ttl
        self._gone, self._failed = gone, failed
        self._ledger = Ledger()
        self._listed: set[str] = set()
        self._turn = 0
        self._lock = threading.Lock()
        self._surveyed = threading.Event()
        self._stop = threading.Event()
        self.removed = self.orphans = 0
        if capacity or ttl:
            threading.Thread(target=self._run, name="hicache-share-clean", daemon=True).start()

    @property
    def used(self) -> int:
        """Bytes on the share when they were last added up; 0 where nobody does."""
        return self._ledger.used

    def make_room(self, need: int) -> None:
        """Remove old segments until `need` more bytes keep the capacity. OSError (ENOSPC) when that cannot be."""
        if not self._capacity:
            return
        if not self._surveyed.wait(self._share.timeout):
            raise OSError(errno.ENOSPC, "what is on the share is still being added up")
        with self._lock:
            self._survey()
            self._shrink(need)
            if self._ledger.used + need > self._capacity:
                raise OSError(errno.ENOSPC, "nothing on the share can be removed")

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._share.problem:
                    self._share.prepare()
                with self._lock:
                    self._survey()
                    self._surveyed.set()
                    self._shrink(0)
                self._sweep()
            except OSError as error:
                self._failed(error)
                self._stop.wait(_AGAIN_SECONDS)
            else:
                self._stop.wait(_UPKEEP_SECONDS)

    def _survey(self) -> None:
        """Add up what may have changed since the last time."""
        self._turn += 1
        names = buckets(self._share.listed())
        self._listed &= set(names)
        again = to_list(names, self._listed, self._share.now_ns(), self._turn)
        found: set[str] = set()
        for bucket in again:
            for namespace in namespaces(self._share.listed(bucket)):
                found.add(f"{bucket}/{namespace}")
                self._list(f"{bucket}/{namespace}", bucket_ns(bucket))
            self._listed.add(bucket)
        asked = set(again)
        for directory in self._ledger.directories:
            bucket = directory.partition("/")[0]
            if bucket not in self._listed or (bucket in asked and directory not in found):
                self._enter(directory, {}, 0)

    def _list(self, directory: str, began_ns: int) -> None:
        sizes: dict[str, int] = {}
        unfinished = 0
        for name in self._share.listed(directory):
            parsed = SegmentName.parse(name)
            if parsed is not None:
                sizes[name] = parsed.size
            elif name.endswith(TEMPORARY):
                unfinished += self._temporary(f"{directory}/{name}")
        self._enter(directory, sizes, began_ns, unfinished)

    def _enter(self, directory: str, sizes: dict[str, int], began_ns: int, unfinished: int = 0) -> None:
        for name in self._ledger.enter(directory, sizes, began_ns, unfinished):
            self._gone(name)

    def _temporary(self, path: str) -> int:
        """Bytes of a segment that is being written; removed, and 0, when nobody does any more."""
        status = self._share.status(path)
        if status is None:
            return 0
        if status.st_mtime_ns >= self._share.now_ns() - ORPHAN_SECONDS * _NS:
            return status.st_size
        self.orphans += self._share.unlink(path)
        return 0

    def _shrink(self, need: int) -> None:
        """Remove what is too old, and what there is no room for."""
        expired = self._share.now_ns() - int(self._ttl * _NS) if self._ttl else None
        for victim in self._ledger.victims(lambda: self._excess(need), expired, self._last_use):
            try:
                self.removed += self._share.unlink(f"{victim.directory}/{victim.name}")
            except PermissionError as error:  # another user's: it must not keep the others from going
                self._failed(error)
                continue
            self._gone(victim.name)
            if self._stop.is_set():
                return

    def _excess(self, need: int) -> int:
        return self._ledger.used + need - self._capacity if self._capacity else 0

    def _last_use(self, known: Known) -> int | None:
        status = self._share.status(f"{known.directory}/{known.name}")
        return None if status is None else status.st_mtime_ns

    def _sweep(self) -> None:
        """Remove directories that are empty and get no more segments."""
        now = self._share.now_ns()
        with self._lock:
            full = {directory.partition("/")[0] for directory in self._ledger.directories}
        for bucket in buckets(self._share.listed()):
            if self._stop.is_set() or is_recent(bucket, now):
                return
            if bucket not in full:
                for namespace in namespaces(self._share.listed(bucket)):
                    self._share.remove_empty(bucket, namespace)
                self._share.remove_empty(bucket)

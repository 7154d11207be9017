"""The residency log of a folder that this process writes: continued at claim, appended to, compacted in the background.

Belongs here: when a log is too long, and how a shorter one takes its place while both the writer and its readers go
on. Does not belong here: what a log looks like (residency.py), or the thread that compacts (upkeep.py).

A compaction goes through these steps; whatever ends it, one sound log lies under the log's name:

    1  no flush meanwhile   the pages at this moment, and `since`: where the log ends at this moment
    2                       a new file: a record per page, a piece at a time; then all from `since` on
    3                       fsync, so that a power cut after the rename finds the new log whole
    4  no flush meanwhile   the last few records; from here on every record goes to both files, to the new one first
    5                       rename
    6  no flush meanwhile   the old file is let go

Records that wait to be flushed at step 1 are summed up and come once more: whoever reads them in order ends with the
same pages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.residency import NAME, RECORD_BYTES, Head, LogWriter, Record, encode

logger = logging.getLogger(__name__)

#: A log of fewer records is left as it is, whatever it names.
_FLOOR = 64 << 10
#: Pages that are written down at a time under the lock.
_PIECE = 2048
#: What may be left to copy under the lock (bytes).
_REST = 64 << 10
_COPY = 1 << 20
_RETRY_SECONDS = 60.0
_CLOSE_SECONDS = 0.5


class OwnLog:
    """Records wait in memory until `flush`, so that nobody waits for the disk while the tier's lock is held. That lock
    is around `append`, which gives records their order; it is around nothing else here.

    errors: appends that failed. compactions: that came to their end.
    """

    def __init__(self, folder: Path, readable: bool = True) -> None:
        """Goes on with the log that is there, if it is `readable`. A file that is no residency log is replaced.

        Raises UnknownVersion, OSError.
        """
        self.path = folder / NAME
        if not readable:
            self.path.unlink(missing_ok=True)
        self._fresh_path = self.path.with_suffix(".new")
        self._fresh_path.unlink(missing_ok=True)  # of a compaction that a crash ended
        self._log = LogWriter(self.path)
        if self._log.head is None:
            self._log.close()
            self.path.unlink()
            self._log = LogWriter(self.path)
        self._mirror: LogWriter | None = None
        self._waiting: deque[bytes] = deque()
        self._io = threading.Lock()  # around the files; whoever holds it may take the tier's lock, and not vice versa
        self._lacking = self._unlike = self._closed = False
        self._rest_until = 0.0
        self.errors = self.compactions = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self._log.position

    @property
    def records(self) -> int:
        return self._log.records

    def lacks(self, readers_too: bool) -> None:
        """The log is not what the index is: to be written anew soon. readers_too: who reads it has what we have."""
        self._lacking = True
        self._unlike |= not readers_too

    def append(self, records: list[Record] | bytes) -> None:
        if records:
            self._waiting.append(records if isinstance(records, bytes) else encode(records))

    def flush(self) -> None:
        """Write what waits; a page may be called stored once its record is here. Without the tier's lock.

        A failure is counted, and said once: the index is right all the same, and the next start scans headers.
        """
        with self._io:  # also where nothing waits: another thread may be writing what this one appended
            if self._waiting:
                self._write_waiting()

    def _write_waiting(self) -> None:
        records = b"".join([self._waiting.popleft() for _ in range(len(self._waiting))])
        try:
            # The new one first: what a reader has seen in the old one, it must find in the new one.
            if self._mirror is not None:
                self._mirror.append(records)
            self._log.append(records)
        except OSError as error:
            self.errors += 1
            self.lacks(readers_too=False)
            if self.errors == 1:
                logger.warning("%s: %s (said once)", self.path, error)

    def due(self, pages: int) -> bool:
        """Whether it should be compacted now; pages: that live in it."""
        too_long = self._lacking or self._log.records > 2 * pages + _FLOOR
        return too_long and time.monotonic() >= self._rest_until

    def compact(self, index: AnyIndex, folder: int, lock: threading.RLock) -> Generator[None, None, None]:
        """Write the log anew, a step at each turn. lock: the tier's; call without it. To be run to its end, or closed.

        One at a time. A failure leaves the old log, is said, and is tried again a minute later at the earliest.
        """
        with self._io, lock:
            self._rest_until = time.monotonic() + _RETRY_SECONDS
            errors, before, since = self.errors, self._log.head, self._log.position
            old = os.dup(self._log.fd)
            pages: Any = index.snapshot(folder)  # of that index, whichever it is
        fresh: LogWriter | None = None
        replaced = False
        try:
            pages.sort()
            self._fresh_path.unlink(missing_ok=True)
            fresh = LogWriter(self._fresh_path)
            for start in range(0, len(pages), _PIECE):
                with lock:
                    records = index.snapshot_records(pages, start, _PIECE)
                fresh.append(records)
                yield
            if before is not None and not self._unlike:
                fresh.write_head(Head(os.urandom(16), before.id, since, fresh.position))
            copied, synced = since, False
            while True:
                with self._io:
                    end = self._log.position
                    if self._closed or self.errors != errors:
                        return
                    if synced and end - copied <= _REST:
                        _copy(old, copied, end, fresh)
                        self._mirror = fresh
                        break
                synced = end - copied <= _REST
                copied = _copy(old, copied, end, fresh)
                yield
                if synced:
                    fresh.sync()
                    yield
            yield
            if self.errors == errors:
                os.replace(self._fresh_path, self.path)
                replaced = True
                yield
        except OSError as error:
            logger.warning("%s: cannot be compacted now: %s", self.path, error)
        finally:
            os.close(old)
            with self._io:
                self._mirror = None
                if replaced and fresh is not None and not self._closed:
                    self._log.close()
                    self._log, fresh = fresh, None
                    self.compactions += 1
                    if self.errors == errors:
                        self._lacking = self._unlike = False
                        self._rest_until = 0.0
            if fresh is not None:
                fresh.close()
            if not replaced:
                with contextlib.suppress(OSError):
                    self._fresh_path.unlink()

    def close(self) -> None:
        """Write what waits, unless the disk does not answer."""
        self._closed = True
        if self._io.acquire(timeout=_CLOSE_SECONDS):
            try:
                self._write_waiting()
                self._log.close()
            finally:
                self._io.release()


def _copy(old: int, start: int, end: int, fresh: LogWriter) -> int:
    """Append these bytes of the old log to the new one; `end`. OSError when they are not there."""
    while start < end:
        data = os.pread(old, min(_COPY, end - start), start)
        if len(data) < RECORD_BYTES:
            raise OSError("the log has lost records")
        data = data[: len(data) // RECORD_BYTES * RECORD_BYTES]
        fresh.append(data)
        start += len(data)
    return start

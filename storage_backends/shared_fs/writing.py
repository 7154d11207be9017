"""Segments that are being written: pages join the open one of their namespace until it is full or old enough.

Belongs here: the life of a segment from its temporary name to its own. Does not belong here: the pages' bytes
(slots.py), room for it (cleaner.py), or outcomes.

    reserve -> (the caller writes the slots) -> land -> ... -> seal -> index, close, rename

A page can be read by this process once it has landed, and by others once its segment has its name. The file is closed
before it is renamed: on NFS that is when all of it is on the server, so whoever sees the name sees the bytes. What a
crash of the server itself loses, without `fsync`, fails its checksums and is a miss.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from storage_backends.buffers import OwnedMemory
from storage_backends.format import round_up
from storage_backends.shared_fs.catalog import Catalog, Segment
from storage_backends.shared_fs.directory import bucket_of
from storage_backends.shared_fs.segment import ID_BYTES, TEMPORARY, SegmentIndex
from storage_backends.shared_fs.share import Share
from storage_backends.shared_fs.slots import Slots
from storage_backends.vectored import move

_ATTEMPTS = 4


#: Bytes of a file for which the share is asked at once, where it can be.
_STEP_BYTES = 32 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class OpenSegment:
    """taken: slots that were handed out. flying: transfers that have not landed. entries: slot to (key, parent)."""

    def __init__(self, segment: Segment, slots: Slots, fd: int, room: int) -> None:
        self.segment, self.slots, self.fd, self.room = segment, slots, fd, room
        self.taken = self.flying = 0
        self.sealed = False
        self.entries: dict[int, tuple[bytes, bytes]] = {}
        self.began = time.monotonic()
        self._allocated = 0
        self._allocating: threading.Lock | None = threading.Lock()

    @property
    def coming(self) -> int:
        """Bytes that it will have and the file may not have yet."""
        size = self.slots.slot_bytes
        there = max(len(self.entries) * size, self._allocated)
        return max(0, (self.taken if self.sealed else self.room) * size - there)

    def allocate(self, slots: int) -> None:
        """Have the share find room for so many slots before they are written: several threads may then write to the
        file at once, where a file that grows takes one at a time. What cannot be had is left to the writes. Blocks."""
        lock, size = self._allocating, self.slots.slot_bytes
        if lock is None or slots * size <= self._allocated:
            return
        with lock:
            if slots * size <= self._allocated:
                return
            end = min(self.room * size, round_up(slots * size, _STEP_BYTES))
            more = end - self._allocated
            space = os.fstatvfs(self.fd)
            # Not on a share that is nearly full: others may need what this file may not.
            plenty = space.f_bavail * space.f_frsize > 4 * more
            if plenty and not _libc.fallocate(self.fd, 0, ctypes.c_int64(self._allocated), ctypes.c_int64(more)):
                self._allocated = end
            else:
                self._allocating = None


class SegmentWriter:
    """make_room: called before a segment of so many bytes is begun; OSError when there is none. done: called with each
    segment that has its name. Thread-safe."""

    def __init__(
        self, share: Share, catalog: Catalog, segment_bytes: int, fsync: bool, make_room: Callable[[int], None],
        done: Callable[[Segment], None],
    ) -> None:  # fmt: skip
        self._share, self._catalog, self._fsync, self._make_room = share, catalog, fsync, make_room
        self._segment_bytes, self._done = segment_bytes, done
        self._open: dict[bytes, OpenSegment] = {}
        self._unfinished: set[OpenSegment] = set()
        self._born = 0
        self._lock = threading.Lock()
        self._beginning = threading.Lock()
        self.published = self.lost = 0

    def reserve(self, slots: Slots, pages: int) -> tuple[OpenSegment, int, int]:
        """Up to so many slots of the namespace's open segment: it, the first of them, how many. `land` must follow.

        OSError when no segment can be begun.
        """
        namespace = slots.form.namespace.digest
        while True:
            with self._lock:
                current = self._open.get(namespace)
                if current is not None:
                    first = current.taken
                    count = min(pages, current.room - first)
                    current.taken += count
                    current.flying += 1
                    if current.taken == current.room:
                        current.sealed = True
                        del self._open[namespace]
                    return current, first, count
            with self._beginning:
                with self._lock:
                    if namespace in self._open:
                        continue
                begun = self._begin(slots)
                with self._lock:
                    self._open[namespace] = begun

    def land(self, current: OpenSegment, entries: dict[int, tuple[bytes, bytes]], whole: bool = True) -> None:
        """A transfer has ended: slot to (key, parent) of what it wrote. whole: not so: the file takes no more."""
        with self._lock:
            current.entries.update(entries)
            current.flying -= 1
            if not whole and not current.sealed:
                self._seal(current)
            last = current.sealed and not current.flying
        if last:
            with self._share.call():
                self._publish(current)

    def due(self, older_than: float) -> list[bytes]:
        """Namespaces whose open segment was begun so many seconds ago."""
        before = time.monotonic() - older_than
        with self._lock:
            return [name for name, current in self._open.items() if current.began <= before]

    def seal(self, namespace: bytes) -> None:
        """The open segment of a namespace takes no more pages; others see it when its last transfer has landed."""
        with self._lock:
            current = self._open.get(namespace)
            if current is None:
                return
            self._seal(current)
            last = not current.flying
        if last:
            with self._share.call():
                self._publish(current)

    def _seal(self, current: OpenSegment) -> None:
        current.sealed = True
        self._open.pop(current.segment.namespace, None)

    def _begin(self, slots: Slots) -> OpenSegment:
        room = max(1, self._segment_bytes // slots.slot_bytes)
        self._share.check_mounted()
        with self._lock:
            coming = sum(current.coming for current in self._unfinished)
        self._make_room(room * slots.slot_bytes + coming)
        ident = os.urandom(ID_BYTES)
        name = ident.hex() + TEMPORARY
        digest = slots.form.namespace.digest
        directory = self._share.root / bucket_of(self._share.now_ns()) / digest.hex()
        path = str(directory / name)
        fd = self._create(directory, path)
        try:
            with self._share.call():
                stamp = os.fstat(fd).st_mtime_ns
        except OSError:
            os.close(fd)
            raise
        self._share.learn_time(stamp)
        self._born = max(self._born + 1, stamp)
        segment = Segment(digest, name, path, (self._born, ident), mine=True)
        segment.touched = time.monotonic()
        begun = OpenSegment(segment, slots, fd, room)
        with self._lock:
            self._unfinished.add(begun)
        return begun

    def _create(self, directory: Path, path: str) -> int:
        for attempt in range(_ATTEMPTS):
            try:
                return self._share.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
            try:
                with self._share.call():
                    self._share.make_directory(directory)
            except FileNotFoundError:  # somebody removes empty ones
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _publish(self, current: OpenSegment) -> None:
        """Index, close, rename. When it fails, the segment's pages are gone."""
        segment = current.segment
        temporary = segment.path
        kept = {slot: entry for slot, entry in current.entries.items() if segment.pages.get(entry[0]) == slot}
        try:
            if not kept:
                raise _Empty
            name = str(self._finish(current, kept).name)
            final = str(Path(temporary).with_name(name))
            fd, current.fd = current.fd, -1
            os.close(fd)  # an error of a delayed write is said here
            self._catalog.rename(segment, name)
            segment.paths = (temporary, final)
            os.rename(temporary, final)
            segment.paths = (final,)
            self.published += 1
            self._done(segment)
        except (OSError, _Empty) as error:
            self._catalog.drop(segment)
            if current.fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(current.fd)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, OSError):
                self.lost += 1
                raise
        finally:
            with self._lock:
                self._unfinished.discard(current)

    def _finish(self, current: OpenSegment, kept: dict[int, tuple[bytes, bytes]]) -> SegmentIndex:
        """Write the index. On a share that is full the last page makes room for it."""
        index = self._index(current, kept)
        try:
            self._write_index(current, index)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or len(kept) == 1:
                raise
            key, _ = kept.pop(max(kept))
            self._catalog.forget(current.segment.namespace, [key], current.segment)
            index = self._index(current, kept)
            self._write_index(current, index)
        return index

    def _index(self, current: OpenSegment, kept: dict[int, tuple[bytes, bytes]]) -> SegmentIndex:
        at = sorted(kept)
        born, ident = current.segment.born
        namespace = current.slots.form.namespace
        return SegmentIndex(
            namespace.digest, ident, born, current.slots.slot_bytes, namespace.layout.payload_bytes,
            b"".join(kept[slot][0] for slot in at), b"".join(kept[slot][1] for slot in at), np.array(at, np.int64),
        )  # fmt: skip

    def _write_index(self, current: OpenSegment, index: SegmentIndex) -> None:
        raw, name = index.encode(), index.name
        os.ftruncate(current.fd, name.index_at)  # what is behind the last good slot, such as half of one
        memory = OwnedMemory(len(raw))
        memory.view[: len(raw)] = raw
        moved = move(current.fd, name.index_at, np.array([[memory.address, len(raw)]], np.uint64), True)
        if moved < len(raw):
            code = -moved if moved < 0 else errno.ENOSPC
            raise OSError(code, os.strerror(code))
        if self._fsync:
            os.fsync(current.fd)


class _Empty(Exception):
    """A segment without pages."""

"""Extents that are made before they are needed and deleted after, so that no write and no lookup waits for either.

Belongs here: what is done in the background for one directory's writer, and in which order. Does not belong here: how
(writer.py, extents.py), what a write does itself (room.py), or how much a writer may hold (shares.py).

Making and deleting a large file can take seconds, and so can a first look at a folder that becomes ours (claim.py).
So each is planned under the tier's lock, done without it, and finished under it. In order: an extent for a namespace
that runs short, a new one or one of a colder namespace; an extent less where the writer holds more than its part; the
files of extents that were given up; pages that hang below those that went with an extent.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from storage_backends.format import ExtentHeader
from storage_backends.local.claim import Claim
from storage_backends.local.directory import Directory, look
from storage_backends.local.extents import Extent, retired_numbers
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.use import write_use
from storage_backends.local.writer import RemovedListener, Writer

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK_SECONDS = 0.2
SHARE_SECONDS = 2.0
#: What takes longer than this is slow, and writes do not try it themselves.
PATIENCE_SECONDS = 0.05
#: A namespace that nobody touched for this long, while others were, gives its extents to whoever runs short.
COLD_SECONDS = 600.0
#: Orphans that go while the lock is held, and how often that is done in one round.
_SWEPT, _SWEEPS = 256, 16


class Supply:
    """One thread for one directory. index, directory: under `lock`. claiming: an attempt to become its writer, until
    somebody has seen to what came of it."""

    def __init__(self, directory: Directory, index: AnyIndex, lock: threading.RLock) -> None:
        self._directory = directory
        self._index = index
        self._lock = lock
        self._closing = False
        self.claiming: Claim | None = None
        self._touched: dict[bytes, tuple[int, float]] = {}
        self.thread = threading.Thread(target=self._run, name="hicache-supply", daemon=True)
        self.thread.start()

    def claim(self, namespace: bytes, removed: RemovedListener) -> Claim:
        """Become the folder's writer: the attempt that is under way, or else a new one. Under the lock."""
        if self.claiming is None:
            self.claiming = Claim(self._directory, namespace, removed, self._lock)
            self._directory.wake.set()
        return self.claiming

    def close(self) -> None:
        """Begin nothing more. The thread ends when what it does now is done; `thread.join` waits for that."""
        self._closing = True
        self._directory.wake.set()

    def _run(self) -> None:
        directory, last_share, failed = self._directory, -math.inf, False
        while not self._closing:
            directory.wake.wait(TICK_SECONDS)
            directory.wake.clear()
            try:
                if self.claiming is not None and not self.claiming.done.is_set():
                    self.claiming.run()
                if directory.writer is None or directory.gone():
                    continue
                directory.writer.log.flush()
                if time.monotonic() - last_share > SHARE_SECONDS:
                    last_share = time.monotonic()
                    self._share()
                while not self._closing and self._step(directory.writer):
                    pass
                for _ in range(_SWEEPS):
                    with self._lock:
                        if self._closing or not directory.writer.sweep(_SWEPT):
                            break
            except Exception:
                if not failed:
                    failed = True
                    logger.exception("local tier %s: background work failed (said once)", directory.path)
        if self.claiming is not None:
            self.claiming.cancel()

    def _share(self) -> None:
        """Say how much we use, see how much the others do, and clean up behind those that are no more."""
        directory = self._directory
        with self._lock:
            folders = list(directory.folders.values())
        seen = look(folders)
        with self._lock:
            if directory.writer is not None:
                directory.writer.drop_deleted()
            directory.part(seen)
            told = directory.told()
            self._note_touches()
        assert directory.writer is not None
        write_use(directory.writer.path, told)
        # What crashes left half deleted.
        ours = set(retired_numbers(directory.writer.path)) - directory.writer.leaving.keys()
        left = [(directory.writer.path, number) for number in ours]
        for folder, other in zip(folders, seen, strict=True):
            left += [(folder.path, number) for number in retired_numbers(folder.path) if not other.living]
        for path, number in left:
            self._patiently(partial(directory.files.delete, path, number))

    def _step(self, writer: Writer) -> bool:
        """Do one thing; whether there may be more to do."""
        with self._lock:
            if self._closing:
                return False
            header = self._plan(writer)
            if header is None:
                if writer.shrink(self._directory.share):
                    writer.sweep(_SWEPT)
                going = next((extent for extent in writer.leaving.values() if extent.fd < 0), None)
        if header is not None:
            self._make(writer, header)
            return True
        if going is not None:
            return self._delete(writer, going)
        return False

    def _plan(self, writer: Writer) -> ExtentHeader | None:
        """What to make for a namespace that runs short; others' extents are taken on the spot."""
        directory = self._directory
        for digest, (namespace, shape) in list(directory.short.items()):
            if writer.is_short(digest):
                header = directory.plan(namespace, shape)
                if header is not None:
                    return header
                giver = self._giver(writer, digest)
                if giver is not None and writer.reclaim(giver, namespace, shape):
                    continue
                directory.helpless_until = time.monotonic() + TICK_SECONDS
            del directory.short[digest]
        return None

    def _make(self, writer: Writer, header: ExtentHeader) -> None:
        try:
            extent = self._patiently(partial(writer.create, header))
        except OSError as error:
            with self._lock:
                writer.unmade(header, error)
                self._directory.short.pop(header.namespace, None)
            return
        with self._lock:
            if self._closing:
                extent.doom()  # an empty extent, for whoever comes next
            else:
                writer.made(extent)

    def _delete(self, writer: Writer, extent: Extent) -> bool:
        try:
            self._patiently(partial(writer.delete, extent))
        except OSError as error:
            logger.warning("%s: cannot be deleted: %s; tried again", extent.path, error)
            return False
        with self._lock:
            writer.deleted(extent)
        return True

    def _patiently(self, act: Callable[[], T]) -> T:
        """Without the lock; the directory knows since when."""
        self._directory.slow_from = time.monotonic() + PATIENCE_SECONDS
        try:
            return act()
        finally:
            self._directory.slow_from = math.inf

    def _giver(self, writer: Writer, taker: bytes) -> bytes | None:
        """The namespace that gives an extent ahead of need: colder than the taker, and either with more or cold."""
        others = set(writer.larger(taker)) | {other for other in writer.loose() if self._is_cold(other)}
        coldest = self._index.coldest(others - {taker})
        if coldest is None or self._index.touched(coldest) >= self._index.touched(taker):
            return None
        return coldest

    def _note_touches(self) -> None:
        """When each namespace was touched last, by this clock."""
        writer, now = self._directory.writer, time.monotonic()
        assert writer is not None
        known = self._touched
        self._touched = {
            namespace: known[namespace]
            if namespace in known and known[namespace][0] == self._index.touched(namespace)
            else (self._index.touched(namespace), now)
            for namespace in writer.by_namespace
        }

    def _is_cold(self, namespace: bytes) -> bool:
        _, when = self._touched.get(namespace, (0, time.monotonic()))
        return time.monotonic() - when > COLD_SECONDS

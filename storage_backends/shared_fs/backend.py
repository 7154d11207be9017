"""The shared_fs tier: pages in segments on a share that any number of hosts write, read and clean.

Belongs here: batches to runs of slots, and errors of the share to outcomes. Does not belong here: the format
(segment.py), what is known (catalog.py, discovery.py), or room (cleaner.py).

- A page is there for this process when its slot is written, for others when its segment is closed and they have looked.
- A page that is known is not written again. Two writers of a page that do not know of each other store it twice, which
  costs room and nothing else.
- A page that fails its verification is a miss for whoever reads it, each host for itself; the one that finds it forgets
  that copy, and its next write puts a good one into a younger segment, which is the one that counts for all.
- `remove` makes this process forget; other hosts do with the segment. A segment of our own without a page goes at once.
  `clear` removes a namespace's segments from the share.
- STORED is reported for what this process wrote, and REMOVED once it knows that to be gone, whoever removed it. Pages
  that others wrote are theirs to report: a router hears of each page once, from its writer.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from hicache_ext.page import NO_PARENT, Namespace
from storage_backends.backoff import Backoff
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
)
from storage_backends.format import BLOCK
from storage_backends.object import ObjectFormats
from storage_backends.secrets import load_seal
from storage_backends.shared_fs.catalog import Catalog, Segment
from storage_backends.shared_fs.cleaner import Cleaner
from storage_backends.shared_fs.directory import buckets
from storage_backends.shared_fs.discovery import Discovery
from storage_backends.shared_fs.files import OpenFiles
from storage_backends.shared_fs.native_slots import slots_for
from storage_backends.shared_fs.options import SharedFsOptions
from storage_backends.shared_fs.share import GONE, Share
from storage_backends.shared_fs.slots import Slots, Written, runs
from storage_backends.shared_fs.workers import Job, Workers
from storage_backends.shared_fs.writing import OpenSegment, SegmentWriter

logger = logging.getLogger(__name__)

_COUNTS = (
    "stored", "present", "corrupt", "rejected", "removed", "refused", "errors", "lost_races", "bytes_read",
    "bytes_written",
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_KINDS = 100
#: What a lookup waits for the very first look at a namespace.
_FIRST_LOOK_SECONDS = 1.0
#: Between two marks of a segment as used, by one process.
_TOUCH_SECONDS = 600.0
_TICK_SECONDS = 0.25


class SharedFsBackend(Backend):
    """Pages on one share."""

    Options = SharedFsOptions
    capabilities = Capabilities(persistent=True, shared=True, medium="EXTERNAL", alignment=BLOCK)
    options: SharedFsOptions

    def __init__(self, options: SharedFsOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        seal = load_seal(options.seal_key_env, options.seal_key_file)
        self._sealed = seal is not None
        self._formats = ObjectFormats(BLOCK, seal)
        self._slots: dict[bytes, Slots] = {}
        self._counts: Counter[str] = Counter()
        self._count_lock = threading.Lock()
        self._said: set[str] = set()
        self._closing = threading.Event()
        self._writes = Backoff(first=0.5)
        self._share = Share(options.path, options.mount, options.direct, options.timeout)
        self._catalog = Catalog(options.index_pages, self.report)
        self._files = OpenFiles(self._share)
        self._workers = Workers(options.threads, "hicache-share-io")
        self._cleaner = Cleaner(self._share, int(options.capacity), options.ttl, self._name_gone, self._trouble)
        self._discovery = Discovery(self._share, self._catalog, options.refresh, self._gone, self._trouble)
        self._writer = SegmentWriter(
            self._share, self._catalog, options.segment_bytes, options.fsync, self._cleaner.make_room,
            self._discovery.note,
        )  # fmt: skip
        self._in_background(partial(self._share.prepare))
        threading.Thread(target=self._tick, name="hicache-share-tick", daemon=True).start()

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        assert isinstance(options, SharedFsOptions)
        options.checked()

    # ---- the contract

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        """From memory. What is missing is looked for in the background; only the first look is waited for, a little."""
        if self._share.away:
            return np.zeros(len(batch), np.uint8)
        found = self._catalog.flags(batch)
        if len(batch) and not found.all():
            first = self._look(batch.namespace)
            if not first.is_set():
                first.wait(_FIRST_LOOK_SECONDS)
                found = self._catalog.flags(batch)
        return found

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return self._catalog.flags(batch)

    def read(self, batch: PageBatch) -> Completion:
        slots = self._slots_of(batch.namespace)
        slots.form.check(batch)
        if self._share.away:
            self._count("refused", len(batch))
            return Completion.finished(len(batch), Outcome.FAILED)
        completion = Completion(len(batch), self.dispatcher)
        places = self._catalog.find(batch)
        absent = [page for page, place in enumerate(places) if place is None]
        if absent:
            self._look(batch.namespace)
            completion.settle_many(absent, [Outcome.MISS] * len(absent))
        for segment, first, pages in runs(places, slots.run(len(batch) - len(absent), self.options.threads)):
            self._workers.submit(
                Job(
                    partial(self._read, slots, batch, segment, first, pages, completion),
                    partial(_give_up, completion, pages),
                ),
                read=True,
            )
        return completion

    def write(self, batch: PageBatch) -> Completion:
        slots = self._slots_of(batch.namespace)
        slots.form.check(batch)
        if self._share.away:
            self._count("refused", len(batch))
            return Completion.finished(len(batch), Outcome.FAILED)
        completion = Completion(len(batch), self.dispatcher)
        places = self._catalog.find(batch)
        present = [page for page, place in enumerate(places) if place is not None]
        if present:
            self._count("present", len(present))
            completion.settle_many(present, [Outcome.HIT] * len(present))
            self._touch({place[0] for place in places if place is not None})
        absent = [page for page, place in enumerate(places) if place is None]
        if absent and not self._writes.allow():
            self._count("rejected", len(absent))
            completion.settle_many(absent, [Outcome.REJECTED] * len(absent))
            return completion
        step = slots.run(len(absent), self.options.threads)
        for first in range(0, len(absent), step):
            pages = absent[first : first + step]
            self._workers.submit(
                Job(
                    partial(self._write, slots, batch, pages, completion),
                    partial(_give_up, completion, pages),
                )
            )
        return completion

    def remove(self, batch: KeyBatch) -> int:
        segments = self._catalog.forget(batch.namespace.digest, [batch.key(i) for i in range(len(batch))])
        for segment in set(segments):
            if segment.mine and not segment.pages:
                self._in_background(partial(self._remove_empty, segment))
        self._count("removed", len(segments))
        return len(segments)

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        for namespace in namespaces:
            for segment in self._catalog.clear(namespace.digest):
                self._files.drop(segment)
            done = threading.Event()
            self._in_background(partial(self._clear, namespace.digest, done))
            done.wait(self.options.timeout)

    def stats(self) -> Mapping[str, int | float | str]:
        """pages, segments: known here. share_bytes: of all hosts, where there is a capacity or ttl, lately. published,
        lost: segments of ours that others can see, that could not be finished. cleaned, orphans: files removed.
        damaged: segments whose index is no good. lost_races: pages whose segment was gone when they were read."""
        with self._count_lock:
            counts = {name: self._counts[name] for name in _COUNTS}
        direct = self._share.direct
        return {
            "state": self._writes.reason if self._share.state == "ok" and self._writes.reason else self._share.state,
            "pages": len(self._catalog), "segments": self._catalog.segments, "share_bytes": self._cleaner.used,
            "direct": 1 if direct is not None and direct.works else 0,
            "published": self._writer.published, "lost": self._writer.lost, "cleaned": self._cleaner.removed,
            "orphans": self._cleaner.orphans, "looks": self._discovery.looks, "damaged": self._discovery.damaged,
            **counts,
        }  # fmt: skip

    def close(self) -> None:
        until = time.monotonic() + CLOSE_SECONDS - 2
        self._closing.set()
        self._discovery.close()
        self._cleaner.close()
        self._workers.refuse_waiting()
        for namespace in self._writer.due(0):
            self._in_background(partial(self._writer.seal, namespace))
        self._workers.drain(until)
        self._workers.close()
        self._workers.drain(until + 1)
        self._files.close()

    # ---- reads

    def _read(
        self, slots: Slots, batch: PageBatch, segment: Segment, first: int, pages: list[int], completion: Completion
    ) -> None:
        if completion.cancelled.is_set() or self._closing.is_set():
            completion.settle_many(pages, [Outcome.TIMEOUT] * len(pages))
            return
        try:
            with self._files.reading(segment) as fd, self._share.call():
                outcomes, errors = slots.read(fd, batch, pages, first, self._alignment())
            for code in set(errors) - {0}:
                failed = self._read_failed(OSError(code, os.strerror(code)), segment, errors.count(code))
                outcomes = [failed if one == code else outcome for outcome, one in zip(outcomes, errors, strict=True)]
        except OSError as error:
            outcomes = [self._read_failed(error, segment, len(pages))] * len(pages)
        bad = [batch.key(page) for page, outcome in zip(pages, outcomes, strict=True) if outcome == Outcome.CORRUPT]
        if bad:
            self._count("corrupt", len(bad))
            self._once("corrupt", "page %s failed its verification: a miss, and healed by the next write", bad[0].hex())
            self._catalog.forget(batch.namespace.digest, bad, segment)
        hits = outcomes.count(Outcome.HIT)
        self._count("bytes_read", hits * slots.slot_bytes)
        completion.settle_many(pages, outcomes)
        if hits and batch.used:
            self._touch({segment})

    def _read_failed(self, error: OSError, segment: Segment, pages: int) -> Outcome:
        if error.errno in GONE:
            self._count("lost_races", pages)
            self._gone(segment)
            return Outcome.MISS
        self._trouble(error)
        return Outcome.FAILED

    # ---- writes

    def _write(self, slots: Slots, batch: PageBatch, pages: list[int], completion: Completion) -> None:
        try:
            while pages:
                if completion.cancelled.is_set() or self._closing.is_set():
                    completion.settle_many(pages, [Outcome.TIMEOUT] * len(pages))
                    return
                if self._share.problem:
                    self._share.prepare()
                current, first, count = self._writer.reserve(slots, len(pages))
                written = self._write_run(slots, batch, pages[:count], current, first)
                done, pages = pages[: written.pages], pages[written.pages :]
                self._count("bytes_written", len(done) * slots.slot_bytes)
                completion.settle_many(done, [Outcome.HIT] * len(done))
                if written.error:
                    raise OSError(written.error, os.strerror(written.error))
            if self._writes.good():
                logger.info("shared_fs %s: takes writes again", self.options.path)
        except OSError as error:
            outcome = self._write_failed(error)
            completion.settle_many(pages, [outcome] * len(pages))

    def _write_run(self, slots: Slots, batch: PageBatch, pages: list[int], current: OpenSegment, first: int) -> Written:
        """OSError when their segment could not be finished: then none of them is there."""
        entries: dict[int, tuple[bytes, bytes]] = {}
        written = Written(0, errno.EIO)
        try:
            with self._share.call():
                current.allocate(first + len(pages))
                written = slots.write(current.fd, batch, pages, first, self._alignment())
            if written.pages:
                there = pages[: written.pages]
                notes = batch.notes
                stored = self._catalog.store(
                    current.segment, [(batch.key(page), first + i) for i, page in enumerate(there)],
                    None if notes is None else notes.only(there),
                )  # fmt: skip
                self._count("stored", len(stored))
                entries = {
                    first + i: (batch.key(page), batch.parent(page) or NO_PARENT) for i, page in enumerate(there)
                }
        finally:
            self._writer.land(current, entries, written.error == 0)
        return written

    def _write_failed(self, error: OSError) -> Outcome:
        if error.errno in _FULL:
            self._writes.bad("disk full")
        elif error.errno in _FORBIDDEN:
            self._writes.bad(f"read-only: {error.strerror}")
        else:
            self._writes.bad(error.strerror or type(error).__name__)
            self._trouble(error)
            return Outcome.FAILED
        self._count("rejected")
        self._once(f"write {error.errno}", "takes no pages: %s; tried again", error)
        return Outcome.REJECTED

    # ---- in the background

    def _tick(self) -> None:
        """Looks at the clock, never at the share."""
        while not self._closing.wait(_TICK_SECONDS):
            if self._share.away:
                self._once("away", "the share does not answer; what waits is refused until it does")
                self._workers.refuse_waiting()
                continue
            for namespace in self._writer.due(self.options.linger):
                self._in_background(partial(self._writer.seal, namespace))
            if self._files.expired():
                self._in_background(partial(self._files.expire))

    def _in_background(self, call: partial[None]) -> None:
        def run() -> None:
            try:
                call()
            except OSError as error:
                self._trouble(error)

        self._workers.submit(Job(run, lambda: None))

    def _touch(self, segments: set[Segment]) -> None:
        now = time.monotonic()
        for segment in segments:
            if not segment.touched or now - segment.touched > _TOUCH_SECONDS:
                segment.touched = now
                self._in_background(partial(self._share.touch, segment.path))

    def _remove_empty(self, segment: Segment) -> None:
        self._writer.seal(segment.namespace)  # its pages may be there still
        if not segment.pages:
            self._share.unlink(segment.path)
            self._gone(segment)

    def _clear(self, digest: bytes, done: threading.Event) -> None:
        try:
            self._writer.seal(digest)
            for bucket in buckets(self._share.listed()):
                for name in self._share.listed(bucket, digest.hex()):
                    self._share.unlink(f"{bucket}/{digest.hex()}/{name}")
        finally:
            done.set()

    def _gone(self, segment: Segment) -> None:
        self._catalog.drop(segment)
        self._files.drop(segment)

    def _name_gone(self, name: str) -> None:
        segment = self._catalog.named(name)
        if segment is not None:
            self._gone(segment)

    def _look(self, namespace: Namespace) -> threading.Event:
        return self._discovery.want(namespace, self._slots_of(namespace).slot_bytes)

    def _slots_of(self, namespace: Namespace) -> Slots:
        found = self._slots.get(namespace.digest)
        if found is None:
            if len(self._slots) > 256:
                self._slots.clear()
            found = self._slots[namespace.digest] = slots_for(self._formats.of(namespace), self._sealed)
        return found

    def _alignment(self) -> int:
        direct = self._share.direct
        return BLOCK if direct is None else direct.alignment

    def _count(self, what: str, by: int = 1) -> None:
        with self._count_lock:
            self._counts[what] += by

    def _trouble(self, error: OSError) -> None:
        self._count("errors")
        self._once(f"error {error.errno}", "%s", error)

    def _once(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._said and len(self._said) < _KINDS:
            self._said.add(kind)
            logger.warning(f"shared_fs %s: {message} (said once; stats have the count)", self.options.path, *values)


def _give_up(completion: Completion, pages: list[int]) -> None:
    """What has no outcome yet was not begun, or nothing touches it any more."""
    left = [page for page in pages if not completion.outcomes[page]]
    completion.settle_many(left, [Outcome.TIMEOUT] * len(left))

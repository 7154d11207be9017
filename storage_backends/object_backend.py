"""What the backends of remote stores share: objects' names, worker threads, outcomes, healing, a server that is away.

Belongs here: everything about a page as an object on a server but the server's protocol. Does not belong here: the
bytes of an object (object.py), or one store's client.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field

from hicache_ext.page import Namespace
from storage_backends.backoff import Backoff
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    BackendOptions,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
    Residency,
)
from storage_backends.object import VERSION, ObjectFormat, ObjectFormats
from storage_backends.presence import Presence
from storage_backends.secrets import load_seal

logger = logging.getLogger(__name__)

_COUNTS = (
    "stored", "present", "corrupt", "rejected", "removed", "refused", "errors", "bytes_read", "bytes_written",
)  # fmt: skip
_KINDS, _KIND_LETTERS = 100, 40


class ObjectOptions(BackendOptions):
    """Options of every store of objects.

    prefix: first part of every object's name; what other users of the store do not use.
    connections: pages that travel at the same time.
    timeout: seconds that one page, or one request without a page, may take.
    seal_key_env, seal_key_file: variable or file with a key (64 hex digits): pages are sealed with AES-256-GCM.
    """

    prefix: str = Field("hicache", pattern=r"^[A-Za-z0-9._/-]{1,200}$")
    connections: int = Field(4, ge=1, le=256)
    timeout: float = Field(5.0, ge=0.01, le=600)
    seal_key_env: str = ""
    seal_key_file: Path | None = None


class Unreachable(Exception):
    """The server cannot be reached or does not let us in: nobody asks it again before a wait."""


class TooLate(Exception):
    """The server did not answer in time."""


class Group:
    """Some pages of a batch that one thread moves. Each page is settled once; what is left at the end has failed."""

    def __init__(self, batch: PageBatch, pages: list[int], form: ObjectFormat, completion: Completion) -> None:
        self.batch, self.form, self.completion = batch, form, completion
        self.open = pages
        self.corrupt: list[int] = []
        self.misfits: set[int] = set()
        """Of a write: pages whose object is there but has another size, and must be replaced."""

    def settle(self, page: int, outcome: Outcome) -> None:
        """The page's outcome; its buffers are quiet."""
        self.open.remove(page)
        self.completion.settle(page, outcome)

    def set_corrupt(self, page: int) -> None:
        """Not the page, or not a page. Settled by the backend, when it is off the store."""
        self.open.remove(page)
        self.corrupt.append(page)


class ObjectBackend(Backend):
    """A subclass writes `sizes`, `read_group`, `write_group`, `delete` and `clear_start`, all of them blocking.

    Whatever those raise costs the pages that are not settled, and only those: TooLate is TIMEOUT, anything else FAILED.
    """

    options: ObjectOptions
    SEPARATOR: ClassVar[str] = ":"
    #: Pages that one thread takes at once.
    GROUP: ClassVar[int] = 8

    def __init__(self, options: ObjectOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self.counts: Counter[str] = Counter()
        self._formats = ObjectFormats(seal=load_seal(options.seal_key_env, options.seal_key_file))
        self._presence = Presence()
        self._absence = Presence()
        self._backoff = Backoff()
        self._said: set[str] = set()
        self._count_lock = threading.Lock()
        self._closing = False
        self._pool = ThreadPoolExecutor(options.connections, thread_name_prefix=type(self).__name__.lower())

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        assert isinstance(options, ObjectOptions)
        load_seal(options.seal_key_env, options.seal_key_file)

    # ---- what a store's client does

    @abstractmethod
    def sizes(self, names: list[str]) -> list[int]:
        """Bytes of each object, -1 where there is none."""

    @abstractmethod
    def read_group(self, group: Group) -> None:
        """Read the group's pages and settle each when its buffers are quiet."""

    @abstractmethod
    def write_group(self, group: Group) -> None:
        """Write the group's pages, none of which is there, and settle each (`stored`)."""

    def touch(self, names: list[str]) -> None:
        """These objects were to be written again: for stores that expire by age."""

    @abstractmethod
    def delete(self, names: list[str]) -> list[bool]:
        """Remove objects; of each, whether it was there."""

    @abstractmethod
    def clear_start(self, start: str) -> None:
        """Remove every object whose name starts so."""

    # ---- for subclasses

    def name(self, group: Group, page: int) -> str:
        """The object's name on the store: format version, namespace (its salt and tenant are in there), key."""
        return self._start(group.batch.namespace.digest) + group.batch.key(page).hex()

    def count(self, what: str, by: int = 1) -> None:
        with self._count_lock:
            self.counts[what] += by

    def arrived(self, group: Group, page: int, head: bytearray) -> None:
        """The page's bytes are in its buffers: judge them. A CORRUPT page is settled once it is off the store."""
        digest, key = group.batch.namespace.digest, group.batch.key(page)
        self.count("bytes_read", group.form.size)
        if group.form.verify(group.batch, page, head) is Outcome.HIT:
            self._presence.seen(digest, [key])
            notes = None if self._listener is None else group.form.notes(head)
            if notes is not None:  # another's page, maybe: now its tokens are known here
                self.report(Residency.STORED, digest, key, notes)
            group.settle(page, Outcome.HIT)
        else:
            group.set_corrupt(page)

    def absent(self, group: Group, page: int) -> None:
        """There is no such object."""
        self._presence.gone(group.batch.namespace.digest, [group.batch.key(page)])
        self._absence.seen(group.batch.namespace.digest, [group.batch.key(page)])
        group.settle(page, Outcome.MISS)

    def present(self, group: Group, page: int) -> None:
        """The page to be written is there already."""
        digest, key = group.batch.namespace.digest, group.batch.key(page)
        self._presence.seen(digest, [key])
        self._absence.gone(digest, [key])
        self.count("present")
        notes = None if self._listener is None else group.batch.notes
        if notes is not None:  # another's page, maybe: nobody has told here that it is there
            self.report(Residency.STORED, digest, key, notes.only([page]))
        group.settle(page, Outcome.HIT)

    def stored(self, group: Group, page: int) -> None:
        """The page is written."""
        digest, key = group.batch.namespace.digest, group.batch.key(page)
        self._presence.seen(digest, [key])
        self._absence.gone(digest, [key])
        self.count("stored")
        self.count("bytes_written", group.form.size)
        notes = group.batch.notes
        self.report(Residency.STORED, digest, key, None if notes is None else notes.only([page]))
        group.settle(page, Outcome.HIT)

    # ---- the contract

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        digest, size = batch.namespace.digest, self._formats.of(batch.namespace).size
        keys = _keys(batch)
        sizes: list[int] = []
        if self._attempt("lookup", lambda: sizes.extend(self.sizes(self._names(digest, keys)))):
            return np.zeros(len(batch), np.uint8)
        found = np.array(sizes, np.int64) == size
        self._presence.seen(digest, [key for key, there in zip(keys, found, strict=True) if there])
        self._presence.gone(digest, [key for key, there in zip(keys, found, strict=True) if not there])
        self._absence.seen(digest, [key for key, size in zip(keys, sizes, strict=True) if size == -1])
        return found.astype(np.uint8)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        """What was seen on the store within the last minute. Others may have removed it since."""
        return self._presence.lookup(batch)

    def read(self, batch: PageBatch) -> Completion:
        return self._in_groups("read", batch, self._read)

    def write(self, batch: PageBatch) -> Completion:
        return self._in_groups("write", batch, self._write)

    def remove(self, batch: KeyBatch) -> int:
        return self._forget(batch.namespace, _keys(batch))

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        for namespace in namespaces:
            self._presence.forget(namespace.digest)
            self._absence.forget(namespace.digest)
            self._attempt("clear", partial(self.clear_start, self._start(namespace.digest)))

    def stats(self) -> Mapping[str, int | float | str]:
        """pages: those seen lately, by us; how many there are is the store's to tell. refused: not asked while away."""
        with self._count_lock:
            counts = {name: self.counts[name] for name in _COUNTS}
        return {"pages": len(self._presence), "state": self._backoff.reason or "ok", **counts}

    def close(self) -> None:
        self._closing = True
        self._pool.shutdown(wait=False, cancel_futures=False)  # queued groups settle as TIMEOUT
        self.abort()
        until = time.monotonic() + CLOSE_SECONDS - 1
        for thread in list(self._pool._threads):
            thread.join(max(0.0, until - time.monotonic()))

    def abort(self) -> None:
        """Wake the threads that wait for the server; nothing is sent any more."""

    # ---- groups of pages

    def _in_groups(self, what: str, batch: PageBatch, call: Callable[[Group], None]) -> Completion:
        form = self._formats.of(batch.namespace)
        form.check(batch)
        completion = Completion(len(batch), self.dispatcher)
        step = max(1, min(self.GROUP, -(-len(batch) // self.options.connections)))
        for first in range(0, len(batch), step):
            pages = list(range(first, min(first + step, len(batch))))
            self._pool.submit(self._run, what, Group(batch, pages, form, completion), call)
        return completion

    def _run(self, what: str, group: Group, call: Callable[[Group], None]) -> None:
        outcome: Outcome | None = Outcome.TIMEOUT
        if not (group.completion.cancelled.is_set() or self._closing):
            outcome = self._attempt(what, partial(call, group))
        for page in list(group.open):
            group.settle(page, outcome or Outcome.FAILED)

    def _read(self, group: Group) -> None:
        try:
            self.read_group(group)
        finally:
            if group.corrupt:
                self._quarantine(group)

    def _quarantine(self, group: Group) -> None:
        """Remove what is not the page it is filed as, then say so: the write that heals it may come at once."""
        keys = [group.batch.key(page) for page in group.corrupt]
        self.count("corrupt", len(keys))
        self._once(
            "corrupt", "%s: page %s failed its verification: removed, a miss, and healed by the next write",
            type(self).__name__, keys[0].hex(),
        )  # fmt: skip
        self._forget(group.batch.namespace, keys)
        for page in group.corrupt:
            group.completion.settle(page, Outcome.CORRUPT)

    def _write(self, group: Group) -> None:
        # An engine looks a page up before it computes it: what was not there then need not be asked for again, and a
        # page that somebody else stored meanwhile is the same page.
        absent = self._absence.known(group.batch.namespace.digest, [group.batch.key(page) for page in group.open])
        asked = [page for page, known in zip(group.open, absent, strict=True) if not known]
        if asked:
            self._write_present(group, asked)
        if group.open:
            self.write_group(group)

    def _write_present(self, group: Group, pages: list[int]) -> None:
        """Which of these pages need no write, because they are there and whole."""
        names = self._names(group.batch.namespace.digest, [group.batch.key(page) for page in pages])
        sizes = dict(zip(pages, self.sizes(names), strict=True))
        there = [page for page in pages if sizes[page] == group.form.size]
        group.misfits = {page for page in pages if sizes[page] not in (group.form.size, -1)}
        if there:
            self.touch([names[pages.index(page)] for page in there])
            for page in there:
                self.present(group, page)

    def _forget(self, namespace: Namespace, keys: list[bytes]) -> int:
        """Remove objects; how many were there."""
        self._presence.gone(namespace.digest, keys)
        self._absence.gone(namespace.digest, keys)
        were: list[bool] = []
        self._attempt("remove", lambda: were.extend(self.delete(self._names(namespace.digest, keys))))
        removed = [key for key, was in zip(keys, were, strict=False) if was]
        self.report(Residency.REMOVED, namespace.digest, b"".join(removed))
        self.count("removed", len(removed))
        return len(removed)

    # ---- names and errors

    def _start(self, namespace: bytes) -> str:
        return self.SEPARATOR.join((self.options.prefix, str(VERSION), namespace.hex(), ""))

    def _names(self, namespace: bytes, keys: list[bytes]) -> list[str]:
        start = self._start(namespace)
        return [start + key.hex() for key in keys]

    def _attempt(self, what: str, call: Callable[[], object]) -> Outcome | None:
        """Call, unless the server is away. None when that went well, else what the pages that remain are."""
        if not self._backoff.allow():
            self.count("refused")
            return Outcome.FAILED
        try:
            call()
        except (Unreachable, TooLate) as error:
            self.count("errors")
            if self._backoff.bad(str(error)) and not self._closing:
                kind = re.sub(r"\d", "", str(error))[:_KIND_LETTERS]  # names and durations do not make another kind
                self._once(kind, "%s: the server is away (%s); it is tried again", type(self).__name__, error)
            return Outcome.TIMEOUT if isinstance(error, TooLate) else Outcome.FAILED
        except Exception as error:  # whatever a client raises costs these pages only
            self.count("errors")
            self._once(f"{what}: {type(error).__name__}", "%s: %s failed: %s", type(self).__name__, what, error)
            return Outcome.FAILED
        if self._backoff.good():
            logger.info("%s: the server is back", type(self).__name__)
        return None

    def _once(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._said and len(self._said) < _KINDS:
            self._said.add(kind)
            logger.warning(message + " (said once; stats have the count)", *values)


def _keys(batch: KeyBatch) -> list[bytes]:
    return [batch.key(i) for i in range(len(batch))]

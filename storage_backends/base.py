"""The contract between the cascade and a storage backend: batches in, one outcome per page out.

Belongs here: the types every backend shares, and `BlockingBackend`, which makes a backend of three blocking
functions. Does not belong here: a store, a policy, or anything that knows an engine.

What the framework guarantees to a backend: keys are unique within a batch; buffers fit the backend's
capabilities; nothing is called after `close`. What a backend guarantees: no exception leaves it for anything but
a programming error, and

    **Quiescence.** A page gets its outcome only when nothing can touch the page's buffers any more: the engine
    reuses host pages as soon as a call returns, and a kernel cannot recall a read that a device has begun. A
    backend therefore never answers TIMEOUT for memory it may still write; deadlines belong to the store, which
    reads into memory of its own (hicache_ext.store.staging) when a caller cannot wait.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from queue import SimpleQueue
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from hicache_ext.page import KEY_BYTES, NO_PARENT, Namespace

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 8.0

Buffers = list[memoryview]

MemoryKind = Literal["host", "device"]
"""Where a page's buffers lie: in memory that this process reads, or in that of a CUDA device."""


class Outcome(IntEnum):
    """What became of one page. A closed set: engines, policies and metrics switch over it."""

    HIT = 1  # read: the bytes are in the buffers, verified. write: the page is in the tier (stored or already there)
    MISS = 2  # not in the tier (or no longer: a lost race with eviction)
    CORRUPT = 3  # was there, failed its checksum or identity, is quarantined; the next write heals it
    TIMEOUT = 4  # did not arrive in time, or was cancelled; the buffers are untouched from here on
    REJECTED = 5  # the tier chose not to (full queue, admission, unhealthy)
    FAILED = 6  # an error of the device or the server


class Residency(IntEnum):
    """A change of what a tier holds, reported once by the backend that owns it."""

    STORED = 1
    REMOVED = 2


@dataclass(frozen=True)
class Notes:
    """What KV events say of n pages, beside their keys: kept with the pages, so that a restart can say it again.

    tokens: uint32[n, page_size]. hashes: int64[n, 2]: event hash, and that of the page before; 0 as event hash:
    nothing is known of this page; 0 as the other: the page begins a prompt. salt, lora: the request's cache salt and
    the adapter's name, of all of them; "" where there is none.
    """

    tokens: np.ndarray
    hashes: np.ndarray
    salt: str = ""
    lora: str = ""

    def only(self, pages: list[int]) -> Notes:
        """Those of only these pages, in this order."""
        return Notes(self.tokens[pages], self.hashes[pages], self.salt, self.lora)


ResidencyListener = Callable[[Residency, bytes, bytes, Notes | None], None]
"""(change, namespace digest, packed keys, what is known of the pages that were stored); on the dispatcher thread."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend is and asks for. The cascade and `doctor` read it; nothing probes a backend by trying.

    persistent: pages survive the process. shared: other processes or hosts see them.
    native_ttl: the store expires pages itself. max_page_bytes: 0 = no limit.
    alignment: address and length alignment (bytes) at which no bounce copy is needed; 1 = any memory will do.
    medium: name for KV events ("DISK", "EXTERNAL", "CPU").
    knows: `lookup` answers from this process's memory, and for all pages: it costs little and asks nobody.
    memory: the kinds of memory that pages may come from and go to. Device memory is read and written outside of the
    order of any stream: whoever filled it has waited for that, and whoever reads it does so after the completion.
    """

    persistent: bool
    shared: bool
    native_ttl: bool = False
    max_page_bytes: int = 0
    alignment: int = 1
    medium: str = "EXTERNAL"
    knows: bool = False
    memory: tuple[MemoryKind, ...] = ("host",)


@dataclass(frozen=True)
class KeyBatch:
    """n unique keys of one namespace. keys: n x 32 bytes. parents: n x 32 bytes (zeroes = unknown) or None."""

    namespace: Namespace
    keys: bytes
    parents: bytes | None = None

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES

    def key(self, i: int) -> bytes:
        return self.keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]

    def only(self, pages: list[int]) -> KeyBatch:
        """The keys of only these pages, in this order."""
        if len(pages) == len(self) and type(self) is KeyBatch:
            return self
        cut = [slice(i * KEY_BYTES, (i + 1) * KEY_BYTES) for i in pages]
        parents = None if self.parents is None else b"".join([self.parents[at] for at in cut])
        return KeyBatch(self.namespace, b"".join([self.keys[at] for at in cut]), parents)

    def parent(self, i: int) -> bytes | None:
        """The parent's key, or None where it is unknown."""
        if self.parents is None:
            return None
        parent = self.parents[i * KEY_BYTES : (i + 1) * KEY_BYTES]
        return None if parent == NO_PARENT else parent


@dataclass(frozen=True)
class PageBatch(KeyBatch):
    """n pages and where their bytes are: no Python object per page.

    addresses, lengths: uint64[m], one entry per buffer. offsets: int64[n + 1]; page i owns the buffers
    offsets[i]:offsets[i + 1]. owner keeps the memory alive until the batch's completion.
    tokens: uint32[n, page_size]; event_hashes: int64[n, 2] (hash, parent hash; 0 = unknown): kept with the page
    for KV events, None where the engine did not give them; see Notes. salt, lora: of all pages, as there. used: a read
    counts as a use of the pages, for eviction; not so when they are read on their way out. memory: of all buffers.
    """

    addresses: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    owner: Any = None
    tokens: np.ndarray | None = None
    event_hashes: np.ndarray | None = None
    used: bool = True
    salt: str = ""
    lora: str = ""
    memory: MemoryKind = "host"

    @property
    def notes(self) -> Notes | None:
        """What KV events say of these pages, where the engine gave it."""
        if self.tokens is None or self.event_hashes is None:
            return None
        return Notes(self.tokens, self.event_hashes, self.salt, self.lora)

    def buffers(self, i: int) -> Buffers:
        """Page i's buffers as writable views. Valid while `owner` lives."""
        return [
            memoryview((ctypes.c_char * int(self.lengths[j])).from_address(int(self.addresses[j]))).cast("B")
            for j in range(int(self.offsets[i]), int(self.offsets[i + 1]))
        ]

    def select(self, pages: list[int]) -> PageBatch:
        """The batch of only these pages, in this order; buffers stay where they are."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in pages]
        flat = np.concatenate(spans) if spans else np.empty(0, np.int64)
        offsets = np.zeros(len(pages) + 1, np.int64)
        np.cumsum([len(span) for span in spans], out=offsets[1:])
        parents = self.parents
        return PageBatch(
            self.namespace,
            b"".join(self.key(i) for i in pages),
            None if parents is None else b"".join(parents[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in pages),
            self.addresses[flat],
            self.lengths[flat],
            offsets,
            self.owner,
            None if self.tokens is None else self.tokens[pages],
            None if self.event_hashes is None else self.event_hashes[pages],
            self.used,
            self.salt,
            self.lora,
            self.memory,
        )


class Completion:
    """The future of a batch: one outcome byte per page, and one wake-up when the last of them is known.

    `on_done` callbacks run on the dispatcher thread, never on an I/O thread or the caller's.
    """

    def __init__(self, pages: int, dispatcher: Dispatcher | None = None) -> None:
        self.outcomes = bytearray(pages)  # 0 = not known yet
        self._open = pages
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._dispatcher = dispatcher
        self._callbacks: list[Callable[[Completion], None]] = []
        self.cancelled = threading.Event()
        self._on_cancel: list[Callable[[], None]] = []
        if pages == 0:
            self._done.set()

    @classmethod
    def finished(cls, pages: int, outcome: Outcome) -> Completion:
        """A completion in which every page already has `outcome`."""
        done = cls(0)
        done.outcomes = bytearray([outcome]) * pages
        return done

    def settle(self, page: int, outcome: Outcome) -> None:
        """Give page its outcome, once. Called by the backend when the page's buffers are quiet."""
        self.settle_many([page], [outcome])

    def settle_many(self, pages: Iterable[int], outcomes: Iterable[int]) -> None:
        """Give each of these pages its outcome, once."""
        with self._lock:
            for page, outcome in zip(pages, outcomes, strict=True):
                if self.outcomes[page]:
                    raise RuntimeError(f"page {page} already has outcome {self.outcomes[page]}")
                self.outcomes[page] = outcome
                self._open -= 1
            if self._open or self._done.is_set():
                return
            callbacks, self._callbacks = self._callbacks, []
            self._done.set()
        for callback in callbacks:
            self._dispatch(callback)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every page has its outcome; False when `timeout` seconds went by first."""
        return self._done.wait(timeout)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def on_done(self, callback: Callable[[Completion], None]) -> None:
        """Call back once when done; at once (still on the dispatcher) when already done."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        self._dispatch(callback)

    def cancel(self) -> None:
        """Best effort: pages whose I/O has not begun settle as TIMEOUT; the others run to their end."""
        with self._lock:
            self.cancelled.set()
            calls, self._on_cancel = self._on_cancel, []
        for call in calls:
            call()

    def on_cancel(self, call: Callable[[], None]) -> None:
        """Call once when cancelled, on the thread that does so; at once when that has been."""
        with self._lock:
            if not self.cancelled.is_set():
                self._on_cancel.append(call)
                return
        call()

    def result(self, timeout: float | None = None) -> list[Outcome]:
        """Wait, then the outcomes as enums. TimeoutError when `timeout` seconds went by first."""
        if not self.wait(timeout):
            raise TimeoutError("the batch is still in flight")
        return [Outcome(value) for value in self.outcomes]

    def _dispatch(self, callback: Callable[[Completion], None]) -> None:
        if self._dispatcher is None:
            callback(self)
        else:
            self._dispatcher.post(partial(callback, self))


class Dispatcher:
    """The one thread on which callbacks run. A callback that raises is logged and costs nobody else anything."""

    def __init__(self, name: str = "hicache-dispatch") -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    def close(self, timeout: float = 2.0) -> None:
        """Run what is queued, then stop."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception:
                logger.exception("a completion callback failed")


class OptionError(ValueError):
    """An option that cannot work here. Says which key, what it was, why not, and what to do instead."""

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        super().__init__(f"{key} = {value!r}: {problem}. Fix: {fix}")
        self.key, self.value, self.problem, self.fix = key, value, problem, fix


class BackendOptions(BaseModel):
    """Base of every backend's options: unknown keys are errors, so that a typo cannot pass as a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Backend(ABC):
    """One tier's store. Subclasses set `Options` (their config keys) and take (options, dispatcher)."""

    Options: ClassVar[type[BackendOptions]] = BackendOptions
    #: Whether `going` tells what will be evicted next; else no tier below can ask for those pages.
    foresees: ClassVar[bool] = False
    #: Whether pages in memory that it was not told of (`register_memory`) cost it one more copy. The store tells such a
    #: backend of the memory in which it keeps copies.
    bounces: bool = False
    capabilities: Capabilities

    def __init__(self, options: BackendOptions, dispatcher: Dispatcher) -> None:
        self.options = options
        self.dispatcher = dispatcher
        self._listener: ResidencyListener | None = None

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        """Raise OptionError for options that parse but cannot work on this machine. Changes nothing."""

    @classmethod
    def shares_memory(cls, options: BackendOptions) -> bool:
        """Whether a host pool that other processes can map spares this backend a copy of every page."""
        return False

    @abstractmethod
    def lookup(self, batch: KeyBatch) -> np.ndarray:
        """uint8[n]: 1 where the page is resident. May ask a server; never called on a scheduler thread."""

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        """As lookup, but from memory only: all that a scheduler thread may call. Unknown counts as absent."""
        return np.zeros(len(batch), np.uint8)

    @abstractmethod
    def read(self, batch: PageBatch) -> Completion:
        """Fill the pages' buffers. Bytes of a page that is not a HIT are undefined."""

    @abstractmethod
    def write(self, batch: PageBatch) -> Completion:
        """Store the pages. The buffers are stable until the page's outcome."""

    @abstractmethod
    def remove(self, batch: KeyBatch) -> int:
        """Forget these pages; how many were there."""

    def going(self, most: int) -> list[tuple[bytes, bytes]]:
        """Up to `most` of the pages that will be evicted next, as (namespace digest, packed keys): those without which
        a tenth of the tier would be free, so none while that is so.

        Asked several times a second where the tier below wants to have them first.
        """
        return []

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        """Forget every page of these namespaces."""
        raise NotImplementedError(f"{type(self).__name__} cannot clear a namespace")

    def register_memory(self, address: int, length: int) -> None:
        """Pages will lie here until `close`: register it with the device or the server where that pays. May wait."""

    def reach_device(self, ordinal: int) -> None:
        """An engine's KV lies on this CUDA device: reach it, if you can, from now on; `capabilities.memory` has
        "device" then. Asked before device memory is registered, and never in a process whose pools are host memory. May
        wait, for as long as it takes to pin memory; a device that cannot be reached is said, and costs nothing else.
        """

    def on_residency(self, listener: ResidencyListener | None) -> None:
        """Who hears of stored and removed pages (None: nobody). Calls come on the dispatcher thread."""
        self._listener = listener

    def report(self, change: Residency, namespace: bytes, keys: bytes, notes: Notes | None = None) -> None:
        """For subclasses: tell the listener, if there is one. Changes of one page are reported in their order."""
        listener = self._listener
        if listener is not None and keys:
            self.dispatcher.post(partial(listener, change, namespace, keys, notes))

    def tell(self, namespace: bytes) -> bool:
        """Report a slice of what is there of this namespace and was not reported yet: pages of earlier runs, and of
        other writers where they can be known. Whether there may be more now. Reads headers: call it from a thread that
        may wait, again and again. A backend that cannot list what it holds has nothing to tell.
        """
        return False

    def recheck(self, namespace: bytes, keys: bytes) -> None:
        """Report those of these pages, once reported as stored, that are not there any more for a reason that nobody
        reported: other writers' evictions, time. From memory only: a backend that would have to ask does nothing.
        """

    def stats(self) -> Mapping[str, int | float | str]:
        """Counters and gauges by name. Cheap: may be called every second."""
        return {}

    def versions(self) -> Mapping[str, str]:
        """Who does the work, by name: libraries and servers with their versions, engines. May ask a server."""
        return {}

    def processes(self) -> list[int]:
        """Processes that do the backend's work besides this one: their CPU time is its own as well."""
        return []

    def close(self) -> None:
        """Stop and let go of every resource within CLOSE_SECONDS."""


class BlockingBackend(Backend):
    """A backend of blocking functions: brings the thread pool, per-page outcomes, cancel and close.

    A subclass writes `has`, `get`, `put`, `delete` for one page each. Whatever they raise is FAILED for that page
    alone, counted and logged once per kind of error.
    """

    workers: ClassVar[int] = 8

    def __init__(self, options: BackendOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix=type(self).__name__.lower())
        self._said: set[str] = set()
        self.errors = 0

    @abstractmethod
    def has(self, namespace: Namespace, key: bytes) -> bool:
        """Whether the page is there."""

    @abstractmethod
    def get(self, namespace: Namespace, key: bytes, buffers: Buffers) -> Outcome:
        """Fill the buffers; HIT only with verified bytes."""

    @abstractmethod
    def put(self, namespace: Namespace, key: bytes, buffers: Buffers) -> Outcome:
        """Store the buffers."""

    @abstractmethod
    def delete(self, namespace: Namespace, key: bytes) -> bool:
        """Forget the page; whether it was there."""

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        found = np.zeros(len(batch), np.uint8)
        for i in range(len(batch)):
            try:
                found[i] = self.has(batch.namespace, batch.key(i))
            except Exception as error:  # a store's own error is an absent page
                self._failed("lookup", error)
        return found

    def read(self, batch: PageBatch) -> Completion:
        return self._each("read", batch, self.get)

    def write(self, batch: PageBatch) -> Completion:
        return self._each("write", batch, self.put)

    def remove(self, batch: KeyBatch) -> int:
        removed = 0
        for i in range(len(batch)):
            try:
                removed += self.delete(batch.namespace, batch.key(i))
            except Exception as error:
                self._failed("remove", error)
        return removed

    def close(self) -> None:
        # Queued pages settle as TIMEOUT through `_one`; a page in a blocking call is waited for, but not for ever.
        self._pool.shutdown(wait=False, cancel_futures=False)
        self._closing = True
        for thread in list(self._pool._threads):
            thread.join(CLOSE_SECONDS / max(1, len(self._pool._threads)))

    _closing = False

    def _each(self, what: str, batch: PageBatch, call: Callable[[Namespace, bytes, Buffers], Outcome]) -> Completion:
        completion = Completion(len(batch), self.dispatcher)
        for i in range(len(batch)):
            self._pool.submit(self._one, what, batch, i, call, completion)
        return completion

    def _one(
        self,
        what: str,
        batch: PageBatch,
        page: int,
        call: Callable[[Namespace, bytes, Buffers], Outcome],
        completion: Completion,
    ) -> None:
        if completion.cancelled.is_set() or self._closing:
            completion.settle(page, Outcome.TIMEOUT)
            return
        try:
            outcome = call(batch.namespace, batch.key(page), batch.buffers(page))
        except Exception as error:
            self._failed(what, error)
            outcome = Outcome.FAILED
        completion.settle(page, outcome)

    def _failed(self, what: str, error: Exception) -> None:
        self.errors += 1
        kind = f"{what}: {type(error).__name__}"
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s: %s failed: %s (said once; see stats for the count)", type(self).__name__, what, error)

"""A tier in this machine's DRAM that the processes of one user share: what one stores, all of them read.

Belongs here: the contract, over a region's pages. Does not belong here: the region (csrc/memory: verification, room,
many processes without a lock), its memory (region.py), who shares it (sharers.py), how a GPU reaches it (device.py), or
what is announced (told.py).

A copy costs the same wherever it runs, so a batch is cut into parts for a few threads, each one call without the GIL.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ByteSize

from hicache_ext.page import KEY_BYTES, NAMESPACE_BYTES, Namespace
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    OptionError,
    Outcome,
    PageBatch,
    ResidencyListener,
)
from storage_backends.memory.ahead import Ahead
from storage_backends.memory.device import Reach, Unreachable
from storage_backends.memory.options import MemoryOptions
from storage_backends.memory.region import Memory, SharedMemory, make_private, make_shared
from storage_backends.memory.sharers import Sharers
from storage_backends.memory.told import Told
from storage_backends.slot_form import SlotForm, span
from storage_backends.slot_form import keys as packed

if TYPE_CHECKING:
    from hicache_ext import _cuda

try:
    from hicache_ext import _native
except ImportError:
    _native = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_PART_BYTES = 1 << 20
_SWEEP_SECONDS = 0.5
_FORMS = 64


class Verdict(IntEnum):
    """What a region says of a page (csrc/memory/region.hpp)."""

    UNKNOWN = 0
    ABSENT = 1
    VALID = 2
    CHANGED = 3
    DAMAGED = 4
    STORED = 5
    PRESENT = 6
    NO_ROOM = 7


OUTCOMES: dict[int, Outcome] = {
    Verdict.UNKNOWN: Outcome.FAILED,
    Verdict.ABSENT: Outcome.MISS,
    Verdict.VALID: Outcome.HIT,
    Verdict.CHANGED: Outcome.MISS,
    Verdict.DAMAGED: Outcome.CORRUPT,
    Verdict.STORED: Outcome.HIT,
    Verdict.PRESENT: Outcome.HIT,
    Verdict.NO_ROOM: Outcome.REJECTED,
}


class MemoryBackend(Backend):
    """Pages in a region of memory."""

    Options = MemoryOptions
    foresees = True
    options: MemoryOptions

    def __init__(self, options: MemoryOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._sharers: Sharers | None = None
        if options.region:
            new = partial(self._new_shared, options)
            self._sharers = Sharers(options.directory, options.region, new, partial(_format, options))
            self._memory: Memory | None = self._sharers.memory
        else:
            self._memory = make_private(self._layout(options), options.capacity)
            _format(options, self._memory)
        try:
            self._region: Any = self._open(self._memory)
        except BaseException:
            self._leave()
            raise
        self._ahead = Ahead(self._region)
        self.pages = self._memory.pages
        self.capacity: int = self._region.capacity
        # EXTERNAL to routers, though it is DRAM: the engine reports its own host pool as CPU, and a page that goes here
        # must not count as gone there.
        self.capabilities = Capabilities(
            persistent=False, shared=bool(options.region), max_page_bytes=self._region.largest_page,
            medium="EXTERNAL", knows=True,
        )  # fmt: skip
        self._forms: dict[bytes, SlotForm] = {}
        self._told = Told(self.report, self._look)
        self._counts = {"stored": 0, "present": 0, "rejected": 0, "errors": 0, "to_device": 0, "from_device": 0}
        self._reach: Reach | None = None
        self._reaching = threading.Lock()
        self._unreached = "no engine's KV lies on a GPU"
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._closing = threading.Event()
        self._ticker: threading.Thread | None = None
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(options.threads, "memorybackend")
        self._say_what_it_is()

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        if _native is None:
            raise OptionError(
                "type", "memory", "needs the compiled part of hicache-ext, which this install lacks",
                "install a C++ compiler and then hicache-ext again",
            )  # fmt: skip

    # ---- opening

    @staticmethod
    def _layout(options: MemoryOptions) -> int:
        """Bytes of the region."""
        MemoryBackend.check(options)
        extents, _, _, size = _native.region_layout(options.capacity)
        assert extents, "the options' limits are the layout's"
        return int(size)

    @staticmethod
    def _new_shared(options: MemoryOptions) -> SharedMemory:
        return make_shared(options.region, MemoryBackend._layout(options), options.capacity)

    def _open(self, memory: Memory) -> Any:
        problem = _native.region_problem(memory.address, memory.size)
        if problem:
            raise OptionError(
                "region", self.options.region, f"is held by processes of another version of hicache-ext ({problem})",
                "use one version for all of them, or another `region`",
            )  # fmt: skip
        sharers = self._sharers
        locks, number = (-1, 1) if sharers is None else (sharers.fd, sharers.number)
        return _native.Region(memory.address, memory.size, memory.fd, locks, number, memory)

    def _leave(self) -> None:
        if self._sharers is not None:
            self._sharers.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _say_what_it_is(self) -> None:
        sharers, options = self._sharers, self.options
        found = "" if sharers is None or sharers.first else f"found with {len(sharers.alive())} other processes"
        logger.info(
            "memory: %s of %s, %s, %s", ByteSize(self.capacity).human_readable(), self.pages,
            f"region {options.region!r} of user {os.geteuid()}" if options.region else "this process's alone",
            found or "new",
        )  # fmt: skip
        if sharers is not None and not sharers.first and abs(self.capacity - options.capacity) > self.capacity / 10:
            logger.warning(
                "memory: region %r has %s, not the %s of this process's `capacity`; it keeps its size until all leave",
                options.region, ByteSize(self.capacity).human_readable(), options.capacity.human_readable(),
            )  # fmt: skip

    # ---- the contract

    def reach_device(self, ordinal: int) -> None:
        """Takes and pins the whole region, once: seconds, for many GiB."""
        with self._reaching:
            if self._reach is None:
                self._try_to_reach(ordinal)
            elif self._reach.device.ordinal != ordinal:
                self._once(
                    "second", "memory: device %s is reached, not %s as well", self._reach.device.ordinal, ordinal
                )

    def _try_to_reach(self, ordinal: int) -> None:
        region, memory, before = self._here(), self._memory, self._unreached
        if region is None or memory is None or self._closing.is_set():
            return
        if not self.options.pin:
            self._unreached = "pin: false"
        else:
            _, _, data_at, _ = _native.region_layout(self.capacity)
            try:
                self._reach = Reach(region, memory, data_at, ordinal, self._device_out)
            except Unreachable as error:
                self._unreached = str(error)
        if self._reach is not None:
            self.capabilities = replace(self.capabilities, memory=("host", "device"))
        elif self._unreached != before:
            logger.warning("memory: pages go to device %s through host memory: %s", ordinal, self._unreached)

    def _device_out(self) -> None:
        self.capabilities = replace(self.capabilities, memory=("host",))

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        return self._look(batch.namespace.digest, batch.keys, used=True)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return self._look(batch.namespace.digest, batch.keys)

    def read(self, batch: PageBatch) -> Completion:
        return self._in_parts(batch, False)

    def write(self, batch: PageBatch) -> Completion:
        return self._in_parts(batch, True)

    def remove(self, batch: KeyBatch) -> int:
        region = self._here()
        if region is None:
            return 0
        were = np.zeros(len(batch), np.uint8)

        def remove() -> np.ndarray:
            region.remove(batch.namespace.digest, batch.keys, were)
            return were

        return self._told.removed(batch.namespace.digest, batch.keys, remove)

    def going(self, most: int) -> list[tuple[bytes, bytes]]:
        region = self._here()
        found = region.going(most) if region is not None else b""
        spaces: dict[bytes, list[bytes]] = {}
        step = NAMESPACE_BYTES + KEY_BYTES
        for at in range(0, len(found), step):
            spaces.setdefault(found[at : at + NAMESPACE_BYTES], []).append(found[at + NAMESPACE_BYTES : at + step])
        return [(digest, b"".join(keys)) for digest, keys in spaces.items()]

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        region = self._here()
        if region is not None:
            for namespace in namespaces:
                region.clear(namespace.digest)
            self._told.sweep(region.changes())

    def on_residency(self, listener: ResidencyListener | None) -> None:
        super().on_residency(listener)
        if listener is not None and self._sharers is not None and self._ticker is None:
            self._ticker = threading.Thread(target=self._sweep_for_ever, name="hicache-memory-sweep", daemon=True)
            self._ticker.start()

    def stats(self) -> Mapping[str, int | float | str]:
        """pages, bytes, free_extents: the region's; the other numbers are this process's."""
        region, sharers = self._here(), self._sharers
        if region is None:
            return {"pages": 0, "bytes": 0}
        with self._lock:
            counts = dict(self._counts)
        processes = 1 if sharers is None else len(sharers.alive()) + 1
        return {
            **region.counts(), "huge_pages": str(self.pages), "processes": processes, "device": self._device(), **counts
        }  # fmt: skip

    def versions(self) -> Mapping[str, str]:
        return {"device": self._device()}

    def _device(self) -> str:
        return f"no: {self._unreached}" if self._reach is None else str(self._reach)

    def close(self) -> None:
        if self._closing.is_set() or os.getpid() != self._pid:  # what a forked child has is the parent's
            return
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=False)  # queued parts settle as TIMEOUT
        until = time.monotonic() + CLOSE_SECONDS - 1
        for thread in list(self._pool._threads):
            thread.join(max(0.0, until - time.monotonic()))
        if self._reaching.acquire(timeout=max(0.0, until - time.monotonic())):  # nobody begins to reach any more
            self._reaching.release()
        if self._reach is not None:
            self._reach.close(until)
        self._ahead.close()
        region, self._region = self._region, None
        if region is not None:
            region.retire()
        self._leave()

    # ---- parts of a batch

    def _here(self) -> Any:
        """The region; None when this is closed, and in a forked child, which has neither its threads nor a place of its
        own among the region's processes."""
        return self._region if os.getpid() == self._pid else None

    def _in_parts(self, batch: PageBatch, write: bool) -> Completion:
        form, reach = self._form(batch.namespace), self._reach
        form.check(batch)
        if batch.memory == "device" and reach is None:
            raise ValueError(
                "this tier takes pages in host memory alone: it was not asked to reach a device, or cannot"
            )
        if self._here() is None:
            return Completion.finished(len(batch), Outcome.REJECTED if write else Outcome.MISS)
        completion = Completion(len(batch), self.dispatcher)
        payload = form.shape.payload_bytes
        if batch.memory == "device":
            assert reach is not None
            parts = max(1, len(batch) * payload // max(1, reach.part_bytes))
            step = max(1, -(-len(batch) // parts))
        else:
            step = max(-(-_PART_BYTES // payload), -(-len(batch) // self.options.threads))
        for first in range(0, len(batch), step):
            last = min(first + step, len(batch))
            work = partial(self._run, write, form, batch, range(first, last), completion)
            if batch.memory == "host":
                self._pool.submit(work)
            elif reach is None or not reach.submit(write, work):
                completion.settle_many(range(first, last), [Outcome.TIMEOUT] * (last - first))
        return completion

    def _run(
        self, write: bool, form: SlotForm, batch: PageBatch, pages: range, completion: Completion,
        lane: _cuda.CopyLane | None = None,
    ) -> None:  # fmt: skip
        region = self._region
        if completion.cancelled.is_set() or self._closing.is_set() or region is None:
            completion.settle_many(pages, [Outcome.TIMEOUT] * len(pages))
            return
        verdicts = np.zeros(len(pages), np.uint8)
        try:
            (self._write if write else self._read)(region, lane, form, batch, pages, verdicts)
            outcomes = [OUTCOMES[verdict] for verdict in verdicts.tolist()]
        except Exception as error:  # a defect of ours costs these pages only
            self._count("errors", 1)
            self._once("error", "memory: %s", error)
            outcomes = [Outcome.FAILED] * len(pages)
        completion.settle_many(pages, outcomes)

    def _read(
        self, region: Any, lane: _cuda.CopyLane | None, form: SlotForm, batch: PageBatch, pages: range,
        verdicts: np.ndarray,
    ) -> None:  # fmt: skip
        part = span(pages)
        keys, addresses = packed(batch.keys, part), form.addresses(batch, part)
        shape = batch.namespace.digest, form.shape.header_bytes, form.lengths
        if lane is None:
            region.read(*shape, keys, addresses, batch.used, verdicts)
        elif self._serves():
            self._ended(region.read_by(lane.mover, *shape, keys, addresses, batch.used, verdicts))
            self._count("to_device", int((verdicts == Verdict.VALID).sum()))
        damaged = np.flatnonzero(verdicts == Verdict.DAMAGED)
        if len(damaged):
            key = keys[damaged[0] * KEY_BYTES : (damaged[0] + 1) * KEY_BYTES]
            self._once(
                "corrupt", "memory: page %s failed its verification: a miss, and healed by the next write", key.hex()
            )
            self._told.sweep(region.changes())

    def _write(
        self, region: Any, lane: _cuda.CopyLane | None, form: SlotForm, batch: PageBatch, pages: range,
        verdicts: np.ndarray,
    ) -> None:  # fmt: skip
        part = span(pages)
        keys, addresses = packed(batch.keys, part), form.addresses(batch, part)
        headers = np.empty((len(pages), form.shape.header_bytes), np.uint8)
        form.headers(batch, part, headers)
        digest = batch.namespace.digest
        shape = digest, form.shape.header_bytes, form.lengths
        if lane is None:
            region.write(*shape, keys, addresses, headers, verdicts)
        elif self._serves():
            self._ended(region.write_by(lane.mover, *shape, keys, addresses, headers, verdicts))
            self._count("from_device", int((verdicts == Verdict.STORED).sum()))
        self._ahead.look()
        self._count("present", int((verdicts == Verdict.PRESENT).sum()))
        self._count("rejected", int((verdicts == Verdict.NO_ROOM).sum()))
        new = np.flatnonzero(verdicts == Verdict.STORED).tolist()
        self._count("stored", len(new))
        if self._listener is not None:
            self._told.sweep(region.changes())
            notes = None if batch.notes is None else batch.notes.only([pages.start + i for i in new])
            self._told.stored(digest, [keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in new], notes)

    def _serves(self) -> bool:
        return self._reach is not None and not self._reach.out

    def _ended(self, why: str) -> None:
        if self._reach is not None:
            self._reach.ended(why)

    def _look(self, digest: bytes, keys: bytes, used: bool = False) -> np.ndarray:
        region, found = self._here(), np.zeros(len(keys) // KEY_BYTES, np.uint8)
        if region is not None:
            region.lookup(digest, keys, used, found)
        return found

    def _form(self, namespace: Namespace) -> SlotForm:
        form = self._forms.get(namespace.digest)
        if form is None:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
            form = self._forms[namespace.digest] = SlotForm(namespace)
        return form

    def _sweep_for_ever(self) -> None:
        while not self._closing.wait(_SWEEP_SECONDS):
            region = self._region
            if region is not None and self._listener is not None:
                self._told.sweep(region.changes())

    def _count(self, what: str, by: int) -> None:
        with self._lock:
            self._counts[what] += by

    def _once(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message + " (said once; stats have the count)", *values)


def _format(options: MemoryOptions, memory: Memory) -> None:
    """Make an empty region of new memory. What describes it is taken now: no page may meet memory that is not there."""
    _, _, data_at, _ = _native.region_layout(options.capacity)
    memory.take(data_at)
    _native.region_format(memory.address, options.capacity)

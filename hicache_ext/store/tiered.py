"""TieredStore: the tiers of one configuration as one store.

Belongs here: which tier serves which page, what goes on to which other tier, deadlines. Does not belong here: how a
tier stores pages (storage_backends), one tier's state (tier.py), who waits for whom (flights.py), the queue of writes
that nobody waits for (behind.py), what a prefix is (policies), or what an engine calls any of it (adapters).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from hicache_ext.config import Config
from hicache_ext.page import Namespace
from hicache_ext.store import to_device
from hicache_ext.store.behind import Behind
from hicache_ext.store.demotion import Demotion
from hicache_ext.store.flights import Flights
from hicache_ext.store.late import LateBackend
from hicache_ext.store.registered import Registered
from hicache_ext.store.staging import read_staged
from hicache_ext.store.tier import Promotion, Recent, Tier, Writing
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    Completion,
    Dispatcher,
    KeyBatch,
    MemoryKind,
    Notes,
    OptionError,
    Outcome,
    PageBatch,
    Residency,
)

logger = logging.getLogger(__name__)

StoreListener = Callable[[int, Residency, bytes, bytes, Notes | None], None]
"""(number of the tier, and as ResidencyListener)."""

#: In a lookup's answer: no tier holds the page.
NO_TIER = 255
STAGING_BYTES = 1 << 30
BEHIND_BYTES = 512 << 20
_BEHIND_PAGES = 16384
_COUNTED_PAGES = 1 << 17
#: A read with less time than this left is not copied for other tiers on its way.
_TIME_TO_COPY = 0.05


class TieredStore:
    """lookup, read and write over tiers in order, fast to slow. Thread-safe."""

    def __init__(
        self, tiers: list[Tier], dispatcher: Dispatcher, behind_bytes: int = BEHIND_BYTES, shared: bool = False
    ) -> None:
        """behind_bytes: credits of each tier's background writes. shared: copies are kept where other processes can map
        them."""
        self.tiers = tiers
        self._dispatcher = dispatcher
        self._reading, self._writing = Flights(copies=True), Flights(copies=False)
        self._lock = threading.Lock()
        self._memory = Registered(tiers, shared)
        self._staging = self._memory.budget(STAGING_BYTES)
        self._closed = False
        self._listener: StoreListener | None = None
        several = len(tiers) > 1
        # By tier. The first tier's takes promotions.
        self.behind = [
            Behind(tier, self._memory.budget(behind_bytes, _BEHIND_PAGES, tier)) for tier in (tiers if several else [])
        ]
        self._uses = Recent(_COUNTED_PAGES)
        self._copier = ThreadPoolExecutor(1, "hicache-copy") if several else None
        self._spaces: dict[bytes, Namespace] = {}
        self._demotions = [
            Demotion(above, below, self._spaces)
            for above, below in zip(tiers, self.behind[1:], strict=False)
            if below.tier.writing is Writing.EVICTED
        ]

    @classmethod
    def open(cls, config: Config) -> TieredStore:
        """Open every tier of `config`. A tier whose server or disk is not there yet is tried again in the background.

        Raises ConfigError, or a backend's OptionError where the configuration is wrong; nothing is left open then.
        """
        dispatcher = Dispatcher()
        tiers: list[Tier] = []
        shared = False
        try:
            for i, chosen in enumerate(config.tiers):
                backend_class, options = config.backend(i)
                shared |= backend_class.shares_memory(options)
                opening = partial(backend_class, options, dispatcher)
                backend: Backend
                try:
                    backend = opening()
                except OptionError:
                    raise
                except Exception as error:
                    backend = LateBackend(chosen.label, opening, error, dispatcher)
                tiers.append(
                    Tier(
                        chosen.label, backend, writing=Writing(chosen.write), hits=chosen.write_hits,
                        promotion=Promotion(chosen.promote),
                    )
                )  # fmt: skip
        except BaseException:
            for tier in tiers:
                tier.backend.close()
            dispatcher.close()
            raise
        return cls(tiers, dispatcher, int(config.background_bytes), shared)

    # -- lookup --------------------------------------------------------------------------------------------------

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        """uint8[n]: the fastest healthy tier that holds each page, NO_TIER where none does. May block on a server."""
        return self._lookup(batch, local=False)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        """As lookup, from memory only: what a scheduler thread may call."""
        return self._lookup(batch, local=True)

    def seconds(self, found: np.ndarray, namespace: Namespace) -> np.ndarray:
        """float64[n]: what each page of a lookup's answer is expected to cost, as measured; NO_TIER costs infinity.

        A tier's latency is shared by the pages that come from it. 0 where nothing has been read from a tier yet.
        """
        cost = np.full(len(found), np.inf)
        for index in np.unique(found):
            if index != NO_TIER:
                chosen = found == index
                pages = int(chosen.sum())
                cost[chosen] = self.tiers[index].cost.seconds(pages, namespace.layout.payload_bytes) / pages
        return cost

    def _lookup(self, batch: KeyBatch, local: bool) -> np.ndarray:
        found = np.full(len(batch), NO_TIER, np.uint8)
        if self._closed:
            return found
        now = time.monotonic()
        for i, tier in enumerate(self.tiers):
            if not tier.reads.usable(now):
                continue
            asked = np.flatnonzero((found == NO_TIER) & ~tier.lied.flags(batch))
            if not len(asked):
                continue
            part = batch if len(asked) == len(batch) else batch.only(asked.tolist())
            ask = tier.backend.lookup_local if local else tier.backend.lookup
            try:
                there = ask(part) != 0
            except Exception:
                # A backend may raise only for a programming error; that too must not cost a request.
                logger.exception("tier %s: lookup raised; its pages count as absent", tier.name)
                continue
            found[asked[there]] = i
            if not local and not tier.backend.capabilities.knows:
                self._learn(i, part, there)
            if not (found == NO_TIER).any():
                break
        return found

    def _learn(self, index: int, part: KeyBatch, there: np.ndarray) -> None:
        """What a server said of these pages: absent ones may be sent again, and present ones were claimed."""
        namespace = part.namespace.digest
        if self._listener is not None:
            self._saw(index, Residency.STORED, namespace, [part.key(page) for page in np.flatnonzero(there).tolist()])
            self._saw(index, Residency.REMOVED, namespace, [part.key(page) for page in np.flatnonzero(~there).tolist()])
        for page in range(len(part) if self.behind else 0):
            if there[page]:
                self.tiers[index].claimed.add(namespace, part.key(page))
            else:
                self.behind[index].forget(namespace, part.key(page))

    # -- device memory: see to_device ------------------------------------------------------------------------------

    @property
    def reads_to_device(self) -> int | None:
        """Number of the tier whose pages can be read into device memory; None where there is none now."""
        return to_device.reading_tier(self.tiers)

    @property
    def writes_from_device(self) -> bool:
        """Whether pages in device memory can be written now."""
        return to_device.can_write(self.tiers)

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, batch: PageBatch, deadline: float | None = None) -> Completion:
        """Fill the pages' buffers; an outcome per page. A page that one tier cannot give is asked of the next.

        deadline: time.monotonic() seconds by which every page has its outcome, late ones as TIMEOUT; such a read
        goes through memory of our own. None: read straight into the buffers and wait for the device. Cancelled, no
        further tier is asked, and a read with a deadline ends at once. Pages in device memory have no deadline, and
        come from the one tier that `reads_to_device` names.
        """
        if self._closed:
            return Completion.finished(len(batch), Outcome.MISS)
        if batch.memory == "device":
            self._spaces[batch.namespace.digest] = batch.namespace
            return to_device.read(self.tiers, self.behind, batch)
        result = Completion(len(batch), self._dispatcher)
        # A read with a deadline neither leads nor follows: a follower would wait for its leader, and a leader that
        # gives up in time would take its followers with it.
        pages = list(range(len(batch))) if deadline is not None else self._reading.begin(batch, result)
        if pages:
            self._spaces[batch.namespace.digest] = batch.namespace
            self._read(batch, pages, result, deadline, 0, [Outcome.MISS] * len(pages))
        return result

    def _read(
        self, batch: PageBatch, pages: list[int], result: Completion, deadline: float | None, first: int,
        before: list[Outcome],
    ) -> None:  # fmt: skip
        """Ask the tiers from number `first` on. before: what a page's outcome is when none of them has it."""
        if result.cancelled.is_set():
            self._settle_read(batch, pages, bytes([Outcome.TIMEOUT]) * len(pages), result, deadline)
            return
        mine = batch if len(pages) == len(batch) else batch.select(pages)
        where = self._where(mine, first, deadline)
        for index in np.unique(where):
            chosen = np.flatnonzero(where == index).tolist()
            theirs, so_far = [pages[i] for i in chosen], [before[i] for i in chosen]
            if index == NO_TIER:
                self._settle_read(batch, theirs, bytes(so_far), result, deadline)
                continue
            tier = self.tiers[index]
            part = mine if len(chosen) == len(mine) else mine.select(chosen)
            since = time.monotonic()
            if not tier.reads.allow(time.monotonic()):
                sent = Completion.finished(len(part), Outcome.MISS)
            else:
                try:
                    if deadline is None:
                        sent = tier.backend.read(part)
                    else:
                        sent = read_staged(tier.backend, part, deadline, self._staging, self._dispatcher)
                except Exception:
                    # A backend may raise only for a programming error; that too must not cost a request.
                    logger.exception("%s: read raised; the pages count as failed", tier.name)
                    sent = Completion.finished(len(part), Outcome.FAILED)
            result.on_cancel(partial(self._cancel, batch, deadline, sent))
            sent.on_done(partial(self._arrived, batch, theirs, result, deadline, int(index), so_far, since=since))

    def _cancel(self, batch: PageBatch, deadline: float | None, sent: Completion) -> None:
        """Whoever asked does not want it any more, which is no concern of those that wait for the same pages."""
        if deadline is not None or not self._reading.is_followed(batch):
            sent.cancel()

    def _where(self, batch: PageBatch, first: int, deadline: float | None) -> np.ndarray:
        """uint8[n]: which tier to ask for each page. Servers are not asked twice: a read says as much as a lookup."""
        where = np.full(len(batch), NO_TIER, np.uint8)
        now = time.monotonic()
        if deadline is not None and first and now >= deadline:
            return where
        if len(self.tiers) == 1 and not first:
            where[~self.tiers[0].lied.flags(batch)] = 0
            return where
        for i in range(first, len(self.tiers)):
            tier = self.tiers[i]
            if not tier.reads.usable(now):
                continue
            asked = np.flatnonzero((where == NO_TIER) & ~tier.lied.flags(batch))
            if len(asked) and tier.backend.capabilities.knows:
                asked = asked[tier.backend.lookup(batch.only(asked.tolist())) != 0]
            where[asked] = i
        return where

    def _arrived(
        self, batch: PageBatch, pages: list[int], result: Completion, deadline: float | None, index: int,
        before: list[Outcome], done: Completion, since: float,
    ) -> None:  # fmt: skip
        """A tier has answered for these pages."""
        tier, outcomes, namespace = self.tiers[index], done.outcomes, batch.namespace.digest
        if not result.cancelled.is_set():  # what came late then is not the tier's fault
            tier.account("read", outcomes)
        good = [page for page, outcome in zip(pages, outcomes, strict=True) if outcome == Outcome.HIT]
        if self._listener is not None:
            gone = [batch.key(p) for p, o in zip(pages, outcomes, strict=True) if o in (Outcome.MISS, Outcome.CORRUPT)]
            self._saw(index, Residency.STORED, namespace, [batch.key(page) for page in good])
            self._saw(index, Residency.REMOVED, namespace, gone)
        if good:
            tier.cost.learn(len(good) * batch.namespace.layout.payload_bytes, time.monotonic() - since)
            self._deliver(batch, good, result, deadline, index)
        bad, told = [], []
        for page, outcome, earlier in zip(pages, outcomes, before, strict=True):
            if outcome == Outcome.HIT:
                continue
            bad.append(page)
            told.append(Outcome(outcome) if earlier == Outcome.MISS else earlier)
            if self.behind and (
                outcome == Outcome.CORRUPT or (outcome == Outcome.MISS and tier.claims(namespace, batch.key(page)))
            ):
                tier.lied.add(namespace, batch.key(page))
                self.behind[index].forget(namespace, batch.key(page))
        if not bad:
            return
        if index + 1 < len(self.tiers) and (deadline is None or time.monotonic() < deadline):
            self._read(batch, bad, result, deadline, index + 1, told)
        else:
            self._settle_read(batch, bad, bytes(told), result, deadline)

    def _deliver(
        self, batch: PageBatch, pages: list[int], result: Completion, deadline: float | None, index: int
    ) -> None:
        """Give these good pages to whoever asked, after a copy for the tiers that should have them as well."""
        outcomes = bytes([Outcome.HIT]) * len(pages)
        late = deadline is not None and time.monotonic() > deadline - _TIME_TO_COPY
        wanted = [] if late or self._closed else self._wanted(batch, pages, index)
        if not wanted or self._copier is None:
            self._settle_read(batch, pages, outcomes, result, deadline)
            return

        def copy() -> None:
            try:
                for behind, chosen in wanted:
                    behind.offer(batch, chosen)
            finally:
                self._settle_read(batch, pages, outcomes, result, deadline)

        try:
            self._copier.submit(copy)
        except RuntimeError:  # closed meanwhile
            self._settle_read(batch, pages, outcomes, result, deadline)

    def _wanted(self, batch: PageBatch, pages: list[int], index: int) -> list[tuple[Behind, list[int]]]:
        """Which tiers should have which of these pages, that were just read from tier `index`."""
        if not self.behind:
            return []
        namespace = batch.namespace.digest
        selective = [
            behind for behind in self.behind[1:]
            if behind.tier.writing is Writing.HITS and behind.tier is not self.tiers[index]
        ]  # fmt: skip
        promotion = self.tiers[index].promotion if index else Promotion.NEVER
        if not selective and promotion is Promotion.NEVER:
            return []
        uses = [self._uses.add(namespace, batch.key(page)) for page in pages]
        wanted = [
            (behind, [page for page, count in zip(pages, uses, strict=True) if count >= behind.tier.hits])
            for behind in selective
        ]
        if promotion is not Promotion.NEVER:
            least = 2 if promotion is Promotion.SECOND_HIT else 1
            promoted = [page for page, count in zip(pages, uses, strict=True) if count >= least]
            for page in promoted:
                self.behind[0].forget(namespace, batch.key(page))  # the first tier did not have it
            wanted.append((self.behind[0], promoted))
            self.tiers[0].count("promoted", len(promoted))
        return [(behind, chosen) for behind, chosen in wanted if chosen]

    def _settle_read(
        self, batch: PageBatch, pages: list[int], outcomes: bytes, result: Completion, deadline: float | None
    ) -> None:
        if deadline is None:
            # Followers first: after the completion the leader's buffers are no longer ours to copy from.
            self._reading.end(batch, pages, outcomes)
        result.settle_many(pages, outcomes)

    # -- write ---------------------------------------------------------------------------------------------------

    def write(self, batch: PageBatch) -> Completion:
        """Store the pages in the first tier; an outcome per page. The buffers are free again at the completion.

        Further tiers get copies in the background, by their rules, and have no part in the outcome. Pages in device
        memory: where `writes_from_device` says so.
        """
        if self._closed:
            return Completion.finished(len(batch), Outcome.REJECTED)
        if batch.memory == "device" and not self.writes_from_device:
            raise ValueError("pages in device memory cannot be copied for further tiers, see writes_from_device")
        result = Completion(len(batch), self._dispatcher)
        pages = self._writing.begin(batch, result)
        if not pages:
            return result
        self._spaces[batch.namespace.digest] = batch.namespace
        tier = self.tiers[0]
        part = batch if len(pages) == len(batch) else batch.select(pages)
        if not tier.writes.allow(time.monotonic()):
            tier.count("write_unhealthy", len(pages))
            sent = Completion.finished(len(part), Outcome.REJECTED)
        else:
            try:
                sent = tier.backend.write(part)
            except Exception:
                logger.exception("%s: write raised; the pages count as failed", tier.name)
                sent = Completion.finished(len(part), Outcome.FAILED)
        # Copied while the first tier writes; nobody has the completion yet, so the pages are still ours to read.
        for behind in self.behind[1:]:
            if behind.tier.writing is Writing.THROUGH:
                behind.offer(batch, pages)

        def landed(done: Completion) -> None:
            tier.account("write", done.outcomes)
            for page, outcome in zip(pages, done.outcomes, strict=True):
                if outcome == Outcome.HIT:
                    tier.lied.drop(batch.namespace.digest, batch.key(page))
            self._writing.end(batch, pages, done.outcomes)
            result.settle_many(pages, done.outcomes)

        sent.on_done(landed)
        return result

    # -- the rest ------------------------------------------------------------------------------------------------

    def remove(self, batch: KeyBatch) -> int:
        """Forget these pages in every tier; how many copies there were."""
        for behind in self.behind:
            for page in range(len(batch)):
                behind.forget(batch.namespace.digest, batch.key(page))
        return sum(tier.backend.remove(batch) for tier in self.tiers)

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        """Forget these namespaces in every tier that can."""
        spaces = list(namespaces)
        for behind in self.behind:
            behind.clear({space.digest for space in spaces})
        for tier in self.tiers:
            try:
                tier.backend.clear(spaces)
            except NotImplementedError:
                logger.warning("tier %s: cannot forget single namespaces; its pages stay", tier.name)

    def reach_device(self, ordinal: int) -> None:
        """The caller's pools lie on this CUDA device: `reads_to_device` and `writes_from_device` say afterwards what
        comes of it. Call it before they are asked, and before memory of the device is registered. May wait."""
        for tier in self.tiers:
            try:
                tier.backend.reach_device(ordinal)
            except Exception:
                logger.exception("tier %s: cannot reach device %s: pages go through host memory", tier.name, ordinal)

    def register_memory(self, address: int, length: int, memory: MemoryKind = "host") -> None:
        """Tell every tier that takes this kind of memory where the caller's pool lies."""
        for tier in self.tiers:
            if memory in tier.backend.capabilities.memory:
                tier.backend.register_memory(address, length)

    def on_residency(self, listener: StoreListener | None) -> None:
        """Who hears of stored and removed pages, of all tiers: what backends report, and what was seen on those that
        cannot know by themselves. Set once, before the first page."""
        self._listener = listener
        for index, tier in enumerate(self.tiers):
            tier.backend.on_residency(None if listener is None else partial(listener, index))

    def _saw(self, index: int, change: Residency, namespace: bytes, keys: list[bytes]) -> None:
        """A server said that it has these pages, or has not."""
        if self._listener is not None and keys and not self.tiers[index].backend.capabilities.knows:
            self._dispatcher.post(partial(self._listener, index, change, namespace, b"".join(keys), None))

    def settled(self, timeout: float) -> bool:
        """Wait until nothing is queued or on its way in the background; whether that came within `timeout` seconds."""
        until = time.monotonic() + timeout
        while not all(behind.idle() for behind in self.behind):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def stats(self) -> dict[str, Mapping[str, int | float | str]]:
        """Per tier: the backend's own numbers, outcomes by kind ("read_hit", ...), the background queue, and health."""
        return {
            tier.name: {
                **tier.backend.stats(),
                **tier.counts,
                **(self.behind[i].stats() if self.behind else {}),
                "read_health": tier.reads.state.value,
                "write_health": tier.writes.state.value,
                "health_reason": tier.reads.reason or tier.writes.reason,
                "lied_pages": len(tier.lied),
                "batch_ms": round(tier.cost.batch_seconds * 1e3, 3),
                "gb_per_s": round(1e-9 / tier.cost.byte_seconds, 3) if tier.cost.byte_seconds else 0.0,
            }
            for i, tier in enumerate(self.tiers)
        }

    def close(self) -> None:
        """Close every tier, at the same time, within their own limit. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        until = time.monotonic() + CLOSE_SECONDS
        self._memory.close()
        for demotion in self._demotions:
            demotion.close()
        stoppers = [threading.Thread(target=behind.close, args=(until - 1,), daemon=True) for behind in self.behind]
        closers = [threading.Thread(target=tier.backend.close, daemon=True) for tier in self.tiers]
        for stage in (stoppers, closers):
            for thread in stage:
                thread.start()
            for thread in stage:
                thread.join(max(0.0, until - time.monotonic()))
        if self._copier is not None:
            self._copier.shutdown(wait=False)
        for behind in self.behind:
            behind.free()
        self._staging.close()
        self._dispatcher.close()

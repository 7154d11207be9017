"""TieredStore: the tiers of one configuration as one store.

Belongs here: which tier serves which page, single flight, health, deadlines. Does not belong here: how a tier stores
pages (storage_backends), what a prefix is (policies), or what an engine calls any of it (adapters).
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from hicache_ext.config import Config
from hicache_ext.page import Namespace
from hicache_ext.store.health import Health
from hicache_ext.store.staging import StagingBudget, read_staged
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
    ResidencyListener,
)

logger = logging.getLogger(__name__)

#: In a lookup's answer: no tier holds the page.
NO_TIER = 255
STAGING_BYTES = 1 << 30
_BAD = frozenset({Outcome.FAILED, Outcome.TIMEOUT})


@dataclass
class Tier:
    """One backend with its name and its health, reads and writes apart: a full disk still serves what it holds."""

    name: str
    backend: Backend
    reads: Health = field(default_factory=Health)
    writes: Health = field(default_factory=Health)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class _Flight:
    """One page on its way: who else wants it. `batch` and `page` say where the leader's bytes will be."""

    batch: PageBatch
    page: int
    followers: list[tuple[PageBatch, int, Completion]] = field(default_factory=list)


class TieredStore:
    """lookup, read and write over tiers in order, fast to slow. Thread-safe."""

    def __init__(self, tiers: list[Tier], dispatcher: Dispatcher) -> None:
        self.tiers = tiers
        self._dispatcher = dispatcher
        self._flights: dict[tuple[str, bytes, bytes], _Flight] = {}
        self._lock = threading.Lock()
        self._staging = StagingBudget(STAGING_BYTES)
        self._closed = False

    @classmethod
    def open(cls, config: Config) -> TieredStore:
        """Open every tier of `config`. Raises ConfigError or the backend's own OptionError; nothing is left open."""
        dispatcher = Dispatcher()
        tiers: list[Tier] = []
        try:
            for i, chosen in enumerate(config.tiers):
                backend, options = config.backend(i)
                tiers.append(Tier(chosen.label, backend(options, dispatcher)))
        except BaseException:
            for tier in tiers:
                tier.backend.close()
            dispatcher.close()
            raise
        return cls(tiers, dispatcher)

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        """uint8[n]: the fastest healthy tier that holds each page, NO_TIER where none does. May block on a server."""
        return self._lookup(batch, local=False)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        """As lookup, from memory only: what a scheduler thread may call."""
        return self._lookup(batch, local=True)

    def read(self, batch: PageBatch, deadline: float | None = None) -> Completion:
        """Fill the pages' buffers; an outcome per page.

        deadline: time.monotonic() seconds by which every page has its outcome, late ones as TIMEOUT; such a read
        goes through memory of our own. None: read straight into the buffers and wait for the device.
        """
        if self._closed:
            return Completion.finished(len(batch), Outcome.MISS)
        return self._fly("read", batch, deadline)

    def write(self, batch: PageBatch) -> Completion:
        """Store the pages in the first tier; an outcome per page. The buffers are free again at the completion."""
        if self._closed:
            return Completion.finished(len(batch), Outcome.REJECTED)
        return self._fly("write", batch, None)

    def remove(self, batch: KeyBatch) -> int:
        """Forget these pages in every tier; how many copies there were."""
        return sum(tier.backend.remove(batch) for tier in self.tiers)

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        """Forget these namespaces in every tier."""
        spaces = list(namespaces)
        for tier in self.tiers:
            tier.backend.clear(spaces)

    def register_memory(self, address: int, length: int) -> None:
        """Tell every tier where the caller's pool lies."""
        for tier in self.tiers:
            tier.backend.register_memory(address, length)

    def on_residency(self, listener: ResidencyListener | None) -> None:
        """Who hears of stored and removed pages, of all tiers."""
        for tier in self.tiers:
            tier.backend.on_residency(listener)

    def stats(self) -> dict[str, Mapping[str, int | float | str]]:
        """Per tier: the backend's own numbers, outcomes by kind ("read_hit", ...), and health."""
        return {
            tier.name: {
                **tier.backend.stats(),
                **tier.counts,
                "read_health": tier.reads.state.value,
                "write_health": tier.writes.state.value,
                "health_reason": tier.reads.reason or tier.writes.reason,
            }
            for tier in self.tiers
        }

    def close(self) -> None:
        """Close every tier, at the same time, within their own limit. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        closers = [threading.Thread(target=tier.backend.close, daemon=True) for tier in self.tiers]
        for closer in closers:
            closer.start()
        until = time.monotonic() + CLOSE_SECONDS
        for closer in closers:
            closer.join(max(0.0, until - time.monotonic()))
        self._dispatcher.close()

    def _lookup(self, batch: KeyBatch, local: bool) -> np.ndarray:
        found = np.full(len(batch), NO_TIER, np.uint8)
        if self._closed:
            return found
        now = time.monotonic()
        for i, tier in enumerate(self.tiers):
            if not tier.reads.usable(now):
                continue
            ask = tier.backend.lookup_local if local else tier.backend.lookup
            found[(ask(batch) != 0) & (found == NO_TIER)] = i
            if not (found == NO_TIER).any():
                break
        return found

    def _fly(self, what: str, batch: PageBatch, deadline: float | None) -> Completion:
        """Send each page that nobody else has in flight; join the flight of each that somebody has.

        A read with a deadline neither leads nor follows: a follower would wait for its leader, and a leader that
        gives up in time would take its followers with it.
        """
        result = Completion(len(batch), self._dispatcher)
        if deadline is not None:
            self._send(what, batch, list(range(len(batch))), result, deadline)
            return result
        leading: list[int] = []
        with self._lock:
            for page in range(len(batch)):
                flight = self._flights.get((what, batch.namespace.digest, batch.key(page)))
                if flight is not None:
                    flight.followers.append((batch, page, result))
                else:
                    self._flights[what, batch.namespace.digest, batch.key(page)] = _Flight(batch, page)
                    leading.append(page)
        if leading:
            self._send(what, batch, leading, result, None)
        return result

    def _send(self, what: str, batch: PageBatch, pages: list[int], result: Completion, deadline: float | None) -> None:
        """Hand these pages to the tiers that should have them; settle them in `result` as each tier is done."""
        reading = what == "read"
        mine = batch if len(pages) == len(batch) else batch.select(pages)
        if reading and len(self.tiers) > 1:
            where = self._lookup(mine, local=False)
        else:
            where = np.zeros(len(pages), np.uint8)
        now = time.monotonic()
        for index in np.unique(where):
            chosen = np.flatnonzero(where == index).tolist()
            theirs = [pages[i] for i in chosen]
            if index == NO_TIER:
                self._land(what, batch, theirs, result, bytes([Outcome.MISS]) * len(theirs))
                continue
            tier = self.tiers[index]
            health = tier.reads if reading else tier.writes
            if not health.allow(now):
                refused = Outcome.MISS if reading else Outcome.REJECTED
                self._land(what, batch, theirs, result, bytes([refused]) * len(theirs), tier)
                continue
            part = mine if len(chosen) == len(mine) else mine.select(chosen)
            try:
                if not reading:
                    sent = tier.backend.write(part)
                elif deadline is None:
                    sent = tier.backend.read(part)
                else:
                    sent = read_staged(tier.backend, part, deadline, self._staging, self._dispatcher)
            except Exception:
                # A backend may raise only for a programming error; that too must not cost a request.
                logger.exception("%s: %s raised; the pages count as failed", tier.name, what)
                sent = Completion.finished(len(part), Outcome.FAILED)
            self._follow(what, batch, theirs, result, sent, tier)

    def _follow(
        self, what: str, batch: PageBatch, pages: list[int], result: Completion, sent: Completion, tier: Tier
    ) -> None:
        def landed(done: Completion) -> None:
            self._account(what, tier, done.outcomes)
            self._land(what, batch, pages, result, done.outcomes, tier)

        sent.on_done(landed)

    def _land(
        self,
        what: str,
        batch: PageBatch,
        pages: list[int],
        result: Completion,
        outcomes: bytes | bytearray,
        tier: Tier | None = None,
    ) -> None:
        """Settle the pages, their followers first: after that the leader's buffers are no longer ours to copy from."""
        for page, outcome in zip(pages, outcomes, strict=True):
            flight_key = (what, batch.namespace.digest, batch.key(page))
            with self._lock:
                flight = self._flights.get(flight_key)
                if flight is None or flight.batch is not batch or flight.page != page:
                    continue
                del self._flights[flight_key]
            for theirs, their_page, their_result in flight.followers:
                if what == "read" and outcome == Outcome.HIT and not _copy_page(batch, page, theirs, their_page):
                    their_result.settle(their_page, Outcome.MISS)
                else:
                    their_result.settle(their_page, Outcome(outcome))
        if tier is not None:
            with self._lock:
                for value in outcomes:
                    name = f"{what}_{Outcome(value).name.lower()}"
                    tier.counts[name] = tier.counts.get(name, 0) + 1
        result.settle_many(pages, outcomes)

    def _account(self, what: str, tier: Tier, outcomes: bytes | bytearray) -> None:
        """One batch's outcomes to the tier's health: a batch with no good page and a bad one is a bad batch."""
        health = tier.reads if what == "read" else tier.writes
        bad = [Outcome(value) for value in outcomes if value in _BAD]
        if bad and Outcome.HIT not in outcomes:
            if health.bad(time.monotonic(), f"{what}: {bad[0].name.lower()}"):
                logger.warning(
                    "tier %s: unhealthy for %ss after repeated failures (%s); requests go on without it",
                    tier.name, what, bad[0].name.lower(),
                )  # fmt: skip
        elif Outcome.HIT in outcomes and health.good():
            logger.warning("tier %s: healthy again for %ss", tier.name, what)


def _copy_page(source: PageBatch, page: int, target: PageBatch, their_page: int) -> bool:
    """Copy one page's bytes between two batches' buffers; False (nothing copied) when their sizes differ."""
    ours = range(int(source.offsets[page]), int(source.offsets[page + 1]))
    theirs = range(int(target.offsets[their_page]), int(target.offsets[their_page + 1]))
    if [int(source.lengths[j]) for j in ours] != [int(target.lengths[j]) for j in theirs]:
        return False
    for i, j in zip(ours, theirs, strict=True):
        ctypes.memmove(int(target.addresses[j]), int(source.addresses[i]), int(source.lengths[i]))
    return True

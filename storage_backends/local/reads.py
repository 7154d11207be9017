"""Reads of the local tier: from a batch of keys to verified pages.

Belongs here: the order of steps of a read, and what follows from each page's end. Does not belong here: memory and
judgement of a transfer (slots.py), or the index (index.py).
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from storage_backends.base import Completion, Outcome, PageBatch
from storage_backends.local.directory import FOLDERS
from storage_backends.local.disk import Disk
from storage_backends.local.extents import Extent
from storage_backends.local.flights import begin_all
from storage_backends.local.folder import Folder
from storage_backends.local.headers import Found, found_in
from storage_backends.local.index import Pinned
from storage_backends.local.slots import MEMORY_TROUBLE, CancelFlag, SlotGroup, Verdict
from storage_backends.local.tier import Tier

_HIT = bytes((Outcome.HIT,))


@dataclass(slots=True, eq=False)
class _Flight:
    """Pages of one batch and one disk whose I/O begins together. held, extents: by place in the group."""

    completion: Completion
    disk: Disk
    held: Pinned
    extents: list[Extent]
    group: SlotGroup | None = None

    def after(self, count: int) -> _Flight | None:
        """All but the first `count` pages; None when there are no more."""
        left = range(count, len(self.extents))
        return _Flight(self.completion, self.disk, _pages_of(self.held, left), self.extents[count:]) if left else None


class Reads:
    """Thread-safe; takes the tier's lock."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    def read(self, batch: PageBatch) -> Completion:
        tier = self._tier
        completion, cancelled = tier.completion(len(batch))
        with tier.lock:
            tier.expiry.meet(batch.namespace)
            held = tier.index.pin(batch.namespace.digest, batch.keys, batch.parents, batch.used)
            known = len(held.pages) == len(batch) or tier.several
            if not known:
                tier.index.unpin(held.handles)
            elif not (unopened := self._unopened(held)):
                held, flights = self._prepare(completion, held)
        if not known:  # what other writers stored is looked for only when something is missing
            tier.disks.refresh()
            with tier.lock:
                held = tier.index.pin(batch.namespace.digest, batch.keys, batch.parents, batch.used)
                if not (unopened := self._unopened(held)):
                    held, flights = self._prepare(completion, held)
        if unopened:
            tier.open(unopened)
            with tier.lock:
                held, flights = self._prepare(completion, held)
        if len(held.pages) < len(batch):
            missing = list(set(range(len(batch))).difference(held.pages))
            completion.settle_many(missing, [Outcome.MISS] * len(missing))
        begin_all(flights, partial(self._begin, batch, cancelled), self._abandon, tier.several)
        return completion

    def _begin(self, batch: PageBatch, cancelled: CancelFlag, flight: _Flight, timeout: float | None) -> _Flight | None:
        io = flight.disk.io(batch)
        bounced = io.must_bounce(batch)
        held, ended = flight.held, partial(self._done, flight)
        group = io.group(batch, held.pages, False, bounced, flight.extents, held.slots, cancelled, ended, timeout)
        if group is None:
            return flight
        flight.group = group
        rest = flight.after(len(group))
        self._tier.count_way(bounced, len(group))
        flight.disk.slots.submit_slots(group)
        return rest

    def _abandon(self, flight: _Flight) -> None:
        """The disk went out of use before these pages' turn came."""
        places = range(len(flight.extents))
        with self._tier.lock:
            flight.disk.flying -= len(places)
            self._unpin(flight, places, {})
        flight.completion.settle_many(flight.held.pages, [Outcome.MISS] * len(places))

    def _unopened(self, held: Pinned) -> list[tuple[Folder, int]]:
        return self._tier.unopened(zip(held.folders, held.extents, strict=True))

    def _prepare(self, completion: Completion, held: Pinned) -> tuple[Pinned, list[_Flight]]:
        """The pages whose extents are there, by disk."""
        held, extents = self._open(held)
        for extent, pins in Counter(extents).items():
            extent.pins += pins
        flights = self._parted(completion, held, extents)
        for flight in flights:
            flight.disk.begun(len(flight.extents))
        return held, flights

    def _parted(self, completion: Completion, held: Pinned, extents: list[Extent]) -> list[_Flight]:
        """By disk."""
        numbers = [folder // FOLDERS for folder in held.folders]
        bays = self._tier.disks.bays
        flights = []
        for number in sorted(set(numbers)):
            disk = bays[number].disk
            assert disk is not None  # an extent of it is open
            if len(set(numbers)) == 1:
                return [_Flight(completion, disk, held, extents)]
            at = [i for i, other in enumerate(numbers) if other == number]
            flights.append(_Flight(completion, disk, _pages_of(held, at), [extents[i] for i in at]))
        return flights

    def _open(self, held: Pinned) -> tuple[Pinned, list[Extent]]:
        """The pages' extents; pages whose extent is not there are let go of."""
        tier = self._tier
        where = list(zip(held.folders, held.extents, strict=True))
        opened = {place: tier.extent(*place) for place in set(where)}
        extents = {place: extent for place, extent in opened.items() if extent is not None}
        if len(extents) == len(opened):
            return held, [extents[place] for place in where]
        lost = [handle for place, handle in zip(where, held.handles, strict=True) if place not in extents]
        for handle in lost:
            page = tier.index.pinned(handle)
            # A disk that is being opened has its pages known before it is used.
            if tier.disks.of(page.folder) is not None:
                tier.drop(page, "lost")
        tier.index.unpin(lost)
        there = [i for i, place in enumerate(where) if place in extents]
        return _pages_of(held, there), [extents[where[i]] for i in there]

    def _done(self, flight: _Flight, places: Sequence[int], moved: Sequence[int], verdicts: bytes) -> None:
        group = flight.group
        assert group is not None
        outcomes: Sequence[int] = _HIT * len(places)
        good = verdicts.count(Verdict.VALID) == len(verdicts)
        others: dict[int, Found] = {}
        if not good:
            others = {
                place: found
                for place, verdict in zip(places, verdicts, strict=True)
                if verdict == Verdict.OTHER_PAGE and (found := found_in(group.numbers[place], group.header(place)))
            }
        group.io.give(group, places)
        with self._tier.lock:
            flight.disk.ended(moved)
            if good:
                self._unpin(flight, places, others)
            else:
                outcomes = [
                    self._outcome(flight, place, result, verdict)
                    for place, result, verdict in zip(places, moved, verdicts, strict=True)
                ]
        if not good:
            # The log says that they are gone before their slots are cleared: a kill leaves nothing that it names.
            self._tier.writers.flush()
            for place, outcome in zip(places, outcomes, strict=True):
                if outcome == Outcome.CORRUPT and flight.held.own[place]:
                    self._tier.erase(flight.extents[place], flight.held.slots[place])
            with self._tier.lock:
                self._unpin(flight, places, others)
        flight.completion.settle_many([flight.held.pages[place] for place in places], outcomes)

    def _outcome(self, flight: _Flight, place: int, moved: int, verdict: int) -> Outcome:
        """What became of one page, and what follows for the index. The page is still pinned."""
        tier = self._tier
        handle = flight.held.handles[place]
        if moved == -errno.ECANCELED:
            return Outcome.TIMEOUT
        if moved == -MEMORY_TROUBLE:
            tier.counts["memory_errors"] += 1
            return Outcome.FAILED
        if moved < 0:
            tier.say(f"read {errno.errorcode.get(-moved, -moved)}", "a read failed with %s", os.strerror(-moved))
            tier.counts["io_errors"] += 1
            if tier.index.fail(handle) > 1:  # once may be the bus; twice is this page
                tier.drop(tier.index.pinned(handle), "io_error")
            return Outcome.FAILED
        if verdict == Verdict.VALID:
            return Outcome.HIT
        page = tier.index.pinned(handle)
        if verdict == Verdict.OTHER_PAGE:
            # Its writer reused the slot, the end of every eviction; or our log is older than our data, and what it
            # names stood in the way of the page that is there (`_unpin` takes that in).
            tier.drop(page, "stale" if page.own else "lost_race")
            return Outcome.MISS
        what = Verdict(verdict).name.lower().replace("_", " ")
        tier.say("corrupt", "a page failed verification (%s) and is quarantined", what)
        tier.drop(page, "corrupt")
        return Outcome.CORRUPT

    def _unpin(self, flight: _Flight, places: Sequence[int], others: Mapping[int, Found]) -> None:
        """others: what the slots hold in which another page than ours was found."""
        held, extents = flight.held, flight.extents
        writer = flight.disk.directory.writer
        freed = self._tier.index.unpin([held.handles[place] for place in places])
        for extent, pins in Counter([extents[place] for place in places]).items():
            if writer is not None and writer.extents.get(extent.number) is extent:
                writer.recent.count(hit=pins * extent.header.slot_bytes)
            extent.unpin(pins)
        if writer is None or not any(freed):
            return
        for place, last in zip(places, freed, strict=True):
            # A page of ours that was removed while it was being read: its slot could not be freed then.
            if last and held.own[place]:
                writer.give_back(extents[place], held.slots[place])
                if place in others:
                    writer.recover(extents[place], [others[place]], writer.newest_generation)


def _pages_of(held: Pinned, at: Sequence[int]) -> Pinned:
    return Pinned._make([column[i] for i in at] for column in held)

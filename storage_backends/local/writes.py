"""Writes of the local tier: from a batch of pages to slots that hold them.

Belongs here: the order of steps of a write, and what follows from each page's end. Does not belong here: which pages
get room (room.py), memory and sealing of a transfer (slots.py), or the log (writer.py).
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from hicache_ext.page import split_keys
from storage_backends.base import Completion, Outcome, PageBatch, Residency
from storage_backends.format import SlotShape
from storage_backends.local.disk import Disk
from storage_backends.local.flights import begin_all
from storage_backends.local.options import admission
from storage_backends.local.policy import Admission
from storage_backends.local.room import Grant, Part, Room
from storage_backends.local.slots import MEMORY_TROUBLE, CancelFlag, SlotGroup, rows
from storage_backends.local.tier import Tier
from storage_backends.local.writer import Writer

_HIT = bytes((Outcome.HIT,))


@dataclass(slots=True, eq=False)
class _Flight:
    """Pages of one batch and one disk whose I/O begins together. part: by place in the group."""

    completion: Completion
    batch: PageBatch
    part: Part
    time_ns: int
    group: SlotGroup | None = None

    @property
    def disk(self) -> Disk:
        return self.part.disk

    def pages(self, places: Iterable[int]) -> list[int]:
        """Their numbers in the batch."""
        return [self.part.pages[place] for place in places]


class Writes:
    """Thread-safe; takes the tier's lock."""

    def __init__(self, tier: Tier, room: Room) -> None:
        self._tier = tier
        self._room = room
        self._admissions: dict[bytes, Admission] = {}

    def write(self, batch: PageBatch) -> Completion:
        tier = self._tier
        completion, cancelled = tier.completion(len(batch))
        digest = batch.namespace.digest
        shape = SlotShape.of_namespace(batch.namespace)
        tier.writers.claim(digest, tier.lock)
        tier.disks.refresh()  # what another writer has is not written twice
        asks = tier.options.admission != "always"
        admit = partial(self._admit, batch, shape.slot_bytes) if asks else None
        failed: set[Disk] = set()
        problem: OSError | None = None
        while True:
            with tier.lock:
                tier.expiry.meet(batch.namespace)
                # Links parents, touches the chain.
                found = tier.index.lookup(digest, batch.keys, batch.parents, False).tolist()
                wanted = [page for page, there in enumerate(found) if not there]
                planned = []
                if wanted:
                    planned = tier.writers.plan(batch.namespace, shape, rows(batch.keys, wanted), failed)
                if not planned:
                    grant = self._room.allocate(batch, wanted, shape, admit, problem) if wanted else Grant()
                    refused = self._refusals(grant)
                    for part in grant.parts:
                        part.disk.begun(len(part.pages))
                    break
            # Nobody's lookup waits for a file to be made.
            problem = tier.writers.make(planned, failed, tier.lock) or problem
        known = [page for page, there in enumerate(found) if there]
        completion.settle_many(known, _HIT * len(known))
        completion.settle_many([page for page, _ in grant.refused], refused)
        if not tier.several:
            # What made room is said in the log before anything lies in its place: a kill in between costs no page that
            # the log still names. Of several disks, one that hangs would hold up the others' pages.
            tier.writers.flush()
        now = time.time_ns()
        flights = [_Flight(completion, batch, part, now) for part in grant.parts]
        begin_all(flights, partial(self._begin, cancelled), self._abandon, tier.several)
        return completion

    def _begin(self, cancelled: CancelFlag, flight: _Flight, timeout: float | None) -> _Flight | None:
        batch, part = flight.batch, flight.part
        io = part.disk.io(batch)
        bounced = io.must_bounce(batch)
        ended = partial(self._done, flight)
        group = io.group(batch, part.pages, True, bounced, part.extents, part.slots, cancelled, ended, timeout)
        if group is None:
            return flight
        count = len(group)
        io.write_headers(group, batch, part.pages[:count], part.generations[:count], flight.time_ns)
        flight.group = group
        rest = part.after(count)
        self._tier.count_way(bounced, count)
        part.disk.slots.submit_slots(group)
        return _Flight(flight.completion, batch, rest, flight.time_ns) if rest.pages else None

    def _abandon(self, flight: _Flight) -> None:
        """The disk went out of use before these pages' turn came."""
        pages = flight.part.pages
        with self._tier.lock:
            flight.disk.flying -= len(pages)
            self._tier.counts["rejected_disk_out"] += len(pages)
            for extent in flight.part.extents:
                extent.unpin()
            self._room.landed(flight.batch.namespace.digest, split_keys(rows(flight.batch.keys, pages)))
        flight.completion.settle_many(pages, [Outcome.REJECTED] * len(pages))

    def _admit(self, batch: PageBatch, slot_bytes: int, page: int) -> bool:
        """Whether a page is worth a write that something else must go for."""
        options = self._tier.options
        # Budgets are the tier's, what was seen is the namespace's.
        name = b"" if options.write_bytes_per_day else batch.namespace.digest
        rule = self._admissions.get(name)
        if rule is None:
            rule = self._admissions[name] = admission(options, slot_bytes)
        return rule.admit(batch.key(page), slot_bytes, time.monotonic())

    def _refusals(self, grant: Grant) -> list[Outcome]:
        """Outcomes of the pages that got no room; counts them."""
        tier = self._tier
        if grant.error is not None and grant.refused:
            tier.say("allocate", "no room can be made: %s", grant.error)
            return [self._failed(-(grant.error.errno or errno.EIO)) for _ in grant.refused]
        for why, count in Counter([why for _, why in grant.refused]).items():
            tier.counts[f"rejected_{tier.options.admission if why == 'admission' else why}"] += count
        return [Outcome.REJECTED] * len(grant.refused)

    def _done(self, flight: _Flight, places: Sequence[int], moved: Sequence[int], _: bytes) -> None:
        tier, group = self._tier, flight.group
        assert group is not None
        group.io.give(group, places)
        length = group.page_bytes
        part, disk = flight.part, flight.disk
        outcomes: list[int] = [Outcome.HIT] * len(places)
        stored = list(places)
        with tier.lock:
            disk.ended(moved)
            writer = disk.directory.writer
            assert writer is not None
            extents = Counter([part.extents[place] for place in places])
            if disk.out or any(result != length for result in moved) or any(extent.doomed for extent in extents):
                stored = []
                for at, (place, result) in enumerate(zip(places, moved, strict=True)):
                    extent = part.extents[place]
                    if result == length and not extent.doomed and not disk.out:
                        stored.append(place)
                    else:
                        outcomes[at] = self._failed(result, disk)
                        writer.give_back(extent, part.slots[place])
            keys = self._publish(flight, writer, stored)
            for extent, pins in extents.items():
                extent.unpin(pins)
            ended = keys if len(stored) == len(places) else rows(flight.batch.keys, sorted(flight.pages(places)))
            self._room.landed(group.namespace, split_keys(ended))
            # Under the lock, so that nobody's eviction of these pages is reported before.
            notes = flight.batch.notes
            if notes is not None:
                notes = notes.only(flight.pages(stored))
            tier.report(Residency.STORED, group.namespace, keys, notes)
        writer.log.flush()
        flight.completion.settle_many(flight.pages(places), outcomes)

    def _publish(self, flight: _Flight, writer: Writer, places: list[int]) -> bytes:
        """The pages at these places are whole; their keys."""
        places.sort()  # they end in any order, and the batch's keys are taken out in its own
        batch, part, pages = flight.batch, flight.part, flight.pages(places)
        keys = rows(batch.keys, pages)
        if places:
            writer.publish(
                batch.namespace.digest, keys, None if batch.parents is None else rows(batch.parents, pages),
                [part.extents[place] for place in places], [part.slots[place] for place in places],
                [part.generations[place] for place in places], flight.time_ns,
            )  # fmt: skip
            self._tier.counts["stored"] += len(places)
        return keys

    def _failed(self, moved: int, disk: Disk | None = None) -> Outcome:
        tier = self._tier
        if moved == -errno.ECANCELED:
            return Outcome.TIMEOUT
        if moved == -MEMORY_TROUBLE:
            tier.counts["memory_errors"] += 1
            return Outcome.FAILED
        if moved > 0 and disk is not None and disk.out:
            tier.counts["rejected_disk_out"] += 1
            return Outcome.REJECTED
        if moved >= 0:  # cleared meanwhile, or the device took only a part
            tier.counts["rejected_cleared" if moved else "io_errors"] += 1
            return Outcome.REJECTED
        tier.counts["io_errors"] += 1
        tier.say(f"write {errno.errorcode.get(-moved, -moved)}", "a write failed with %s", os.strerror(-moved))
        return Outcome.REJECTED if -moved in (errno.ENOSPC, errno.EDQUOT) else Outcome.FAILED

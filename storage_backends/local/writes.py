"""Writes of the local tier: from a batch of pages to slots that hold them.

Belongs here: the order of steps of a write, and what follows from each page's end. Does not belong here: which pages
get room (room.py), memory and sealing of a transfer (slots.py), or the log (writer.py).
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from hicache_ext.page import split_keys
from storage_backends.base import Completion, Outcome, PageBatch, Residency
from storage_backends.local.extents import Extent
from storage_backends.local.options import admission
from storage_backends.local.policy import Admission
from storage_backends.local.room import Grant, Room
from storage_backends.local.slots import SlotGroup, rows
from storage_backends.local.tier import Tier

_HIT = bytes((Outcome.HIT,))


@dataclass(slots=True, eq=False)
class _Flight:
    """Pages of one batch whose I/O begins together. The lists are by place in the group."""

    completion: Completion
    batch: PageBatch
    pages: list[int]
    extents: list[Extent]
    slots: list[int]
    generations: list[int]
    time_ns: int
    group: SlotGroup | None = None


class Writes:
    """Thread-safe; takes the tier's lock."""

    def __init__(self, tier: Tier, room: Room) -> None:
        self._tier = tier
        self._room = room
        self._admissions: dict[bytes, Admission] = {}

    def write(self, batch: PageBatch) -> Completion:
        tier = self._tier
        completion, cancelled = tier.completion(len(batch))
        io = tier.io(batch)
        bounced = io.must_bounce(batch)
        digest = batch.namespace.digest
        with tier.lock:
            tier.expiry.meet(batch.namespace)
            tier.directory.refresh()  # what another writer has is not written twice
            # Links parents, touches the chain.
            found = tier.index.lookup(digest, batch.keys, batch.parents, False).tolist()
            wanted = [page for page, there in enumerate(found) if not there]
            known = [page for page, there in enumerate(found) if there]
            grant = Grant()
            if wanted:
                asks = tier.options.admission != "always"
                admit = partial(self._admit, batch, io.shape.slot_bytes) if asks else None
                grant = self._room.allocate(batch, wanted, io.shape, admit)
            refused = self._refusals(grant)
            tier.count_way(bounced, len(grant.pages))
        completion.settle_many(known, _HIT * len(known))
        completion.settle_many([page for page, _ in grant.refused], refused)
        if not grant.pages:
            return completion
        now = time.time_ns()
        at, pages = 0, grant.pages
        while at < len(pages):
            flight = _Flight(
                completion, batch, pages[at:], grant.extents[at:], grant.slots[at:], grant.generations[at:], now
            )
            ended = partial(self._done, flight)
            group = io.group(batch, flight.pages, True, bounced, flight.extents, flight.slots, cancelled, ended)
            count = len(group)
            io.write_headers(group, batch, flight.pages[:count], flight.generations[:count], now)
            at += count
            flight.group = group
            tier.slots.submit_slots(group)
        return completion

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
        length = int(group.iov[: len(group.iov) // len(group), 1].sum())
        outcomes: list[int] = [Outcome.HIT] * len(places)
        stored = list(places)
        with tier.lock:
            writer = tier.directory.writer
            assert writer is not None
            extents = Counter([flight.extents[place] for place in places])
            if any(result != length for result in moved) or any(extent.doomed for extent in extents):
                stored = []
                for at, (place, result) in enumerate(zip(places, moved, strict=True)):
                    extent = flight.extents[place]
                    if result == length and not extent.doomed:
                        stored.append(place)
                    else:
                        outcomes[at] = self._failed(result)
                        writer.give_back(extent, flight.slots[place])
            keys = self._publish(flight, stored)
            for extent, pins in extents.items():
                extent.unpin(pins)
            ended = keys if len(stored) == len(places) else rows(flight.batch.keys, sorted(self._pages(flight, places)))
            self._room.landed(group.namespace, split_keys(ended))
        tier.report(Residency.STORED, group.namespace, keys)
        flight.completion.settle_many(self._pages(flight, places), outcomes)

    def _publish(self, flight: _Flight, places: list[int]) -> bytes:
        """The pages at these places are whole; their keys."""
        places.sort()  # they end in any order, and the batch's keys are taken out in its own
        batch, pages = flight.batch, self._pages(flight, places)
        keys = rows(batch.keys, pages)
        writer = self._tier.directory.writer
        if places and writer is not None:
            writer.publish(
                batch.namespace.digest, keys, None if batch.parents is None else rows(batch.parents, pages),
                [flight.extents[place] for place in places], [flight.slots[place] for place in places],
                [flight.generations[place] for place in places], flight.time_ns,
            )  # fmt: skip
            self._tier.counts["stored"] += len(places)
        return keys

    @staticmethod
    def _pages(flight: _Flight, places: Sequence[int]) -> list[int]:
        return [flight.pages[place] for place in places]

    def _failed(self, moved: int) -> Outcome:
        tier = self._tier
        if moved == -errno.ECANCELED:
            return Outcome.TIMEOUT
        if moved >= 0:  # cleared meanwhile, or the device took only a part
            tier.counts["rejected_cleared" if moved else "io_errors"] += 1
            return Outcome.REJECTED
        tier.counts["io_errors"] += 1
        tier.say(f"write {errno.errorcode.get(-moved, -moved)}", "a write failed with %s", os.strerror(-moved))
        return Outcome.REJECTED if -moved in (errno.ENOSPC, errno.EDQUOT) else Outcome.FAILED

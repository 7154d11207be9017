"""Room for a batch of pages: which of them may be written, and what goes for them.

Belongs here: the order of the means, whether a page is worth one, and what no page may cost. Does not belong here: how
slots and extents come and go (writer.py), on which disk (writers.py), which page goes first (policy/), or moving bytes
(writes.py).

The means, in order: a free slot, a slot in which the scan after a start may yet find a page, an extent of a colder
namespace that has more, own pages, an extent of the coldest other namespace, an extent of a folder without a writer.
Extents of others are taken over as they are. New ones are made before this is asked: ahead of need (supply.py), or by
the write itself, without the tier's lock (writes.py). From the third on something goes that may be asked for again, so
a page must be worth it (admission) and of use: its parent must be here to stay, since an engine uses a page only with
all its ancestors, and none of its ancestors may go for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hicache_ext.page import NO_PARENT, Namespace, split_keys
from storage_backends.base import KeyBatch
from storage_backends.format import SlotShape
from storage_backends.local.disk import Disk
from storage_backends.local.extents import Extent
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.rules import Rules
from storage_backends.local.slots import rows
from storage_backends.local.writers import Spot, Writers


@dataclass(slots=True, eq=False)
class Part:
    """Pages of a batch that go to one disk: pages[i], its number in the batch, to slots[i] of extents[i], pinned."""

    disk: Disk
    pages: list[int] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)

    def after(self, count: int) -> Part:
        """All but the first `count` of them."""
        columns = (self.pages, self.extents, self.slots, self.generations)
        return Part(self.disk, *(column[count:] for column in columns))  # type: ignore[arg-type]


@dataclass(slots=True)
class Grant:
    """What a batch got: parts, each with its pages ascending.

    refused: the other pages, ascending, each with why: "admission", "unreachable" (its parent is refused),
    "pinned_full" (its namespace gives up nothing), "no_room", "starting" (no disk has answered yet, or the tier is
    being closed).
    error: why no room could be made for them, when a device said so.
    """

    parts: list[Part] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    error: OSError | None = None


class _Request:
    """Pages of a batch that still want room. left: in the running. stranded: worth room, but their parents are not
    here to stay. kept: keys that may not go for this batch. short: there was not room enough without taking any.
    starting: the disks did not answer yet, so there is no writer."""

    def __init__(self, batch: KeyBatch, pages: list[int], admit: Callable[[int], bool] | None, pinned: bool) -> None:
        """pinned: no page of the batch's namespace may go."""
        self.batch = batch
        self.every_key = split_keys(batch.keys)
        self.parents = [NO_PARENT] * len(batch) if batch.parents is None else split_keys(batch.parents)
        self.pinned = pinned
        self.short = self.starting = False
        self.left = pages
        self.stranded: list[int] = []
        self.kept: set[bytes] = set()
        self.grant = Grant()
        self._admit = admit
        self._admitted: dict[int, bool] = {}
        self._spots: list[tuple[int, Spot]] = []

    def take(self, spots: list[Spot]) -> None:
        count = len(spots)
        self._spots += zip(self.left[:count], spots, strict=True)
        self.left = self.left[count:]

    @property
    def granted(self) -> list[int]:
        return [page for page, _ in self._spots]

    @property
    def keys(self) -> bytes:
        """Of the pages in the running."""
        return rows(self.batch.keys, self.left)

    def admitted(self, page: int) -> bool:
        if self._admit is None:
            return True
        found = self._admitted.get(page)
        if found is None:
            found = self._admitted[page] = self._admit(page)
        return found

    @property
    def unworthy(self) -> list[int]:
        """Pages that nothing may go for."""
        return [page for page, worth in self._admitted.items() if not worth]

    def recall(self) -> None:
        """There is room again: what was stranded is in the running."""
        self.left, self.stranded = sorted(self.left + self.stranded), []

    def close(self) -> Grant:
        """Part what was granted among the disks, and refuse what is left."""
        parts: dict[int, Part] = {}
        for page, (disk, extent, slot, generation) in sorted(self._spots, key=lambda granted: granted[0]):
            part = parts.get(disk.number)
            if part is None:
                part = parts[disk.number] = Part(disk)
            part.pages.append(page)
            part.extents.append(extent)
            part.slots.append(slot)
            part.generations.append(generation)
        self.grant.parts = list(parts.values())
        refused = self.grant.refused
        beside = set(self.unworthy)
        gone: set[bytes] = set()
        for page in sorted({*self.left, *self.stranded, *beside}):
            if page in beside:
                why = "admission"
            elif self.starting:
                why = "starting"
            else:
                why = "pinned_full" if self.pinned else "no_room"
                if self.parents[page] in gone:
                    why = "unreachable"
            refused.append((page, why))
            gone.add(self.every_key[page])
        return self.grant


class Room:
    """Not thread-safe: the tier's lock is around it."""

    def __init__(self, index: AnyIndex, writers: Writers, rules: Rules) -> None:
        self._index = index
        self._writers = writers
        self._rules = rules
        # Pages on their way, and their parents: here to stay, though the index does not know them yet.
        self._coming: dict[bytes, dict[bytes, bytes]] = {}

    def allocate(
        self, batch: KeyBatch, pages: list[int], shape: SlotShape, admit: Callable[[int], bool] | None,
        problem: OSError | None = None,
    ) -> Grant:  # fmt: skip
        """Slots for these pages of the batch, ascending. admit: whether a page is worth what goes for it (None: each
        is); asked once for each page, and only when something must go. problem: why no extent could be made for them
        (Writers.make), when a device said so."""
        space = batch.namespace
        rule = self._rules.of(space.digest, space.description)
        request = _Request(batch, pages, admit, rule.pin)
        request.grant.error = problem
        try:
            request.starting = not self._writers.ready()
            if not request.starting:
                self._provide(request, shape)
        except OSError as error:
            request.grant.error = error
        grant = request.close()
        self._look_ahead(request, shape)
        self._announce(request)
        return grant

    def landed(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """These pages are on their way no more: in the index by now, or not stored."""
        coming = self._coming.get(namespace, {})
        for key in keys:
            coming.pop(key, None)

    def _look_ahead(self, request: _Request, shape: SlotShape) -> None:
        """Say what will be needed before it is."""
        self._writers.look_ahead(request.batch.namespace, shape, request.short)

    def _provide(self, request: _Request, shape: SlotShape) -> None:
        namespace = request.batch.namespace
        larger = True
        while True:
            self._fill(request, namespace.digest)
            self._judge(request)
            count = len(request.left)
            request.short |= bool(count or request.stranded)
            if count and larger:
                larger = False
                if self._reclaim_from_larger(namespace, shape):
                    continue
            if count and not request.pinned and self._evict(namespace.digest, count, request.kept):
                continue
            if count and self._reclaim_coldest(namespace, shape):
                continue
            if (count or request.stranded) and self._writers.take_abandoned(namespace, shape):
                request.recall()
                continue
            return

    def _fill(self, request: _Request, namespace: bytes) -> None:
        """What costs nobody anything."""
        for unread in (False, True):
            if request.left:
                request.take(self._writers.take(namespace, request.keys, unread))

    def _judge(self, request: _Request) -> None:
        """Set aside the pages for which nothing may go."""
        if not request.left:
            return
        keys, parents, fit = request.every_key, request.parents, []
        if not request.kept:
            request.kept.update(keys)
            for parent in set(parents) - request.kept - {NO_PARENT}:
                self._stays(request, parent)  # also above pages that needed nobody's room
        refused = {keys[page] for page in [*request.stranded, *request.unworthy]}
        for page in request.left:
            # Asked even where the parent decides, so that a rule knows the whole chain the next time.
            worth = request.admitted(page)
            parent = parents[page]
            if worth and (parent == NO_PARENT or (parent not in refused and self._stays(request, parent))):
                fit.append(page)
                continue
            refused.add(keys[page])
            if worth:
                request.stranded.append(page)
        request.left = fit

    def _stays(self, request: _Request, key: bytes) -> bool:
        """Whether a page is in the batch, on its way, or resident; its ancestors are kept from now on."""
        kept = request.kept
        if key in kept:
            return True
        namespace = request.batch.namespace.digest
        above = []
        coming = self._coming.get(namespace, {})
        while key in coming and key not in kept:
            above.append(key)
            kept.add(key)
            key = coming[key]
        above += self._index.ancestors(namespace, key)
        kept.update(above)
        return bool(above)

    def _evict(self, namespace: bytes, count: int, kept: set[bytes]) -> int:
        pages, records = self._index.evict(namespace, count, frozenset(kept), time.time_ns())
        self._writers.forgotten(pages, records, "evicted")
        return len(pages)

    def _reclaim_from_larger(self, namespace: Namespace, shape: SlotShape) -> bool:
        """Take an extent from a colder namespace that has more: a new namespace must not starve in one extent."""
        coldest = self._index.coldest(self._writers.larger(namespace.digest))
        return coldest is not None and coldest != namespace.digest and self._writers.reclaim(coldest, namespace, shape)

    def _reclaim_coldest(self, namespace: Namespace, shape: SlotShape) -> bool:
        coldest = self._index.coldest(other for other in self._writers.loose() if other != namespace.digest)
        return coldest is not None and self._writers.reclaim(coldest, namespace, shape)

    def _announce(self, request: _Request) -> None:
        coming = self._coming.setdefault(request.batch.namespace.digest, {})
        keys, parents = request.every_key, request.parents
        coming.update((keys[page], parents[page]) for page in request.granted)

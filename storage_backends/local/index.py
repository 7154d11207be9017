"""The index of the local tier: which page lies where, how pages hang together, and who goes first when room is short.

Belongs here: one process's view in memory, as a data structure without I/O, threads or clocks (the caller locks). This
is the model of the native index (csrc/index), which the property tests hold against it, and what serves where that is
not built; index_choice.py opens one or the other. Does not belong here: files, whether a slot's bytes are what the
index says (the reader verifies), or which leaf goes next (policy/).

Eviction is suffix first. An engine can use a page only with all its ancestors, so a page with resident children is
never a victim, and a lookup or a write touches the whole known chain, ancestors last: the engine asks a disk only for
the tail of a chain whose head it still has in memory.

Pages are told of as `Page` tuples, where few are told of at a time; batches are packed keys and lists of numbers. A
page in use is held by a handle (`pin`, `unpin`), which outlives the page when that is removed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import cast

import numpy as np

from hicache_ext.page import NO_PARENT, split_keys
from storage_backends.format import FormatError
from storage_backends.local.index_entry import (
    SECOND,
    Adoption,
    Entry,
    Page,
    Pinned,
    Snapshot,
    Space,
)
from storage_backends.local.index_pages import Pages
from storage_backends.local.policy import ORDERS
from storage_backends.local.residency import RECORD_BYTES, Kind, Record, encode, encode_stored

__all__ = ["ADOPTED", "GATHERED", "Index", "Page", "Pinned", "Snapshot"]

#: Steps of an adoption that the lock is held for: pages looked at, and pages taken in.
GATHERED, ADOPTED = 1 << 14, 1 << 11


def examined(count: int) -> int:
    """How many pages `Index.going` looks at, at most, for so many."""
    return 4 * count + 64


class _Kept:
    """What may not go, as a collection that looks it up."""

    def __init__(self, space: Space, protected: frozenset[bytes], last_resort: bool) -> None:
        self._space, self._protected, self._last_resort = space, protected, last_resort

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, bytes)
        if key in self._protected or self._space.entries[key].pins:
            return True
        return not self._last_resort and key in self._space.other_children

    def __iter__(self) -> None:
        raise TypeError("too many to name")

    __len__ = __iter__


class Index(Pages):
    """Not thread-safe: the backend holds one lock around it."""

    name = "python"
    #: Hears of log records that were taken in: (folder, records); see news.py.
    heard: Callable[[int, bytes], None] | None = None

    def __init__(self, order: str = "lru") -> None:
        """order: a name of storage_backends.local.policy.ORDERS."""
        super().__init__(ORDERS[order])
        self._pinned: dict[int, Entry] = {}
        self._handles = count(1)

    def memory(self) -> int:
        """Bytes in use; 0: not known."""
        return 0

    # -- batches -------------------------------------------------------------------------------------------------

    def lookup(self, namespace: bytes, keys: bytes, parents: bytes | None, used: bool) -> np.ndarray:
        """uint8[n]: 1 where resident. Links parents; touches what is there and all known ancestors.

        used: counts as a use of the pages (a lookup by an engine), else only refreshes them.
        """
        found = np.zeros(len(keys) // len(NO_PARENT), np.uint8)
        above = None if parents is None else split_keys(parents)
        present = [] if above is None else above[:1]
        for i, key in enumerate(split_keys(keys)):
            if self.has(namespace, key):
                found[i] = 1
                present.append(key)
                if above is not None:
                    self.link(namespace, key, above[i])
        self.touch(namespace, present, used)
        return found

    def pin(self, namespace: bytes, keys: bytes, parents: bytes | None, touch: bool = True) -> Pinned:
        """Hold the resident pages of a batch. touch: as a lookup does that is no use of its own."""
        held = Pinned([], [], [], [], [], [])
        present = [] if parents is None else split_keys(parents)[:1]
        for page, key in enumerate(split_keys(keys)):
            entry = self._get(namespace, key)
            if entry is None or self._is_expired(entry):
                continue
            entry.pins += 1
            handle = next(self._handles)
            self._pinned[handle] = entry
            present.append(key)
            told = entry.page
            values = (page, handle, told.folder, told.extent, told.slot, told.own)
            for column, value in zip(cast(tuple[list[int], ...], held), values, strict=True):
                column.append(value)
        if touch:
            self.touch(namespace, present, used=False)
        return held

    def unpin(self, handles: list[int]) -> bytes:
        """A byte for each: whether its page was removed meanwhile and this was its last reader."""
        freed = bytearray()
        for handle in handles:
            entry = self._pinned.pop(handle)
            entry.pins -= 1
            freed.append(not entry.pins and self._get(entry.page.namespace, entry.page.key) is not entry)
        return bytes(freed)

    def pinned(self, handle: int) -> Page:
        return self._pinned[handle].told()

    def fail(self, handle: int) -> int:
        """Count a failed read of this page; how many there were."""
        self._pinned[handle].failures += 1
        return self._pinned[handle].failures

    def publish(
        self, namespace: bytes, keys: bytes, parents: bytes | None, folder: int, extents: list[int], slots: list[int],
        generations: list[int], time_ns: int,
    ) -> tuple[list[Page], bytes]:  # fmt: skip
        """Own pages that were just written. Pages whose place they took, and the log's records of the new ones."""
        split = split_keys(keys)
        above = [NO_PARENT] * len(split) if parents is None else split_keys(parents)
        pages = [
            Page(namespace, key, parent, folder, extent, slot, generation, True, time_ns)
            for key, parent, extent, slot, generation in zip(split, above, extents, slots, generations, strict=True)
        ]
        replaced = [old for page in pages if (old := self.insert(page)) is not None]
        self.touch(namespace, split, used=False)
        return replaced, encode_stored(pages)

    # -- eviction ------------------------------------------------------------------------------------------------

    def forget(self, pages: Iterable[Page], evicted: bool, time_ns: int) -> tuple[list[Page], bytes]:
        """`remove` for many: those that were removed, as they were then, and their records in that order.

        Record i is for the log of page i's folder. time_ns: when, for the records.
        """
        gone = []
        for page in pages:
            known = self.get(page.namespace, page.key)
            if known is not None and self.remove(page, evicted):
                gone.append(known)
        return gone, _encode_removed(gone, time_ns)

    def victim(self, namespace: bytes, protected: frozenset[bytes] = frozenset()) -> Page | None:
        """The own page of this namespace that should go next: without resident children, not in use.

        protected: keys that may not go (the ancestors of the page that wants the room would leave it unusable).

        When all that remain have children in other writers' folders, which we cannot evict, one of those without
        children of our own: the others' suffix is lost, but room must come from somewhere.
        """
        space = self.spaces.get(namespace)
        if space is None:
            return None
        for last_resort in (False, True):
            key = space.order.victim(_Kept(space, protected, last_resort))  # type: ignore[arg-type]
            if key is not None:
                return space.entries[key].told()
        return None

    def evict(
        self, namespace: bytes, count: int, protected: frozenset[bytes], time_ns: int
    ) -> tuple[list[Page], bytes]:
        """Remove up to `count` victims, one after the other; these pages and their records, as `forget` gives them."""
        gone: list[Page] = []
        while len(gone) < count and (page := self.victim(namespace, protected)) is not None:
            self.remove(page, evicted=True)
            gone.append(page)
        return gone, _encode_removed(gone, time_ns)

    def going(self, namespace: bytes, count: int) -> bytes:
        """Packed keys of up to `count` pages that `evict` would take next, first to go first, if nothing is used or
        stored meanwhile: not those past their time, nor such as go only when nothing else can."""
        space = self.spaces.get(namespace)
        if space is None:
            return b""
        kept = _Kept(space, frozenset(), last_resort=False)
        keys = space.order.going(count, kept, examined(count))  # type: ignore[arg-type]
        return b"".join(key for key in keys if not space.is_expired(space.entries[key]))

    def set_capacity(self, namespace: bytes, pages: int) -> None:
        """How many own pages of this namespace there is room for in all own folders, as far as is known."""
        self._space(namespace).order.set_capacity(max(1, pages))

    def coldest(self, candidates: Iterable[bytes]) -> bytes | None:
        """The namespace among `candidates` whose pages were touched the longest ago."""
        return min(candidates, key=self.touched, default=None)

    def last_used(self, folder: int, extent: int) -> tuple[int, int]:
        """The rank of an extent's own page that would go last; less than any when it has none."""
        pages = [entry.page for entry in self._places.entries(folder, extent) if entry.page.own]
        ranks = [self.spaces[page.namespace].order.pages[page.key].rank for page in pages]
        return max(ranks, default=(-2, 0))

    def orphans(self) -> int:
        """How many own pages have a parent that was evicted before them: removed with `evicted`, as the pages of an
        extent are that is taken away. What hangs below those is not counted yet.

        None is one any more when the parent is stored again, or when a page below it is used or stored: whoever asks
        for that has the parent elsewhere.
        """
        return sum(len(space.own_children[key]) for space in self.spaces.values() for key in space.went)

    def sweep_orphans(self, limit: int, examine: int = 4096) -> list[Page]:
        """Orphans and what hangs below them, at most `limit`, which are not in use: no engine can come by them.

        The caller removes them, with `evicted`, before anything else happens: that makes orphans of what hangs below.
        The native index looks at `examine` pages, in memory's order, and goes on there with the next call: an empty
        answer says that nothing is left only when `orphans` does.
        """
        found: list[Page] = []
        for space in self.spaces.values():
            tops = list(space.went)
            while tops and len(found) < limit:
                for key in space.own_children.get(tops.pop(), ()):
                    entry = space.entries[key]
                    if len(found) < limit and not entry.pins:
                        found.append(entry.told())
                        tops.append(key)
        return found

    # -- time to live --------------------------------------------------------------------------------------------

    def set_oldest(self, namespace: bytes, time_ns: int) -> None:
        """Pages of this namespace that were stored before this moment are past their time: as if not resident for
        `lookup`, `pin`, `has` and `ancestors`. They hold their slots until another copy takes their place or they are
        removed. Other calls see them. Pages of the future (a clock went back) are not past their time."""
        self._space(namespace).expiry = time_ns // SECOND * SECOND

    def expired(self, namespace: bytes, limit: int, examine: int = 4096) -> list[Page]:
        """Own pages that are past their time, at most `limit`, for the caller to remove.

        Goes on where the last call stopped, and is done with `examine` pages, found or not: an empty answer ends one
        sweep only when nothing is past its time. Extents without such pages are known as such, and cost nothing.
        """
        space = self.spaces.get(namespace)
        if space is None or not space.expiry:
            return []
        return self._places.expired(namespace, space, limit, examine)

    def adoption(self, *folders: int) -> Adoption:
        """This process becomes the writer of these folders: their pages will be ours to evict, in the order in which
        they came. A step at a time, so that nobody waits for a million of them: `gather` until it says so, `sort`,
        `adopt` until it says so. No page comes into these folders meanwhile.

        Folders that are adopted together are merged, each spread evenly: pages of one disk must not all go before those
        of the next.
        """
        return Adoption(list(dict.fromkeys(folders)))

    def gather(self, adoption: Adoption, examine: int = GATHERED) -> bool:
        """Look at so many pages for those that will be ours; whether that is all."""
        for number, space in enumerate(self.spaces.values()):
            for queue, folder in enumerate(adoption.folders):
                there = [e.page for e in space.entries.values() if e.page.folder == folder and not e.page.own]
                adoption.pages += [
                    (number, at / len(there), queue, page.namespace, page.key, page.generation)
                    for at, page in enumerate(there)
                ]
        return True

    def adopt(self, adoption: Adoption, count: int = ADOPTED) -> bool:
        """Make so many of them own pages; whether that is all. Pages that went since are passed over."""
        adopted: dict[bytes, list[bytes]] = {}
        end = min(adoption.done + count, len(adoption.pages))
        for _, _, queue, namespace, key, generation in adoption.pages[adoption.done : end]:
            entry = self._get(namespace, key)
            there = entry is not None and not entry.page.own and entry.page.generation == generation
            if entry is None or not there or entry.page.folder != adoption.folders[queue]:
                continue
            space = self.spaces[namespace]
            self._leave(space, entry, evicted=False)
            entry.page = entry.page._replace(own=True)
            self._enter(space, entry)
            adopted.setdefault(namespace, []).append(key)
        adoption.done = end
        # A log may name children before their parents: touching all of them restores "ancestors last".
        for namespace, keys in adopted.items():
            ranks = self.spaces[namespace].order.pages
            self.touch(namespace, sorted(keys, key=lambda key: ranks[key].rank), used=False)
        return adoption.done == len(adoption.pages)

    # -- the log -------------------------------------------------------------------------------------------------

    def own_records(self, folder: int | None = None) -> bytes:
        """Log records of a folder's own pages (of all own ones), as a later start should read them: first to go first,
        namespace by namespace."""
        return encode_stored(
            space.entries[key].told()
            for space in self.spaces.values()
            for key in self._in_order(space)
            if folder in (None, space.entries[key].page.folder)
        )

    def snapshot(self, folder: int) -> Snapshot:
        """The folder's own pages now, to write a log beside the serving: `sort` it, without the lock, then ask for its
        `snapshot_records` piece by piece. What is stored or removed from now on the caller must add to that log."""
        return Snapshot(
            [
                (number, page.rank, entry)
                for number, space in enumerate(self.spaces.values())
                for key, page in space.order.pages.items()
                if (entry := space.entries[key]).page.folder == folder
            ]
        )

    def snapshot_records(self, snapshot: Snapshot, start: int, count: int) -> bytes:
        """Records of those of pages [start, start + count) of the snapshot that are still where they were."""
        pages = (entry for _, _, entry in snapshot.pages[start : start + count])
        return encode_stored(entry.page for entry in pages if self._get(entry.page.namespace, entry.page.key) is entry)

    def apply_log(self, folder: int, records: bytes, at_end: bool) -> tuple[int, int, list[int]]:
        """Bring the index up to date with a piece of a folder's log.

        at_end: the piece ends where the file does. Bytes taken (less than given when the last record may still be on
        its way), records that were damaged, and the extents that are gone.
        """
        taken, damaged, gone = 0, 0, []
        while taken + RECORD_BYTES <= len(records):
            try:
                record = Record.decode(records[taken : taken + RECORD_BYTES])
            except FormatError:
                if at_end and taken + 2 * RECORD_BYTES > len(records):
                    break
                damaged += 1
            else:
                self._apply(folder, record)
                if record.kind == Kind.EXTENT_GONE:
                    gone.append(record.extent)
            taken += RECORD_BYTES
        return taken, damaged, gone

    @staticmethod
    def _in_order(space: Space) -> list[bytes]:
        return sorted(space.order.pages, key=lambda key: space.order.pages[key].rank)

    def _apply(self, folder: int, record: Record) -> None:
        known = self._get(record.namespace, record.key)
        match record.kind:
            case Kind.STORED:
                # Two writers stored the same page: one copy is enough to know of, while it may be used.
                if known is None or known.page.folder == folder or (not known.page.own and self._is_expired(known)):
                    self.insert(
                        Page(
                            record.namespace, record.key, record.parent, folder, record.extent, record.slot,
                            record.generation, False, record.time_ns,
                        )
                    )  # fmt: skip
            case Kind.REMOVED:
                if known is not None and known.page[3:6] == (folder, record.extent, record.slot):
                    self._remove(known)
            case Kind.EXTENT_GONE:
                for entry in self._places.entries(folder, record.extent):
                    self._remove(entry)


def _encode_removed(pages: list[Page], time_ns: int) -> bytes:
    return encode([Record(Kind.REMOVED, *page[4:7], time_ns, page.namespace, page.key) for page in pages])

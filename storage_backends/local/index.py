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
    whole_seconds,
)
from storage_backends.local.index_places import Places
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


class Index:
    """Entries by namespace and key, and by folder and extent. Not thread-safe: the backend holds one lock around it."""

    name = "python"
    #: Hears of log records that were taken in: (folder, records); see news.py.
    heard: Callable[[int, bytes], None] | None = None

    def __init__(self, order: str = "lru") -> None:
        """order: a name of storage_backends.local.policy.ORDERS."""
        self._new_order = ORDERS[order]
        self.spaces: dict[bytes, Space] = {}
        self._places = Places()
        self._clock = 0
        self._pinned: dict[int, Entry] = {}
        self._handles = count(1)

    def __len__(self) -> int:
        """Pages, those past their time included."""
        return sum(len(space.entries) for space in self.spaces.values())

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

    # -- one page ------------------------------------------------------------------------------------------------

    def get(self, namespace: bytes, key: bytes) -> Page | None:
        """The page of this key, past its time or not."""
        entry = self._get(namespace, key)
        return None if entry is None else entry.told()

    def has(self, namespace: bytes, key: bytes) -> bool:
        """Whether the page is resident and not past its time."""
        entry = self._get(namespace, key)
        return entry is not None and not self._is_expired(entry)

    def at(self, folder: int, extent: int, slot: int) -> Page | None:
        entry = self._places.at(folder, extent, slot)
        return None if entry is None else entry.told()

    def insert(self, page: Page, oldest: bool = False) -> Page | None:
        """Add a page; the page it took the place of, if it was resident before (elsewhere, or the same slot).

        oldest: it goes first, since nobody has asked for it.
        """
        old = self._get(page.namespace, page.key)
        if old is not None:
            self._remove(old)
        # A slot holds one page: whatever the index thought was there is gone.
        stale = self._places.at(page.folder, page.extent, page.slot)
        if stale is not None:
            self._remove(stale)
        parent = NO_PARENT if page.parent == page.key else page.parent
        entry = Entry(page._replace(parent=parent, time_ns=whole_seconds(page.time_ns), pins=0))
        space = self._space(page.namespace)
        self._places.add(entry)
        space.entries[page.key] = entry
        space.went.pop(page.key, None)
        self._enter(space, entry, oldest)
        return None if old is None else old.told()

    def remove(self, page: Page, evicted: bool = False) -> bool:
        """Forget a page; False when the index holds another, or none, in its place. evicted: for want of room."""
        entry = self._get(page.namespace, page.key)
        if entry is None or entry.page[3:7] != page[3:7]:
            return False
        self._remove(entry, evicted)
        return True

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

    def link(self, namespace: bytes, key: bytes, parent: bytes) -> None:
        """A later call told the parent of a page; kept if the page was stored without one."""
        entry = self._get(namespace, key)
        if entry is None or entry.page.parent != NO_PARENT or parent in (NO_PARENT, key):
            return
        entry.page = entry.page._replace(parent=parent)
        space = self.spaces[namespace]
        if entry.page.own:
            space.order.link(key, parent)
        self._add_child(space, entry)

    # -- eviction ------------------------------------------------------------------------------------------------

    def touch(self, namespace: bytes, keys: Iterable[bytes], used: bool = True) -> None:
        """Mark these pages and their known ancestors as used: each chain from its end up, ancestors last."""
        space = self.spaces.get(namespace)
        if space is None or not space.entries:
            return
        self._clock += 1
        space.touched = self._clock
        seen: set[bytes] = set()
        walks: list[list[bytes]] = []
        for key in reversed(list(keys)):
            walk: list[bytes] = []
            entry = space.entries.get(key)
            while entry is not None and entry.page.key not in seen:
                seen.add(entry.page.key)
                walk.append(entry.page.key)
                # Whoever uses what hangs below has the page that went.
                space.went.pop(entry.page.parent, None)
                entry = space.entries.get(entry.page.parent)
            walks.append(walk)
        # A later walk ends below an earlier one, so its pages are descendants and must come first.
        order = space.order
        for walk in reversed(walks):
            for key in walk:
                page = order.pages.get(key)
                if page is not None:
                    order.touched(page, used)
                    if key not in order.children:
                        order.offer(key, page)

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

    def touched(self, namespace: bytes) -> int:
        space = self.spaces.get(namespace)
        return 0 if space is None else space.touched

    def last_used(self, folder: int, extent: int) -> tuple[int, int]:
        """The rank of an extent's own page that would go last; less than any when it has none."""
        pages = [entry.page for entry in self._places.entries(folder, extent) if entry.page.own]
        ranks = [self.spaces[page.namespace].order.pages[page.key].rank for page in pages]
        return max(ranks, default=(-2, 0))

    def ancestors(self, namespace: bytes, key: bytes) -> list[bytes]:
        """The known chain from `key` up to its root, `key` first, without pages past their time."""
        space = self.spaces.get(namespace)
        entry = None if space is None else space.entries.get(key)
        found: dict[bytes, Entry] = {}
        while space is not None and entry is not None and entry.page.key not in found:
            found[entry.page.key] = entry
            entry = space.entries.get(entry.page.parent)
        return [key for key, entry in found.items() if not self._is_expired(entry)]

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

    # -- folders and extents -------------------------------------------------------------------------------------

    def in_extent(self, folder: int, extent: int) -> list[Page]:
        return [entry.told() for entry in self._places.entries(folder, extent)]

    def used_slots(self, folder: int, extent: int) -> np.ndarray:
        """uint32[n]: slots that hold a page, in no order."""
        return np.array(self._places.slots(folder, extent), np.uint32)

    def extents(self, folder: int) -> list[int]:
        """Extents of a folder that hold pages."""
        return self._places.numbers(folder)

    def trim(self, folder: int, extent: int, namespace: bytes, slots: int) -> None:
        """Forget the extent's pages that it cannot hold: of another namespace, or in slots that it does not have."""
        for entry in self._places.entries(folder, extent):
            if entry.page.slot >= slots or entry.page.namespace != namespace:
                self._remove(entry)

    def drop(self, folder: int, namespace: bytes | None = None) -> None:
        """Forget a folder's pages, all or those of one namespace."""
        for entry in self._places.in_folder(folder):
            if namespace in (None, entry.page.namespace):
                self._remove(entry)

    def newest_generation(self, folder: int, extent: int) -> int:
        return max((entry.page.generation for entry in self._places.entries(folder, extent)), default=0)

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

    # -- helpers -------------------------------------------------------------------------------------------------

    def _space(self, namespace: bytes) -> Space:
        space = self.spaces.get(namespace)
        if space is None:
            space = self.spaces[namespace] = Space(self._new_order(1))
        return space

    def _get(self, namespace: bytes, key: bytes) -> Entry | None:
        space = self.spaces.get(namespace)
        return None if space is None else space.entries.get(key)

    def _is_expired(self, entry: Entry) -> bool:
        return self.spaces[entry.page.namespace].is_expired(entry)

    @staticmethod
    def _in_order(space: Space) -> list[bytes]:
        return sorted(space.order.pages, key=lambda key: space.order.pages[key].rank)

    def _remove(self, entry: Entry, evicted: bool = False) -> None:
        page = entry.page
        space = self.spaces[page.namespace]
        del space.entries[page.key]
        self._leave(space, entry, evicted)
        self._places.discard(entry)
        if evicted and page.own and page.key in space.own_children:
            space.went[page.key] = None
        if not space.entries:
            space.touched = 0

    def _enter(self, space: Space, entry: Entry, oldest: bool = False) -> None:
        key, parent = entry.page.key, entry.page.parent
        if entry.page.own:
            space.order.insert(key, None if parent == NO_PARENT else parent)
            if oldest:
                space.oldest -= 1
                page = space.order.pages[key]
                page.rank = (-1, space.oldest)
                if key not in space.order.children:
                    space.order.offer(key, page)
        if parent != NO_PARENT:
            self._add_child(space, entry)

    @staticmethod
    def _add_child(space: Space, entry: Entry) -> None:
        parent = entry.page.parent
        if entry.page.own:
            space.own_children.setdefault(parent, {})[entry.page.key] = None
        else:
            space.other_children[parent] = space.other_children.get(parent, 0) + 1

    @staticmethod
    def _leave(space: Space, entry: Entry, evicted: bool) -> None:
        key, parent = entry.page.key, entry.page.parent
        if entry.page.own:
            space.order.remove(key, evicted)
        if parent == NO_PARENT:
            return
        if not entry.page.own:
            space.other_children[parent] -= 1
            if not space.other_children[parent]:
                del space.other_children[parent]
            return
        del space.own_children[parent][key]
        if not space.own_children[parent]:
            del space.own_children[parent]
            space.went.pop(parent, None)


def _encode_removed(pages: list[Page], time_ns: int) -> bytes:
    return encode([Record(Kind.REMOVED, *page[4:7], time_ns, page.namespace, page.key) for page in pages])

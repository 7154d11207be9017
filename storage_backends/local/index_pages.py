"""Resident pages: found by key and by place, hung together in chains, and touched along these.

Belongs here: what is where, and what hangs below what. Does not belong here: batches, who goes when room is short, time
and the log (index.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from hicache_ext.page import NO_PARENT
from storage_backends.local.index_entry import Entry, Page, Space, whole_seconds
from storage_backends.local.index_places import Places
from storage_backends.local.policy.order import Order


class Pages:
    """Entries by namespace and key, and by folder and extent. Not thread-safe."""

    def __init__(self, order: Callable[[int], Order]) -> None:
        """order: makes the order of a namespace with room for so many pages."""
        self._new_order = order
        self.spaces: dict[bytes, Space] = {}
        self._places = Places()
        self._clock = 0

    def __len__(self) -> int:
        """Pages, those past their time included."""
        return sum(len(space.entries) for space in self.spaces.values())

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

    def touched(self, namespace: bytes) -> int:
        space = self.spaces.get(namespace)
        return 0 if space is None else space.touched

    def ancestors(self, namespace: bytes, key: bytes) -> list[bytes]:
        """The known chain from `key` up to its root, `key` first, without pages past their time."""
        space = self.spaces.get(namespace)
        entry = None if space is None else space.entries.get(key)
        found: dict[bytes, Entry] = {}
        while space is not None and entry is not None and entry.page.key not in found:
            found[entry.page.key] = entry
            entry = space.entries.get(entry.page.parent)
        return [key for key, entry in found.items() if not self._is_expired(entry)]

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

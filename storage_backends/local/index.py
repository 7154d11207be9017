"""The index of the local tier: which page lies where, how pages hang together, and who goes first when room is short.

Belongs here: one process's view in memory, as a data structure without I/O, threads or clocks (the caller locks).
Does not belong here: files, or whether a slot's bytes are what the index says (the reader verifies).

Eviction is suffix first. An engine can use a page only with all its ancestors, so a page with resident children is
never a victim, and a lookup or a write touches the whole known chain, ancestors last: the engine asks a disk only for
the tail of a chain whose head it still has in memory. With that, in the order of recency every page comes before its
ancestors, and the oldest page is a leaf.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hicache_ext.page import NO_PARENT


@dataclass(slots=True, eq=False)
class Entry:
    """One resident page. folder: its writer's number. own: this process is that writer. pins: reads that use it now."""

    namespace: bytes
    key: bytes
    parent: bytes
    folder: int
    extent: int
    slot: int
    generation: int
    own: bool
    time_ns: int = 0
    pins: int = 0
    failures: int = 0


@dataclass
class Space:
    """The pages of one namespace. order: own pages, oldest first. own_, other_children: resident ones per page."""

    entries: dict[bytes, Entry] = field(default_factory=dict)
    order: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    own_children: dict[bytes, int] = field(default_factory=dict)
    other_children: dict[bytes, int] = field(default_factory=dict)
    touched: int = 0


class Index:
    """Entries by namespace and key, and by folder and extent. Not thread-safe: the backend holds one lock around it."""

    def __init__(self) -> None:
        self.spaces: dict[bytes, Space] = {}
        self._extents: dict[tuple[int, int], dict[int, Entry]] = {}
        self._clock = 0

    def __len__(self) -> int:
        return sum(len(space.entries) for space in self.spaces.values())

    def get(self, namespace: bytes, key: bytes) -> Entry | None:
        space = self.spaces.get(namespace)
        return None if space is None else space.entries.get(key)

    def insert(self, entry: Entry) -> Entry | None:
        """Add a page; the entry it took the place of, if the page was resident before (elsewhere, or the same slot)."""
        old = self.get(entry.namespace, entry.key)
        if old is not None:
            self.remove(old)
        # A slot holds one page: whatever the index thought was there is gone.
        stale = self.at(entry.folder, entry.extent, entry.slot)
        if stale is not None:
            self.remove(stale)
        space = self.spaces.setdefault(entry.namespace, Space())
        there = self._extents.setdefault((entry.folder, entry.extent), {})
        there[entry.slot] = entry
        space.entries[entry.key] = entry
        self._count_child(space, entry, 1)
        if entry.own:
            space.order[entry.key] = None
        return old

    def remove(self, entry: Entry) -> bool:
        """Forget a page; False when the index holds another entry, or none, in its place."""
        space = self.spaces.get(entry.namespace)
        if space is None or space.entries.get(entry.key) is not entry:
            return False
        del space.entries[entry.key]
        self._count_child(space, entry, -1)
        space.order.pop(entry.key, None)
        there = self._extents[entry.folder, entry.extent]
        if there.get(entry.slot) is entry:
            del there[entry.slot]
        if not there:
            del self._extents[entry.folder, entry.extent]
        if not space.entries:
            del self.spaces[entry.namespace]
        return True

    def link(self, entry: Entry, parent: bytes) -> None:
        """A later call told the parent of a page that was stored without one."""
        if entry.parent == NO_PARENT and parent != NO_PARENT:
            space = self.spaces[entry.namespace]
            entry.parent = parent
            self._count_child(space, entry, 1)

    def touch(self, namespace: bytes, keys: Iterable[bytes]) -> None:
        """Mark these pages and their known ancestors as used: each chain from its end up, ancestors last."""
        space = self.spaces.get(namespace)
        if space is None:
            return
        self._clock += 1
        space.touched = self._clock
        seen: set[bytes] = set()
        walks: list[list[bytes]] = []
        for key in reversed(list(keys)):
            walk: list[bytes] = []
            entry = space.entries.get(key)
            while entry is not None and entry.key not in seen:
                seen.add(entry.key)
                walk.append(entry.key)
                entry = space.entries.get(entry.parent)
            walks.append(walk)
        # A later walk ends below an earlier one, so its pages are descendants and must come first.
        for walk in reversed(walks):
            for key in walk:
                if key in space.order:
                    space.order.move_to_end(key)

    def victim(self, namespace: bytes, protected: frozenset[bytes] = frozenset()) -> Entry | None:
        """The own page of this namespace that should go next: oldest without resident children, not in use.

        protected: keys that may not go (the ancestors of the page that wants the room would leave it unusable).

        When all that remain have children in other writers' folders, which we cannot evict, the oldest without
        children of our own: the others' suffix is lost, but room must come from somewhere.
        """
        space = self.spaces.get(namespace)
        if space is None:
            return None
        fallback: Entry | None = None
        for key in space.order:
            entry = space.entries[key]
            if entry.pins or space.own_children.get(key) or key in protected:
                continue
            if not space.other_children.get(key):
                return entry
            fallback = fallback or entry
        return fallback

    def coldest(self, candidates: Iterable[bytes]) -> bytes | None:
        """The namespace among `candidates` whose pages were touched the longest ago."""
        return min(candidates, key=lambda n: self.spaces[n].touched if n in self.spaces else 0, default=None)

    def in_extent(self, folder: int, extent: int) -> list[Entry]:
        return list(self._extents.get((folder, extent), {}).values())

    def ancestors(self, namespace: bytes, key: bytes) -> Iterator[bytes]:
        """The known chain from `key` up to its root, `key` first."""
        space = self.spaces.get(namespace)
        entry = None if space is None else space.entries.get(key)
        seen = set()
        while space is not None and entry is not None and entry.key not in seen:
            seen.add(entry.key)
            yield entry.key
            entry = space.entries.get(entry.parent)

    def at(self, folder: int, extent: int, slot: int) -> Entry | None:
        return self._extents.get((folder, extent), {}).get(slot)

    def in_folder(self, folder: int) -> Iterator[Entry]:
        for (owner, _), entries in list(self._extents.items()):
            if owner == folder:
                yield from list(entries.values())

    def descendants(self, roots: Iterable[Entry]) -> list[Entry]:
        """Own pages below these pages of one namespace. Walks the namespace once: for rare, large removals only."""
        level = list(roots)
        if not level:
            return []
        below: dict[bytes, list[Entry]] = {}
        for other in self.spaces[level[0].namespace].entries.values():
            if other.own and other.parent != NO_PARENT:
                below.setdefault(other.parent, []).append(other)
        found: dict[Entry, None] = {}
        while level:
            level = [child for node in level for child in below.get(node.key, ()) if child not in found]
            found.update(dict.fromkeys(level))
        return list(found)[::-1]

    def adopt(self, folder: int) -> None:
        """This process became the writer of `folder`: its pages are ours to evict, in the order in which they came."""
        for space in self.spaces.values():
            entries = [entry for entry in space.entries.values() if entry.folder == folder]
            for entry in entries:
                self._count_child(space, entry, -1)
                entry.own = True
                self._count_child(space, entry, 1)
                space.order[entry.key] = None
            # A log may name children before their parents: one pass of touches restores "ancestors last".
            if entries:
                self.touch(entries[0].namespace, list(space.order))

    @staticmethod
    def _count_child(space: Space, entry: Entry, change: int) -> None:
        if entry.parent == NO_PARENT:
            return
        children = space.own_children if entry.own else space.other_children
        count = children.get(entry.parent, 0) + change
        if count:
            children[entry.parent] = count
        else:
            children.pop(entry.parent, None)

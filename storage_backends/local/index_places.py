"""Pages by place: what lies in which extent, and which extents hold pages that are past their time.

Belongs here: folders, extents, slots. Does not belong here: keys and chains (index.py).
"""

from __future__ import annotations

from bisect import bisect_left

from storage_backends.local.index_entry import Entry, Page, Place, Space

_NEVER = 1 << 64


class Places:
    """Entries by folder, extent and slot."""

    def __init__(self) -> None:
        self._entries: dict[Place, dict[int, Entry]] = {}
        #: No page of the extent was stored before this moment.
        self._stored_from: dict[Place, int] = {}
        #: The namespace that began last to look through the extent, and the same of what was seen or came since then.
        self._seen_from: dict[Place, tuple[bytes, int]] = {}

    def add(self, entry: Entry) -> None:
        place = entry.page.folder, entry.page.extent
        self._entries.setdefault(place, {})[entry.page.slot] = entry
        self._stored_from[place] = min(self._stored_from.get(place, _NEVER), entry.page.time_ns)
        self._see(place, entry)

    def discard(self, entry: Entry) -> None:
        place = entry.page.folder, entry.page.extent
        there = self._entries[place]
        del there[entry.page.slot]
        if not there:
            del self._entries[place], self._stored_from[place]
            self._seen_from.pop(place, None)

    def at(self, folder: int, extent: int, slot: int) -> Entry | None:
        return self._entries.get((folder, extent), {}).get(slot)

    def slots(self, folder: int, extent: int) -> list[int]:
        return list(self._entries.get((folder, extent), {}))

    def entries(self, folder: int, extent: int) -> list[Entry]:
        return list(self._entries.get((folder, extent), {}).values())

    def numbers(self, folder: int) -> list[int]:
        """Extents of a folder that hold pages."""
        return [extent for owner, extent in self._entries if owner == folder]

    def in_folder(self, folder: int) -> list[Entry]:
        return [entry for (owner, _), there in self._entries.items() if owner == folder for entry in there.values()]

    def expired(self, namespace: bytes, space: Space, limit: int, examine: int) -> list[Page]:
        """Own pages of the namespace that are past their time: see Index.expired."""
        found: list[Page] = []
        first, resume = space.swept
        places = sorted(self._entries)
        at = bisect_left(places, first)
        for place in places[at:] + places[:at]:
            start = resume if place == first else 0
            if not start and self._stored_from[place] >= space.expiry:
                continue
            if len(found) >= limit or not examine:
                space.swept = place, start
                return found
            if not start:
                self._seen_from[place] = namespace, _NEVER
            there = self._entries[place]
            for slot in sorted(slot for slot in there if slot >= start):
                if len(found) >= limit or not examine:
                    space.swept = place, slot
                    return found
                examine -= 1
                entry = there[slot]
                self._see(place, entry)
                if entry.page.own and entry.page.namespace == namespace and space.is_expired(entry):
                    found.append(entry.told())
            owner, since = self._seen_from.get(place, (b"", 0))
            if owner == namespace:
                self._stored_from[place] = since
                del self._seen_from[place]
        space.swept = (0, 0), 0
        return found

    def _see(self, place: Place, entry: Entry) -> None:
        owner, since = self._seen_from.get(place, (b"", 0))
        if owner:
            self._seen_from[place] = owner, min(since, entry.page.time_ns)

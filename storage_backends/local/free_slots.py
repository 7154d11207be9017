"""Slots of one writer's folder that hold no page, by namespace, and which of them go first.

Belongs here: which slots are free. Does not belong here: pins, extents, and what a slot is taken for (writer.py).

After a start the log says which slots hold pages, and the header scan finds those that it does not name. Until it has
looked at a free slot, a page may come back from there: such a slot is `unread`, and goes only when there is no other
and no room for another extent. They are kept as one bit map an extent, since there may be millions of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Place = tuple[int, int]
"""Number of the extent, and slot."""


class FreeSlots:
    """Not thread-safe. `len`: slots that hold nothing, for sure. unread: how many there are beside these."""

    def __init__(self) -> None:
        self.unread = 0
        self._sure: dict[Place, None] = {}
        self._unread: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._sure)

    def __contains__(self, place: Place) -> bool:
        if place in self._sure:
            return True
        number, slot = place
        return number in self._unread and bool(self._unread[number][slot])

    def add(self, places: Iterable[Place]) -> None:
        """These hold nothing now; the last of them is taken first."""
        self._sure.update(dict.fromkeys(places))

    def add_unread(self, number: int, slots: int, used: np.ndarray) -> None:
        """All of an extent's slots but the used ones."""
        free = np.ones(slots, bool)
        free[used] = False
        free[[slot for of, slot in self._sure if of == number]] = False
        self._unread[number] = free
        self.unread += int(np.count_nonzero(free))

    def take(self, count: int, unread: bool) -> list[Place]:
        """Up to `count`, the last added first. unread: even those in which a page may yet be found."""
        sure = self._sure
        taken = [sure.popitem()[0] for _ in range(min(count, len(sure)))]
        while unread and self.unread and len(taken) < count:
            # The scan comes from the other end.
            number, free = next(reversed(self._unread.items()))
            slots = np.flatnonzero(free)[len(taken) - count :]
            if not len(slots):
                del self._unread[number]
                continue
            free[slots] = False
            self.unread -= len(slots)
            taken += [(number, slot) for slot in slots[::-1].tolist()]
        return taken

    def discard(self, place: Place) -> None:
        """A page was found there."""
        self._sure.pop(place, None)
        self._read(place)

    def looked_at(self, place: Place) -> None:
        """No page was found there: if it is free, it is so for sure."""
        if self._read(place):
            self._sure[place] = None

    def drop(self, number: int) -> None:
        """The extent is no more."""
        free = self._unread.pop(number, None)
        if free is not None:
            self.unread -= int(np.count_nonzero(free))
        for place in [place for place in self._sure if place[0] == number]:
            del self._sure[place]

    def _read(self, place: Place) -> bool:
        """Whether the slot was unread."""
        number, slot = place
        free = self._unread.get(number)
        if free is None or not free[slot]:
            return False
        free[slot] = False
        self.unread -= 1
        return True

"""What the index of the local tier keeps of a page and of a namespace, and what it tells of them.

Belongs here: the records. Does not belong here: how they are found and who goes first (index.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from storage_backends.local.policy.order import Order, Rank

Place = tuple[int, int]
"""Folder and extent."""

SECOND = 1_000_000_000
_MOST_SECONDS = (1 << 32) - 1


class Page(NamedTuple):
    """One resident page, as it was when told. folder: its writer's number. own: this process is that writer.

    generation: of its slot; folder, extent, slot and generation together are one page's and no other's, ever.
    time_ns: when it was stored. The index keeps whole seconds, rounded down, of years to 2106; the slot's header has
    the rest. pins: reads that used it.
    """

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


class Pinned(NamedTuple):
    """A batch's resident pages, held. pages: their numbers in the batch. The rest: of each of them, in that order."""

    pages: list[int]
    handles: list[int]
    folders: list[int]
    extents: list[int]
    slots: list[int]
    own: list[bool]


@dataclass(slots=True, eq=False)
class Entry:
    """A page in the index. page: without pins."""

    page: Page
    pins: int = 0
    failures: int = 0

    def told(self) -> Page:
        return self.page._replace(pins=self.pins) if self.pins else self.page


def whole_seconds(time_ns: int) -> int:
    """The stored time that is kept for this one."""
    return min(time_ns // SECOND, _MOST_SECONDS) * SECOND


@dataclass
class Space:
    """The pages of one namespace. order: the own ones. other_children: resident in other folders, per page.

    own_children: keys of resident own pages by their parent. went: parents that were evicted before them.
    expiry: pages stored before this moment are past their time. swept: where `expired` goes on, an extent and a slot.
    """

    order: Order
    entries: dict[bytes, Entry] = field(default_factory=dict)
    other_children: dict[bytes, int] = field(default_factory=dict)
    own_children: dict[bytes, dict[bytes, None]] = field(default_factory=dict)
    went: dict[bytes, None] = field(default_factory=dict)
    touched: int = 0
    oldest: int = 0
    expiry: int = 0
    swept: tuple[Place, int] = ((0, 0), 0)

    def is_expired(self, entry: Entry) -> bool:
        return entry.page.time_ns < self.expiry


class Snapshot:
    """The own pages of a folder at one moment, to be written down in the order in which they would go."""

    def __init__(self, pages: list[tuple[int, Rank, Entry]]) -> None:
        """pages: number of the namespace, rank and entry of each."""
        self.pages = pages

    def __len__(self) -> int:
        return len(self.pages)

    def sort(self) -> None:
        """First to go first. Needs no lock: looks at nothing that the index changes."""
        self.pages.sort(key=lambda page: page[:2])


@dataclass
class Adoption:
    """Pages of these folders on their way to be ours (Index.adoption).

    pages: number of the namespace, share of its folder's pages that came before, which of the folders; namespace, key
    and generation. done: how many are ours by now.
    """

    folders: list[int]
    pages: list[tuple[int, float, int, bytes, bytes, int]] = field(default_factory=list)
    done: int = 0

    def sort(self) -> None:
        """In the order in which they will be ours. Needs no lock: looks at nothing that the index changes."""
        self.pages.sort(key=lambda page: page[:3])

"""Orders of eviction: which leaf goes next.

Belongs here: what every order has in common (pages, children, a queue of leaves) and the orders that rank each page by
one number. Does not belong here: capacity and counters (tier.py), orders with several queues (s3fifo.py).

Why leaves: with "no victim that has resident children" the candidates are the ends of chains only, one in twenty
pages of a conversation trace. A page joins the queue when its last child goes, at the place that its own rank gives it.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

Key = Any  # hashable and comparable with its like: bytes in the tier, int in a replay
Rank = tuple[int, int]


@dataclass(slots=True)
class Page:
    """A resident page. rank: what the queue sorts by. uses: since it was first seen, a ghost's included.

    queue, visits: for orders of several queues."""

    parent: Key | None
    rank: Rank = (0, 0)
    uses: int = 1
    queue: int = 0
    visits: int = 0


class Ghosts:
    """What is known of pages that went or were refused: the newest `capacity` keys, first in, first out."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._known: OrderedDict[Key, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, key: Key, value: int = 1) -> None:
        self._known.pop(key, None)
        self._known[key] = value
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)

    def take(self, key: Key) -> int:
        """What was known of this key, which is no ghost any more; 0: nothing."""
        return self._known.pop(key, 0)


class Order(ABC):
    """Resident pages and who of them goes next. No clock, no I/O, no locks. capacity: of the tier, in pages."""

    name = ""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pages: dict[Key, Page] = {}
        #: Resident children per page; the page itself may be absent (stored later, or never).
        self.children: Counter[Hashable] = Counter()
        self.sequence = 0
        self.queues: list[LeafQueue] = []

    def __len__(self) -> int:
        return len(self.pages)

    def __contains__(self, key: Key) -> bool:
        return key in self.pages

    def set_capacity(self, capacity: int) -> None:
        """The tier has room for more or fewer pages from now on."""
        self.capacity = capacity

    def insert(self, key: Key, parent: Key | None) -> None:
        """A page came in. parent None: unknown, a root until `link` says more."""
        page = self.pages[key] = Page(parent)
        if parent is not None:
            self.children[parent] += 1
        self.inserted(key, page)
        if key not in self.children:
            self.offer(key, page)

    def link(self, key: Key, parent: Key) -> None:
        """A later call told the parent of a page that came in without one."""
        page = self.pages[key]
        if page.parent is None:
            page.parent = parent
            self.children[parent] += 1

    def touch(self, chain: Sequence[Key], used: bool) -> None:
        """These pages and all their resident ancestors are in use. chain: root first; absent pages are passed over.

        used: a lookup, which counts as a use. A write only refreshes: the same request has looked up before.
        """
        seen: set[Key] = set()
        below: list[list[Key]] = []
        for key in reversed(chain):
            walk: list[Key] = []
            at: Key | None = key
            while at is not None and at not in seen and (page := self.pages.get(at)) is not None:
                seen.add(at)
                walk.append(at)
                at = page.parent
            below.append(walk)
        # Ancestors last: of pages touched together the deeper one is the older one. A later walk ends below an
        # earlier one, so its pages come first.
        for walk in reversed(below):
            for key in walk:
                page = self.pages[key]
                self.touched(page, used)
                if key not in self.children:
                    self.offer(key, page)

    def remove(self, key: Key, evicted: bool = False) -> None:
        """A page went. evicted: for want of room, which some orders remember."""
        page = self.pages.pop(key)
        self.removed(key, page, evicted)
        if page.parent is not None:
            self.children[page.parent] -= 1
            if not self.children[page.parent]:
                del self.children[page.parent]
                above = self.pages.get(page.parent)
                if above is not None:
                    self.offer(page.parent, above)

    def next_number(self) -> int:
        self.sequence += 1
        return self.sequence

    def going(self, count: int, kept: Collection[Key], examine: int) -> list[Key]:
        """Up to `count` pages that `victim` would give one after the other, were each evicted, if nothing is used or
        stored meanwhile. kept: pages that may not go. Looks at `examine` pages at most, so that asking costs little."""
        found: list[Key] = []
        above: list[list[tuple[Rank, Key]]] = [[] for _ in self.queues]  # pages that would be leaves by then
        children: dict[Hashable, int] = {}
        gone = [0] * len(self.queues)
        for _ in range(examine):
            firsts = [self._first(queue, later) for queue, later in zip(self.queues, above, strict=True)]
            at = self.turn(firsts, gone)
            key = firsts[at]
            if key is None or len(found) == count:
                break
            page = self.pages[key]
            if above[at] and above[at][0][1] == key:
                heapq.heappop(above[at])
            else:
                self.queues[at].set_aside()
            if key in kept:
                continue
            gone[at] += 1
            if self.stays(page):
                continue
            found.append(key)
            parent = self.pages.get(page.parent)
            if page.parent is not None and parent is not None:
                children[page.parent] = children.get(page.parent, self.children[page.parent]) - 1
                if not children[page.parent]:
                    heapq.heappush(above[parent.queue], (parent.rank, page.parent))
        for queue in self.queues:
            queue.put_back()
        return found

    @staticmethod
    def _first(queue: LeafQueue, above: list[tuple[Rank, Key]]) -> Key | None:
        """The lower of the queue's first page and that of `above`."""
        first = queue.first_item()
        if above and (first is None or above[0] < first):
            return above[0][1]
        return None if first is None else first[1]

    def turn(self, firsts: Sequence[Key | None], gone: Sequence[int]) -> int:
        """Of which queue the next victim is. firsts: of each queue; gone: how many it has lost (`going`)."""
        return 0

    def stays(self, page: Page) -> bool:
        """Whether a page that comes up gets another round."""
        return False

    @abstractmethod
    def victim(self, protected: Collection[Key] = ()) -> Key | None:
        """The page that should go next; None when every leaf is protected. It stays until `remove`."""

    @abstractmethod
    def inserted(self, key: Key, page: Page) -> None:
        """Give a new page its rank."""

    @abstractmethod
    def touched(self, page: Page, used: bool) -> None:
        """Give a page in use its new rank."""

    @abstractmethod
    def offer(self, key: Key, page: Page) -> None:
        """A page became a leaf, or a leaf has another rank or queue."""

    def removed(self, key: Key, page: Page, evicted: bool) -> None:
        """Remember what is worth remembering."""


class LeafQueue:
    """The leaves of an order, lowest rank first. Entries that no longer hold are dropped when they come up."""

    def __init__(self, order: Order, queue: int = 0) -> None:
        self._order = order
        self._queue = queue
        self._heap: list[tuple[Rank, Key]] = []
        self._aside: set[tuple[Rank, Key]] = set()

    def push(self, key: Key, page: Page) -> None:
        heapq.heappush(self._heap, (page.rank, key))
        if len(self._heap) > 64 + 4 * len(self._order.pages):
            self._heap = [item for item in self._heap if self._holds(item)]
            heapq.heapify(self._heap)

    def first(self, protected: Collection[Key] = ()) -> Key | None:
        found = None
        while found is None and (item := self.first_item()) is not None:
            if item[1] in protected:
                self.set_aside()
            else:
                found = item[1]
        self.put_back()
        return found

    def first_item(self) -> tuple[Rank, Key] | None:
        """Rank and key of the first leaf."""
        while self._heap and not self._holds(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def set_aside(self) -> None:
        """Take the first leaf out until `put_back`."""
        self._aside.add(heapq.heappop(self._heap))
        while self._heap and self._heap[0] in self._aside:  # it was offered twice
            heapq.heappop(self._heap)

    def put_back(self) -> None:
        for item in self._aside:
            heapq.heappush(self._heap, item)
        self._aside.clear()

    def _holds(self, item: tuple[Rank, Key]) -> bool:
        rank, key = item
        page = self._order.pages.get(key)
        return page is not None and page.rank == rank and page.queue == self._queue and key not in self._order.children


class Ranked(Order):
    """An order with one queue."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queues = [LeafQueue(self)]

    def victim(self, protected: Collection[Key] = ()) -> Key | None:
        return self.queues[0].first(protected)

    def offer(self, key: Key, page: Page) -> None:
        self.queues[0].push(key, page)


class Lru(Ranked):
    """The leaf that was used the longest ago."""

    name = "lru"

    def inserted(self, key: Key, page: Page) -> None:
        page.rank = (0, self.next_number())

    def touched(self, page: Page, used: bool) -> None:
        page.rank = (0, self.next_number())


class Fifo(Ranked):
    """The leaf that came first."""

    name = "fifo"

    def inserted(self, key: Key, page: Page) -> None:
        page.rank = (0, self.next_number())

    def touched(self, page: Page, used: bool) -> None:
        pass


#: log2 of the uses in 1/256, as integers: a model and its native twin must agree to the last bit.
LOG2_X256 = [0, *(round(256 * math.log2(uses)) for uses in range(1, 256))]


class Credit(Ranked):
    """LRU on a clock of pages written, in which each doubling of a page's uses is worth half a turnover of the tier.

        rank = pages written so far + capacity / 2 * log2(uses)

    A page used once lives as long as under LRU at most; one used four times is still there one turnover after that,
    which outlasts the pause between two turns of a conversation, and the clock ages it: nothing stays for ever. Uses
    are counted up to 255 and remembered for as many evicted pages as the tier holds, so that a page that comes back is
    not new again.

    Along a chain uses never grow, because whatever uses a page uses its ancestors: a page's rank is at most its
    parent's, and the order is suffix first by itself.

    Sources: the ageing is LFU-DA's (M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich, T. Jin, "Evaluating content
    management techniques for Web proxy caches", 1999), with a clock of written pages in the place of the last victim's
    rank, which stands still while pages of one rank go. The logarithm is ours: linear credit keeps the popular too
    long when the tier is large.
    """

    name = "credit"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.written = 0
        self.ghosts = Ghosts(capacity)

    def set_capacity(self, capacity: int) -> None:
        self.capacity = self.ghosts.capacity = capacity

    def inserted(self, key: Key, page: Page) -> None:
        self.written += 1
        page.uses = min(255, 1 + self.ghosts.take(key))
        self._rank(page)

    def touched(self, page: Page, used: bool) -> None:
        if used:
            page.uses = min(255, page.uses + 1)
        self._rank(page)

    def removed(self, key: Key, page: Page, evicted: bool) -> None:
        if evicted:
            self.ghosts.add(key, page.uses)

    def _rank(self, page: Page) -> None:
        page.rank = (self.written + self.capacity * LOG2_X256[page.uses] // 512, self.next_number())

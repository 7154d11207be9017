"""S3-FIFO on chains.

Belongs here: that order. Does not belong here: what all orders share (order.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from storage_backends.local.policy.order import Ghosts, Key, LeafQueue, Order, Page

SMALL, MAIN = 0, 1


class S3Fifo(Order):
    """Three static FIFO queues: a small one for new pages, a main one for those used again there, and ghosts.

    Source: J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction",
    SOSP '23, algorithm 1: small is a tenth of the capacity; more than one visit moves a page from small to main, a
    visit buys another round in main; visits count to 3; ghosts are what left small, as many as main holds.

    One thing is added: only leaves are examined, so a page with resident children waits where it is until they went.
    """

    name = "s3fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._share = max(1, capacity // 10)
        self._size = [0, 0]
        self.queues = [LeafQueue(self, SMALL), LeafQueue(self, MAIN)]
        self.ghosts = Ghosts(max(1, capacity - self._share))

    def set_capacity(self, capacity: int) -> None:
        self.capacity = capacity
        self._share = max(1, capacity // 10)
        self.ghosts.capacity = max(1, capacity - self._share)

    def inserted(self, key: Key, page: Page) -> None:
        page.queue = MAIN if self.ghosts.take(key) else SMALL
        page.rank = (0, self.next_number())
        self._size[page.queue] += 1

    def touched(self, page: Page, used: bool) -> None:
        if used:
            page.visits = min(3, page.visits + 1)

    def offer(self, key: Key, page: Page) -> None:
        self.queues[page.queue].push(key, page)

    def removed(self, key: Key, page: Page, evicted: bool) -> None:
        self._size[page.queue] -= 1
        if evicted and page.queue == SMALL:
            self.ghosts.add(key)

    def turn(self, firsts: Sequence[Key | None], gone: Sequence[int]) -> int:
        small, main = firsts
        return SMALL if main is None or (small is not None and self._size[SMALL] - gone[SMALL] >= self._share) else MAIN

    def stays(self, page: Page) -> bool:
        return page.visits > (1 if page.queue == SMALL else 0)

    def victim(self, protected: Collection[Key] = ()) -> Key | None:
        while True:
            firsts = [leaves.first(protected) for leaves in self.queues]
            key = firsts[self.turn(firsts, (0, 0))]
            if key is None:
                return None
            page = self.pages[key]
            if not self.stays(page):
                return key
            page.visits = 0 if page.queue == SMALL else page.visits - 1
            self._size[page.queue] -= 1
            self._size[MAIN] += 1
            page.queue = MAIN
            page.rank = (0, self.next_number())
            self.offer(key, page)

"""Pages that are computed and wait, so that many are saved together.

Belongs here: which pages wait, how long, and which of them lose their blocks meanwhile. Does not belong here: keys and
tiers (scheduler), or copying (moves).

A batch to be saved costs the engine's interpreter nearly the same whatever its pages, and in a decode step only now and
then a request completes one: so these wait for one another. Until then a page lies in its block and nowhere else. While
its request runs vLLM gives the block to nobody; afterwards, and behind a sliding window, it may, and says so before the
step that writes into it: a page whose block was given away is given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

#: A request that completes as many pages in one step is being prefilled: the step is long, and more of them come.
AT_ONCE = 2
#: Nothing waits for longer, in steps of the engine, ...
STEPS = 128
#: ... and no more pages than these.
PAGES = 64

Owner = TypeVar("Owner", bound=Hashable)


def limit(budget: int, page_bytes: int) -> int:
    """Most pages that wait, where pages on their way have a budget in bytes: they leave room for those of the next."""
    return max(1, min(PAGES, budget // 2 // max(1, page_bytes)))


def ripe(now: int, due: float, pages: int, most: int) -> bool:
    """Whether what waits is saved in step `now`. due: the first step in which something must go."""
    return pages > 0 and (now >= due or pages >= most)


class Run(NamedTuple, Generic[Owner]):
    """Pages `first` to `last` of a request. over: their blocks are nobody's any more."""

    owner: Owner
    first: int
    last: int
    over: bool = False


@dataclass(eq=False)
class _Entry:
    """Pages of one request. due: a step. lost: pages whose blocks were given away. over: no more of it will come."""

    first: int
    last: int
    due: float
    lost: set[int] = field(default_factory=set)
    over: bool = False


class Held(Generic[Owner]):
    """One for each scheduler. A step is `begin`, then `add` for each request, then `take`."""

    def __init__(self, most: int = PAGES) -> None:
        self.most = most
        self.given_up = 0
        """Pages that were never taken, so far."""
        self._entries: dict[Owner, _Entry] = {}
        self._lies_in: dict[int, list[tuple[_Entry, int]]] = {}
        self._pages, self._now, self._due = 0, 0, math.inf
        self._over = False

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def pages(self) -> int:
        """Pages that wait."""
        return self._pages

    def begin(self, written: Iterable[int] = ()) -> None:
        """A step that writes into these blocks, which somebody else may have had before it."""
        self._now += 1
        if self._lies_in:
            for block in written:
                for entry, page in self._lies_in.pop(block, ()):
                    entry.lost.add(page)

    def add(self, owner: Owner, first: int, last: int, blocks: Callable[[int], Iterable[int]], left: int) -> None:
        """After this step the owner's pages `first` to `last` are computed; those before are taken, or wait already.

        blocks: the numbers of the blocks that a page lies in. left: steps after this one for which the page may wait,
        since the request lasts as long at least and its blocks stay its own.
        """
        due = self._now if last - first >= AT_ONCE else self._now + min(STEPS, left)
        entry = self._entries.get(owner)
        if entry is None:
            entry = self._entries[owner] = _Entry(first, last, due)
        else:
            entry.last, entry.due = last, min(entry.due, due)
        self._pages += last - first
        self._due = min(self._due, due)
        # Of those that go at once nothing is left behind but a page whose last token is not known yet.
        for page in range(max(first, last - AT_ONCE), last):
            for block in blocks(page):
                self._lies_in.setdefault(block, []).append((entry, page))

    def finish(self, owner: Owner) -> None:
        """The request is over: its pages go in the next step."""
        entry = self._entries.get(owner)
        if entry is not None:
            entry.over = self._over = True

    def drop(self, owner: Owner) -> None:
        """Nothing of what waits of this request is saved: it begins anew."""
        entry = self._entries.pop(owner, None)
        if entry is not None:
            self._pages -= entry.last - entry.first
            self.given_up += entry.last - entry.first

    def clear(self) -> None:
        """Nothing of what waits is saved."""
        for owner in list(self._entries):
            self.drop(owner)
        self._lies_in.clear()
        self._due, self._over = math.inf, False

    def take(self, known: Callable[[Owner], int]) -> list[Run[Owner]]:
        """What is to be saved at the end of this step: what requests left that are over, and of the others everything
        or nothing as yet.

        known: pages of a request whose tokens are all known. With asynchronous scheduling the last one is computed a
        step before; such a page waits on.
        """
        every = ripe(self._now, self._due, self._pages, self.most)
        if not every and not self._over:
            return []
        runs: list[Run[Owner]] = []
        later: dict[Owner, _Entry] = {}
        for owner, entry in self._entries.items():
            if not every and not entry.over:
                later[owner] = entry
                continue
            last = max(entry.first, min(entry.last, known(owner)))
            begin = entry.first
            for page in sorted(page for page in entry.lost if entry.first <= page < last):
                if page > begin:
                    runs.append(Run(owner, begin, page, entry.over))
                begin = page + 1
                self.given_up += 1
            if last > begin:
                runs.append(Run(owner, begin, last, entry.over))
            if entry.over or last == entry.last:
                self.given_up += entry.last - last
                continue
            # The blocks of those before are not watched.
            entry.first, entry.due = max(last, entry.last - AT_ONCE), self._now + STEPS
            self.given_up += entry.first - last
            later[owner] = entry
        self._entries, self._over = later, False
        waiting = set(map(id, later.values()))
        self._lies_in = {
            block: kept for block, held in self._lies_in.items()
            if (kept := [one for one in held if id(one[0]) in waiting and one[1] >= one[0].first])
        } if later else {}  # fmt: skip
        self._pages = sum(entry.last - entry.first for entry in later.values())
        self._due = min((entry.due for entry in later.values()), default=math.inf)
        return runs

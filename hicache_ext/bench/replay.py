"""Replays of a trace: over a tier that is only its policies, and over Belady's, which knows the future.

Belongs here: the model of an engine's use of a tier, and what is counted. Does not belong here: the trace's format
(trace.py), policies (storage_backends.local.policy), options and tables (hicache_ext.cli).

The model: a request looks up its chain, uses what is resident from the root on in a row, and stores the rest. A hit is
a page so used; whatever lies behind the first gap is worth nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from hicache_ext.bench.trace import BLOCK_TOKENS, NEVER, Trace
from storage_backends.local.policy.tier import Tier


@dataclass
class Outcome:
    """Pages. front: hits of the engine's own memory; read: hits of the tier."""

    front: int = 0
    read: int = 0
    written: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    evicted: Counter[str] = field(default_factory=Counter)

    def token_hit_ratio(self, trace: Trace) -> float:
        """Prompt tokens that need no prefill, of all prompt tokens."""
        return (self.front + self.read) * BLOCK_TOKENS / trace.tokens if trace.tokens else 0.0

    def written_per_read(self) -> float | None:
        return self.written / self.read if self.read else None


class Front:
    """The engine's own memory before the tier: LRU over pages, ancestors last. capacity 0: none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pages: OrderedDict[int, None] = OrderedDict()

    def use(self, chain: list[int]) -> int:
        """How many pages were there in a row from the root; all of the chain is there afterwards, as far as it fits."""
        if not self.capacity:
            return 0
        hits = 0
        while hits < len(chain) and chain[hits] in self._pages:
            hits += 1
        for page in reversed(chain):
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self.capacity:
            self._pages.popitem(last=False)
        return hits


def replay(trace: Trace, tier: Tier, front_capacity: int = 0) -> Outcome:
    """Every request of the trace over this tier. A tier is asked for nothing that the front holds."""
    front = Front(front_capacity)
    outcome = Outcome(rejected=tier.rejected, evicted=tier.evicted)
    for _, seconds, chain in trace:
        there = front.use(chain)
        outcome.front += there
        if there < len(chain):
            hits = tier.lookup(chain, there)
            outcome.read += hits
            tier.write(chain, there + hits, seconds)
    outcome.written = tier.written
    return outcome


def belady(trace: Trace, capacity: int) -> Outcome:
    """Keep the `capacity` pages that are used again the soonest: no policy of that capacity has more hits.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2),
    1966, with bypass: a page may be passed over when it comes. Why it is the bound for prefixes, and not an estimate:

    - Without the rule that a hit needs its ancestors, pages are of one size and this rule has the most hits (any policy
      here looks up a whole request, then stores; one that serves page by page could do the same, so it bounds both).
      With the rule there can only be fewer.
    - It keeps that rule by itself. A page is named by its whole prefix, so every use of it is a use of its parent in
      the same request: the parent's next use is never later, and where both are the same the deeper page goes first.
      What is kept is closed under prefixes, so each of its hits counts, and the bound is reached.

    As an engine's memory of F pages and a tier of C hold at most F + C pages, belady(F + C) bounds the two together.
    `written` counts pages that were kept when they came; it is what this schedule writes, and no bound of writes.
    """
    outcome = Outcome()
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int, int]] = []  # negated next use, negated depth
    for now, (chain, following) in enumerate(trace.with_next()):
        hits = 0
        while hits < len(chain) and chain[hits] in kept:
            hits += 1
        outcome.read += hits
        fresh = set(chain[hits:])
        for depth, (page, following_use) in enumerate(zip(chain, following, strict=True)):
            if following_use == NEVER:
                kept.pop(page, None)
                fresh.discard(page)
            else:
                kept[page] = following_use
                heapq.heappush(furthest, (-following_use, -depth, page))
        while len(kept) > capacity:
            use, _, page = heapq.heappop(furthest)
            if kept.get(page) == -use:
                del kept[page]
                fresh.discard(page)
        outcome.written += len(fresh)
        if len(furthest) > 64 + 2 * len(kept):  # uses that have passed lie at the bottom and never come up
            furthest = [item for item in furthest if -item[0] > now and kept.get(item[2]) == -item[0]]
            heapq.heapify(furthest)
    return outcome

"""A tier that is only its policies: a capacity in pages, an order, an admission, and what happened, counted by reason.

Belongs here: how order and admission work together. Does not belong here: bytes, and whose turn it is (order.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from storage_backends.local.policy.admission import Admission, Always
from storage_backends.local.policy.order import Key, Order

CAPACITY, REMOVED = "capacity", "removed"
#: Refusals beside those of an admission: a page whose parent was just refused could never be used; every leaf that
#: could make room belongs to the chain being written.
UNREACHABLE, NO_ROOM = "unreachable", "no_room"


class Tier:
    """written: pages. evicted, rejected: reason -> pages."""

    def __init__(self, order: Order, admission: Admission | None = None) -> None:
        self.order = order
        self.admission = admission or Always()
        self.written = 0
        self.evicted: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()

    def lookup(self, chain: Sequence[Key], start: int = 0) -> int:
        """How many pages of chain[start:] are resident in a row. chain: root first. Counts as a use of these pages.

        start: where the engine's own memory ends. The pages before count as used too: the tier knows its chains.
        """
        end = start
        while end < len(chain) and chain[end] in self.order:
            end += 1
        self.order.touch(chain[:end], used=True)
        return end - start

    def write(self, chain: Sequence[Key], start: int, now: float, size: int = 1) -> None:
        """Offer the absent pages of chain[start:]; the pages before are in the engine's memory or here."""
        protected = frozenset(chain)
        refused = False
        for at in range(start, len(chain)):
            key = chain[at]
            if key in self.order:
                continue
            full = len(self.order) >= self.order.capacity
            # Asked even where a refused parent decides, so that the whole chain is known the next time.
            admitted = not full or self.admission.admit(key, size, now)
            if refused or not admitted:
                self.rejected[self.admission.reason if not admitted else UNREACHABLE] += 1
                refused = True
                continue
            if full and not self._make_room(protected):
                self.rejected[NO_ROOM] += 1
                refused = True
                continue
            self.order.insert(key, chain[at - 1] if at else None)
            self.written += 1
        self.order.touch(chain, used=False)

    def remove(self, key: Key) -> None:
        """A page is dropped for another reason than room; its descendants stay, of use again once it is back."""
        if key in self.order:
            self.order.remove(key)
            self.evicted[REMOVED] += 1

    def _make_room(self, protected: frozenset[Key]) -> bool:
        victim = self.order.victim(protected)
        if victim is None:
            return False
        self.order.remove(victim, evicted=True)
        self.evicted[CAPACITY] += 1
        return True

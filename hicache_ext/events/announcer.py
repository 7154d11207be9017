"""What a router was told of the storage tiers, and what it must be told next.

Belongs here: bookkeeping from residency changes to events, without I/O, clocks or threads of its own. Does not belong
here: where changes come from (storage_backends, the adapters), how blocks make up an event (chains.py), or how events
travel (publisher.py, the engine).

The state is two views of each block and medium: what is so, and what was said. `take` gives events that make the second
equal to the first, so nothing is said twice, changes that cancel each other while nobody takes cost nothing, and what
waits to be said is bounded by what there is, not by how often it changed.

    is so    a page with this event hash, of a namespace that is served, has a copy in a visible tier of the medium
    said     by the last BlockStored or BlockRemoved that `take` gave, with nothing cleared since

Consumers do not count references: a block is stored in a medium when its first copy there comes and removed when its
last one goes, however many tiers, and pages of one event hash (SGLang gives pages of a LoRA adapter the hash of the
plain ones), have it. Stores come parents first. A page of which no tokens are known is not announced; it is as soon as
somebody tells them.

A page costs about 400 bytes and 4 more for each of its tokens (`tests/unit/test_announcer.py` measures it).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hicache_ext.events.chains import Chains, rows
from hicache_ext.events.model import AnyEvent, BlockRemoved, LoadCost, Medium
from hicache_ext.page import KEY_BYTES, NAMESPACE_BYTES, split_keys
from storage_backends.base import Notes

#: Pages kept. Those beyond it are not announced, and counted.
PAGES = 1 << 20
#: Pages that one `take` looks over at most, when all must be looked at again: a few milliseconds.
_LOOKED_AT = 4096

_MEDIA = (Medium.DISK, Medium.EXTERNAL)


class _Page:
    """One page, wherever it is. copies: a bit for each tier that has it. hash: 0 = not known (and nothing else of it).

    parent: event hash of the page before; 0: it begins a prompt. tokens: u32le.
    """

    __slots__ = ("copies", "hash", "lora", "namespace", "parent", "salt", "tokens")

    def __init__(self, namespace: bytes) -> None:
        self.namespace = namespace
        self.copies = self.hash = self.parent = 0
        self.tokens = b""
        self.salt = self.lora = ""


class _Tier(NamedTuple):
    bit: int
    medium: int
    visible: bool


class Announcer:
    """Thread-safe. No method waits for anything but others of its methods, which are dictionary work."""

    def __init__(self, limit: int = PAGES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._tiers: dict[int, _Tier] = {}
        self._costs: dict[int, LoadCost] = {}
        self._next = 0
        self._served: frozenset[bytes] | None = None
        self._pages: dict[bytes, _Page] = {}
        self._blocks: dict[int, _Page | list[_Page]] = {}
        self._said: dict[int, int] = {}
        self._dirty: dict[int, None] = {}
        self._stale = False  # whether all pages are to be looked at again
        self._sweep: Iterator[bytes] | None = None
        self._media_of: dict[int, int] = {}
        self._unknown = 0
        self._counts: Counter[str] = Counter()

    # -- what is so ----------------------------------------------------------------------------------------------

    def add(self, medium: str) -> int:
        """A tier of this medium (DISK or EXTERNAL) is there, and holds nothing yet; its number, never given again."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._tiers[number] = _Tier(1 << number, _MEDIA.index(Medium(medium)), True)
            return number

    def drop(self, tier: int) -> None:
        """The tier is gone, with all that it held."""
        with self._lock:
            self._costs.pop(tier, None)
            if self._tiers.pop(tier, None) is not None:
                self._changed()

    def show(self, tier: int, visible: bool) -> None:
        """Whether what the tier holds can be had from it at present."""
        with self._lock:
            known = self._tiers.get(tier)
            if known is not None and known.visible != visible:
                self._tiers[tier] = known._replace(visible=visible)
                self._changed()

    def price(self, tier: int, cost: LoadCost | None) -> None:
        """What loading from the tier costs, as measured: stores say it from now on. What was said is not said again."""
        with self._lock:
            if cost is None or tier not in self._tiers:
                self._costs.pop(tier, None)
            else:
                self._costs[tier] = cost

    def serve(self, namespaces: Iterable[bytes] | None) -> None:
        """Pages of these namespaces (digests) can be loaded, no others; None: of all."""
        served = None if namespaces is None else frozenset(namespaces)
        with self._lock:
            if served != self._served:
                self._served = served
                self._changed()

    def stored(self, tier: int, namespace: bytes, keys: bytes, notes: Notes | None = None) -> None:
        """The tier holds these pages (n x 32 bytes). notes: what is known of them, which need not be told again."""
        split = split_keys(keys)
        told = None if notes is None else rows(notes, len(split))
        with self._lock:
            known = self._tiers.get(tier)
            if known is None:
                return
            for at, key in enumerate(split):
                page = self._page(namespace, key)
                if page is None:
                    continue
                page.copies |= known.bit
                if told is not None and not page.hash:
                    self._tell(page, told[0][at], told[1][at], told[2][at], notes)
                if page.hash:
                    self._dirty[page.hash] = None

    def know(self, namespace: bytes, keys: bytes, notes: Notes) -> None:
        """What these pages are, wherever they are; of those that are nowhere it is forgotten."""
        told = rows(notes, len(keys) // KEY_BYTES)
        with self._lock:
            for at, key in enumerate(split_keys(keys)):
                page = self._pages.get(namespace + key)
                if page is not None and not page.hash:
                    self._tell(page, told[0][at], told[1][at], told[2][at], notes)
                    if page.hash:
                        self._dirty[page.hash] = None

    def tokens(self, namespace: bytes, keys: Iterable[bytes]) -> list[bytes | None]:
        """The pages' tokens (u32le), where they are known."""
        with self._lock:
            pages = [self._pages.get(namespace + key) for key in keys]
        return [page.tokens if page is not None and page.hash else None for page in pages]

    def removed(self, tier: int, namespace: bytes, keys: bytes) -> None:
        """The tier does not hold these pages any more."""
        with self._lock:
            known = self._tiers.get(tier)
            if known is None:
                return
            for key in split_keys(keys):
                page = self._pages.get(namespace + key)
                if page is not None and page.copies & known.bit:
                    page.copies ^= known.bit
                    self._settle(namespace + key, page)

    def names(self) -> list[bytes]:
        """All pages, each its namespace and key; for looking over what is believed, with `held`."""
        with self._lock:
            return list(self._pages)

    def held(self, tier: int, names: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
        """Those of these pages that the tier is believed to hold, as (namespace, packed keys)."""
        found: dict[bytes, list[bytes]] = {}
        with self._lock:
            known = self._tiers.get(tier)
            for name in names if known is not None else ():
                page = self._pages.get(name)
                if page is not None and known is not None and page.copies & known.bit:
                    found.setdefault(page.namespace, []).append(name[NAMESPACE_BYTES:])
        return [(namespace, b"".join(keys)) for namespace, keys in found.items()]

    # -- what was said -------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """The consumer has forgotten everything, or there is a new one: all is to be said again."""
        with self._lock:
            self._said = {}
            self._changed()

    def take(self, limit: int = 1024) -> list[AnyEvent]:
        """What is to be said next, of at most `limit` blocks. `quiet` says whether that was all, not an empty answer:
        where all pages are to be looked at again, each call looks at some."""
        with self._lock:
            removed: dict[int, list[int]] = {}
            stored = Chains()
            left = limit
            self._look_over(limit)
            while left > 0 and self._dirty:
                block = next(iter(self._dirty))
                del self._dirty[block]
                wanted, said = self._wanted(block), self._said.get(block, 0)
                for medium in range(len(_MEDIA)):
                    bit = 1 << medium
                    if said & ~wanted & bit:
                        removed.setdefault(medium, []).append(block)
                        self._say(block, self._said[block] & ~bit)
                        left -= 1
                    elif wanted & ~said & bit:
                        chain = self._unsaid_chain(block, bit)
                        for member in reversed(chain[-max(1, left) :]):
                            self._say(member, self._said.get(member, 0) | bit)
                            page = self._first(member)
                            cost = self._cost(medium, page) if self._costs else None
                            stored.add(_MEDIA[medium], page, cost)
                            left -= 1
                        if not self._said.get(block, 0) & bit:
                            self._dirty[block] = None  # its ancestors filled this turn
            events: list[AnyEvent] = [
                BlockRemoved(block_hashes=blocks, medium=_MEDIA[medium].value) for medium, blocks in removed.items()
            ]
            events += stored.events
            self._counts["stored"] += stored.blocks
            self._counts["removed"] += sum(map(len, removed.values()))
            return events

    @property
    def quiet(self) -> bool:
        """Whether `take` has nothing to give."""
        with self._lock:
            return not self._dirty and not self._stale and self._sweep is None

    def stats(self) -> dict[str, int]:
        """pages: kept. unknown: of them, those whose tokens are not known. announced: blocks, in any medium.

        stored, removed: blocks in events so far. over_limit: pages that were not taken in for want of room.
        """
        with self._lock:
            return {
                "pages": len(self._pages),
                "unknown": self._unknown,
                "announced": len(self._said),
                "stored": self._counts["stored"],
                "removed": self._counts["removed"],
                "over_limit": self._counts["over_limit"],
            }

    # -- helpers, under the lock ---------------------------------------------------------------------------------

    def _page(self, namespace: bytes, key: bytes) -> _Page | None:
        page = self._pages.get(namespace + key)
        if page is None:
            if len(self._pages) >= self._limit:
                self._counts["over_limit"] += 1
                return None
            page = self._pages[namespace + key] = _Page(namespace)
            self._unknown += 1
        return page

    def _tell(self, page: _Page, block: int, parent: int, tokens: bytes, notes: Notes | None) -> None:
        if not block or notes is None:
            return
        page.hash, page.parent, page.tokens, page.salt, page.lora = block, parent, tokens, notes.salt, notes.lora
        self._unknown -= 1
        others = self._blocks.get(block)
        if others is None:
            self._blocks[block] = page
        elif isinstance(others, list):
            others.append(page)
        else:
            self._blocks[block] = [others, page]

    def _settle(self, name: bytes, page: _Page) -> None:
        """Some copy of the page went."""
        if page.hash:
            self._dirty[page.hash] = None
        if page.copies:
            return
        del self._pages[name]
        if not page.hash:
            self._unknown -= 1
            return
        others = self._blocks[page.hash]
        if isinstance(others, list):
            others.remove(page)
            if len(others) == 1:
                self._blocks[page.hash] = others[0]
        else:
            del self._blocks[page.hash]

    def _changed(self) -> None:
        """Any block may have changed. Constant work: who says that a consumer has forgotten all may be in a hurry."""
        self._media_of = {}
        self._stale = True

    def _look_over(self, enough: int) -> None:
        """Look at some of the pages, where all are to be looked at, until `enough` blocks wait to be said."""
        if self._stale:
            self._stale, self._sweep = False, iter(list(self._pages))
        if self._sweep is None:
            return
        alive = sum(tier.bit for tier in self._tiers.values())
        for _ in range(_LOOKED_AT):
            name = next(self._sweep, None)
            if name is None:
                self._sweep = None
                return
            page = self._pages.get(name)
            if page is None:
                continue
            block = page.hash
            if page.copies & ~alive:
                page.copies &= alive
                self._settle(name, page)
            if block and self._wanted(block) != self._said.get(block, 0):
                self._dirty[block] = None
                if len(self._dirty) >= enough:
                    return

    def _first(self, block: int) -> _Page:
        pages = self._blocks[block]
        return pages[0] if isinstance(pages, list) else pages

    def _wanted(self, block: int) -> int:
        """A bit for each medium in which the block has a copy that can be had."""
        pages = self._blocks.get(block)
        if pages is None:
            return 0
        wanted = 0
        for page in pages if isinstance(pages, list) else (pages,):
            if self._served is None or page.namespace in self._served:
                media = self._media_of.get(page.copies)
                if media is None:
                    media = 0
                    for tier in self._tiers.values():
                        if tier.visible and page.copies & tier.bit:
                            media |= 1 << tier.medium
                    self._media_of[page.copies] = media
                wanted |= media
        return wanted

    def _cost(self, medium: int, page: _Page) -> LoadCost | None:
        """Of the fastest tier that has the page there."""
        costs = [
            cost
            for number, cost in self._costs.items()
            if (tier := self._tiers[number]).medium == medium and tier.visible and page.copies & tier.bit
        ]
        return max(costs, key=lambda cost: cost.bytes_per_s, default=None)

    def _unsaid_chain(self, block: int, bit: int) -> list[int]:
        """The block and those above it that are to be stored in this medium as well and were not yet, it first."""
        chain = [block]
        seen = {block}
        at = self._first(block).parent
        while at and at not in seen and not self._said.get(at, 0) & bit and self._wanted(at) & bit:
            chain.append(at)
            seen.add(at)
            at = self._first(at).parent
        return chain

    def _say(self, block: int, media: int) -> None:
        if media:
            self._said[block] = media
        else:
            self._said.pop(block, None)

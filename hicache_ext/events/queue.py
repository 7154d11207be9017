"""Events of who announces each change as it comes, held for the publisher.

Belongs here: a bounded queue that is a publisher's `Source`. Does not belong here: deciding what is announced.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from msgspec.structs import replace

from hicache_ext.events.model import AllBlocksCleared, AnyEvent, BlockRemoved, BlockStored


class EventQueue:
    """What was put is taken in order, until it is too much: then all of it is dropped, and everything is told again.

    snapshot: gives what is so, as stores, parents first. It is called on the publisher's thread. Events that are put
    while it is gathered come after it: for any block the last one counts, so that readers end up right even where the
    snapshot has seen what they say.
    """

    def __init__(self, snapshot: Callable[[], Iterable[AnyEvent]], blocks: int = 100_000) -> None:
        self._snapshot, self._most = snapshot, blocks
        self._waiting: deque[AnyEvent] = deque()
        self._blocks = 0
        self._over = False
        self._told: Iterator[AnyEvent] = iter(())
        self._telling = False
        self._lock = threading.Lock()
        self.overflows = 0

    def put(self, events: Iterable[AnyEvent]) -> None:
        """Any thread; never waits. The publisher must be woken after it."""
        new = list(events)
        blocks = sum(map(_blocks, new))
        with self._lock:
            if self._over:
                return
            if self._blocks + blocks > self._most:
                self._waiting.clear()
                self._blocks = 0
                self._over = True
                self.overflows += 1
                return
            self._waiting.extend(new)
            self._blocks += blocks

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._blocks = 0
            self._over = False
        self._told, self._telling = iter(self._snapshot()), True

    def take(self, limit: int) -> list[AnyEvent]:
        if self._over:
            self.clear()
            return [AllBlocksCleared()]
        events: list[AnyEvent] = []
        left = limit
        while left > 0 and self._telling:
            event = next(self._told, None)
            if event is None:
                self._telling = False
                break
            first, rest = cut(event, left)
            events.append(first)
            left -= _blocks(first)
            if rest is not None:
                self._told = _after(rest, self._told)
        if self._telling:
            return events
        with self._lock:
            while left > 0 and self._waiting:
                first, rest = cut(self._waiting.popleft(), left)
                events.append(first)
                left -= _blocks(first)
                self._blocks -= _blocks(first)
                if rest is not None:
                    self._waiting.appendleft(rest)
        return events


def _after(first: AnyEvent, rest: Iterator[AnyEvent]) -> Iterator[AnyEvent]:
    yield first
    yield from rest


def _blocks(event: AnyEvent) -> int:
    return len(event.block_hashes) if isinstance(event, BlockStored | BlockRemoved) else 1


def cut(event: AnyEvent, blocks: int) -> tuple[AnyEvent, AnyEvent | None]:
    """The event's first `blocks` blocks, and the others if there are more."""
    if isinstance(event, AllBlocksCleared) or len(event.block_hashes) <= blocks:
        return event, None
    first, rest = event.block_hashes[:blocks], event.block_hashes[blocks:]
    if isinstance(event, BlockRemoved):
        return replace(event, block_hashes=first), replace(event, block_hashes=rest)
    tokens = blocks * event.block_size
    return (
        replace(event, block_hashes=first, token_ids=event.token_ids[:tokens]),
        replace(event, block_hashes=rest, token_ids=event.token_ids[tokens:], parent_block_hash=first[-1]),
    )

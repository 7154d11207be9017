"""Events of who announces each change as it comes, held for the publisher.

Belongs here: a bounded queue that is a publisher's `Source`. Does not belong here: deciding what is announced.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec.structs import replace

from hicache_ext.events.model import AllBlocksCleared, AnyEvent, BlockRemoved


class EventQueue:
    """What was put is taken in order, until it is too much: then all of it is dropped, and everything is told again.

    snapshot: gives what is so, as stores, parents first. It is called on the publisher's thread. Events that are put
    while it is gathered come after it: for any block the last one counts, so that readers end up right even where the
    snapshot has seen what they say. events: how many may wait.
    """

    def __init__(self, snapshot: Callable[[], Iterable[AnyEvent]], events: int = 100_000) -> None:
        self._snapshot, self._most = snapshot, events
        self._waiting: deque[Sequence[AnyEvent]] = deque()
        self._count = 0
        self._over = False
        self._telling: Iterator[AnyEvent] = iter(())  # begun, and comes first
        self._lock = threading.Lock()
        self.overflows = 0

    def put(self, events: Sequence[AnyEvent]) -> None:
        """Any thread; never waits. The publisher must be woken after it. The events are not changed from then on."""
        with self._lock:
            if self._over:
                return
            if self._count + len(events) > self._most:
                self._waiting.clear()
                self._count = 0
                self._over = True
                self.overflows += 1
                return
            self._waiting.append(events)
            self._count += len(events)

    @property
    def waiting(self) -> int:
        """Events that were put and not taken yet, to the last batch that was begun."""
        return self._count

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._count = 0
            self._over = False
        self._telling = iter(self._snapshot())

    def take(self, limit: int) -> list[AnyEvent]:
        if self._over:
            self.clear()
            return [AllBlocksCleared()]
        taken: list[AnyEvent] = []
        left = limit
        while left > 0:
            event = next(self._telling, None)
            if event is None:
                with self._lock:
                    if not self._waiting:
                        break
                    more = self._waiting.popleft()
                    self._count -= len(more)
                self._telling = iter(more)
                continue
            blocks = 1 if type(event) is AllBlocksCleared else len(event.block_hashes)  # type: ignore[union-attr]
            if blocks > left:
                event, rest = cut(event, left)
                self._telling = _after(rest, self._telling)
            taken.append(event)
            left -= blocks
        return taken


def _after(first: AnyEvent | None, rest: Iterator[AnyEvent]) -> Iterator[AnyEvent]:
    if first is not None:
        yield first
    yield from rest


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

"""Event streams for tests: a store that changes at random, and a reader that believes what it is told."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from hicache_ext.events.model import AllBlocksCleared, AnyEvent, BlockRemoved, BlockStored, Medium
from hicache_ext.events.queue import EventQueue
from hicache_ext.events.subscriber import Received, Subscriber
from hicache_ext.events.view import View

SIZE = 2
MEDIA = (Medium.DISK, Medium.EXTERNAL)
SECONDS = 20.0


class Store:
    """What is so, changed at random, each change put into the queue at once."""

    def __init__(self, seed: int = 0, events: int = 100_000) -> None:
        self.held: dict[Medium, dict[int, None]] = {medium: {} for medium in MEDIA}
        self.queue = EventQueue(self.snapshot, events)
        self.wake: Callable[[], None] = lambda: None
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def snapshot(self) -> list[AnyEvent]:
        with self._lock:
            return [stored(medium, block) for medium in MEDIA for block in self.held[medium]]

    def change(self, times: int = 1, universe: int = 200) -> None:
        for _ in range(times):
            with self._lock:
                medium, block = self._random.choice(MEDIA), self._random.randrange(universe)
                held = self.held[medium]
                event: AnyEvent
                if block in held:
                    del held[block]
                    event = BlockRemoved([block], medium)
                else:
                    held[block] = None
                    event = stored(medium, block)
                self.queue.put([event])
            self.wake()

    def truth(self) -> dict[Medium, set[int]]:
        with self._lock:
            return {medium: set(blocks) for medium, blocks in self.held.items() if blocks}


def stored(medium: Medium, block: int) -> BlockStored:
    return BlockStored([block], block - 1 if block % 10 else None, [block] * SIZE, SIZE, None, medium)


class Reader:
    """A router: follows the stream on a thread of its own, as Dynamo's indexer does."""

    def __init__(self, endpoint: str, replay_endpoint: str, pause: float = 0.0) -> None:
        self._source = Subscriber(endpoint, replay_endpoint, batches=10)
        self.view, self.batches, self.pause = View(), list[Received](), pause
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            got = self._source.receive(0.02)
            if got is not None and not got.stale:
                self.batches.append(got)
                for event in got.decoded.batch.events:
                    self.view.apply(event)
                time.sleep(self.pause)

    def cleared(self) -> int:
        return sum(isinstance(event, AllBlocksCleared) for got in self.batches for event in got.decoded.batch.events)

    def agrees(self, store: Store) -> bool:
        return self.view.held() == store.truth()

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self._source.close()


def wait(condition: Callable[[], object], what: str = "") -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, f"did not come to be: {what}"
        time.sleep(0.005)

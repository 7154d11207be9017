"""Neighbours in a shared region that are killed while they write and remove, again and again."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.worker import Worker

_TURNS = 12


@contextlib.contextmanager
def neighbours_that_die(directory: Path, capacity: int, turns: int = _TURNS) -> Iterator[None]:
    """A process that forks neighbours, which write and remove pages, and kills each at a random moment.

    Few, since each leaves an extent behind, and what others keep in the region is not to be evicted.
    """
    worker = Worker(directory, capacity, engine="memory")
    over = threading.Event()

    def run() -> None:
        chance = random.Random(1)
        for turn in range(turns):
            if over.wait(0.05):
                return
            worker.ask("die_writing", chain=f"dying/{turn}", after=chance.uniform(0, 0.004))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(20)
        worker.stop()

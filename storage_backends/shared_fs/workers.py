"""Threads that may hang with the share: daemons, so that a mount that never answers holds up no exit.

Does not belong here: what they do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """run: may block. refuse: called instead, on any thread, when it is not to begin any more."""

    run: Callable[[], None]
    refuse: Callable[[], None]


class Workers:
    """Reads go before everything else: somebody waits for them."""

    def __init__(self, threads: int, name: str) -> None:
        self._reads: deque[Job] = deque()
        self._others: deque[Job] = deque()
        lock = threading.Lock()
        self._work, self._idle = threading.Condition(lock), threading.Condition(lock)
        self._running = 0
        self._closed = False
        for i in range(threads):
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True).start()

    def submit(self, job: Job, read: bool = False) -> None:
        with self._work:
            if not self._closed:
                (self._reads if read else self._others).append(job)
                self._work.notify()
                return
        job.refuse()

    def refuse_waiting(self) -> None:
        """Refuse what has not begun."""
        with self._work:
            waiting = [*self._reads, *self._others]
            self._reads.clear()
            self._others.clear()
        for job in waiting:
            job.refuse()

    def drain(self, until: float) -> bool:
        """Wait for all that was submitted, until then (monotonic seconds); whether it has ended."""
        with self._idle:
            return self._idle.wait_for(
                lambda: not (self._running or self._reads or self._others), max(0.0, until - time.monotonic())
            )

    def close(self) -> None:
        """Refuse what waits and what comes; threads end with what they are at."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        self.refuse_waiting()

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._reads or self._others or self._closed):
                    self._work.wait()
                if not (self._reads or self._others):
                    return
                job = (self._reads or self._others).popleft()
                self._running += 1
            try:
                job.run()
            except Exception:
                logger.exception("a job on the share raised")
                with suppress(Exception):
                    job.refuse()
            with self._idle:
                self._running -= 1
                if not self._running:
                    self._idle.notify_all()

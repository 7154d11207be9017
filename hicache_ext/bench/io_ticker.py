"""How long other Python threads wait while a tier works: a thread that sleeps 1 ms in a loop, and how late it wakes.

Belongs here: the ticker and its arithmetic. Does not belong here: what runs meanwhile.

Whoever holds the interpreter's lock, or every core, makes the ticker late. An engine's scheduler is such a thread.
"""

from __future__ import annotations

import math
import threading
import time

TICK_SECONDS = 0.001


class Ticker:
    """Ticks while it is entered; several times adds up. late_ms: how much later than asked each tick came."""

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self._stop = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Ticker:
        self._stop = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._tick, args=(started,), name="bench-ticker", daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        assert self._thread is not None
        self._thread.join()

    def _tick(self, started: threading.Event) -> None:
        started.set()
        since = time.perf_counter()
        while not self._stop:
            time.sleep(TICK_SECONDS)
            now = time.perf_counter()
            self.late_ms.append((now - since - TICK_SECONDS) * 1e3)
            since = now


def p99(values: list[float]) -> float:
    """The smallest value that at least 99 % of all do not exceed. Of fewer than 100, the largest."""
    if not values:
        return 0.0
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def idle(seconds: float) -> list[float]:
    """How late the ticker is while nothing of ours runs."""
    with Ticker() as ticker:
        time.sleep(seconds)
    return ticker.late_ms

"""What KV events of the storage tiers cost the engine's scheduler thread: microseconds for each event that it moves.

Belongs here: measuring. Does not belong here: options and tables (cli.bench_events).

The scheduler's part is one call per publication (`TierEvents.move`): look for AllBlocksCleared among the engine's own
events, and take what is ready; and a note of the tokens with each backup. It is timed as the scheduler runs it, with
the thread that makes events ready beside it, under load (a batch of changes before each call) and idle. What the engine
itself pays for one of its own events, to make it and put it into its queue, is measured in the same process with the
same page size where SGLang is installed.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hicache_ext.events.model import AllBlocksCleared, AnyEvent
from hicache_ext.page import KEY_BYTES
from hicache_ext.sglang.announcing import TierEvents
from hicache_ext.sglang.tokens import TokenNotes
from storage_backends.base import Notes

BLOCKS, QUICK_BLOCKS = 100_000, 5_000
PAGE = 64
_BATCH = 128


def run(blocks: int, page: int = PAGE, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Rows of what, unit, value and spread (least and largest of the five parts of the run)."""
    say("storing, then taking back")
    ours = _Scheduler(page)
    rows = []
    for what, change in (("stored", ours.store), ("removed", ours.remove)):
        parts = [ours.turns(change, blocks * part // 5, blocks * (part + 1) // 5) for part in range(5)]
        rows.append(_row(f"move, blocks {what}", "us/block", [1e6 * seconds / moved for seconds, moved, _ in parts]))
        rows.append(_row(f"move, events {what}", "us/event", [1e6 * s / events for s, _, events in parts]))
    say("idle")
    idle = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(2000):
            ours.move()
        idle.append(1e6 * (time.perf_counter() - began) / 2000)
    rows.append(_row("a call with nothing to move", "us/call", idle))
    notes, hashes = TokenNotes(), [f"{i:064x}" for i in range(_BATCH)]
    noted = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(2000):
            notes.note(hashes, range(0), page, [], (None, None))
        noted.append(1e6 * (time.perf_counter() - began) / 2000)
    rows.append(_row(f"noting the tokens of a backup of {_BATCH} pages", "us/backup", noted))
    say("the engine's own")
    own = _engines_own(min(blocks, 20_000), page)
    if own:
        rows.append(_row("SGLang's own event, recorded and taken", "us/block", own))
    return rows


class _Scheduler:
    """Plays the scheduler and the storage threads over one TierEvents."""

    def __init__(self, page: int) -> None:
        self._events = TierEvents()
        self._events._convert = lambda event: event
        self._tier = self._events.announcer.add("DISK")
        self._page = page
        self._events._start()

    def move(self) -> list[AnyEvent]:
        events: list[AnyEvent] = []
        self._events.move(events, AllBlocksCleared in map(type, events))
        return events

    def store(self, first: int, count: int) -> None:
        numbers = np.arange(first, first + count, dtype=np.int64)
        tokens = (numbers[:, None] * self._page + np.arange(self._page)).astype(np.uint32)
        hashes = np.stack([numbers + (1 << 40), np.where(numbers % 1000, numbers + (1 << 40) - 1, 0)], 1)
        self._events.announcer.stored(self._tier, bytes(16), _keys(numbers), Notes(tokens, hashes))
        self._events._wake.set()

    def remove(self, first: int, count: int) -> None:
        numbers = np.arange(first, first + count, dtype=np.int64)
        self._events.announcer.removed(self._tier, bytes(16), _keys(numbers))
        self._events._wake.set()

    def turns(self, change: Callable[[int, int], None], first: int, end: int) -> tuple[float, int, int]:
        """Make these changes and move until all are moved: seconds in `move`, blocks and events."""
        spent, moved, count, at = 0.0, 0, 0, first
        until = time.monotonic() + 60
        while moved < end - first and time.monotonic() < until:
            if at < end:
                change(at, min(_BATCH, end - at))
                at = min(end, at + _BATCH)
            time.sleep(0.001)  # the forward pass
            began = time.thread_time()
            events = self.move()
            spent += time.thread_time() - began
            count += len(events)
            moved += sum(len(getattr(event, "block_hashes", ())) for event in events)
            del events  # outside the time: SGLang's publisher frees them on its own thread
        return spent, max(1, moved), max(1, count)


def _keys(numbers: np.ndarray) -> bytes:
    packed = np.zeros((len(numbers), KEY_BYTES // 8), ">i8")
    packed[:, -1] = numbers
    return packed.tobytes()


def _engines_own(blocks: int, page: int) -> list[float]:
    """Microseconds a block for what SGLang does when it stores a node on the device; nothing without SGLang."""
    try:
        recorder = importlib.import_module("sglang.srt.mem_cache.events").KVCacheEventRecorder(
            enabled=True, page_size=page
        )
        radix_key = importlib.import_module("sglang.srt.mem_cache.radix_cache").RadixKey
    except (ImportError, AttributeError):
        return []
    from array import array
    from types import SimpleNamespace

    root = SimpleNamespace(parent=None, hash_value=[], key=[])
    nodes = [
        SimpleNamespace(
            key=radix_key(array("q", range(100 * page))), parent=root, event_hash_value=None,
            hash_value=[f"{number:08x}{i:056x}" for i in range(100)],
        )
        for number in range(max(5, blocks // 100))
    ]  # fmt: skip
    found = []
    for part in range(5):
        chosen = nodes[part::5]
        began = time.thread_time()
        for node in chosen:
            recorder.record_store(node)
            recorder.take()
        found.append(1e6 * (time.thread_time() - began) / (100 * len(chosen)))
    return found


def _row(what: str, unit: str, parts: list[float]) -> dict[str, Any]:
    return {"what": what, "unit": unit, "value": statistics.median(parts), "spread": [min(parts), max(parts)]}

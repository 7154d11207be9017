"""What several workers announce of one store, and the thread between store and publisher; without an engine."""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hicache_ext.config import Config
from hicache_ext.events.model import AllBlocksCleared, BlockRemoved, CostedBlockStored, LoadCost
from hicache_ext.page import Namespace
from hicache_ext.sglang import announcing
from hicache_ext.sglang.announcing import TierEvents, _WithTiers
from hicache_ext.store import NO_TIER, TieredStore
from storage_backends.base import Capabilities, Notes, Outcome
from tests.dictionary import DictionaryBackend
from tests.pages import HostPool, chain, key_batch, namespace

SPACE = namespace()


class Remote(DictionaryBackend):
    """A store on a server that every worker of this process reaches: it answers, and knows nothing by itself."""

    pages: OrderedDict[tuple[bytes, bytes], Any] = OrderedDict()  # noqa: RUF012

    def __init__(self, options: Any, dispatcher: Any) -> None:
        super().__init__(options, dispatcher)
        self._pages = Remote.pages
        self.capabilities = Capabilities(persistent=True, shared=True, medium="EXTERNAL")


class Worker:
    """A store, and a router's view of what this worker announces."""

    def __init__(self, tier: dict[str, Any], **config: Any) -> None:
        self.config = Config.load({"tiers": [tier], **config})
        self.store = TieredStore.open(self.config)
        self.space: Namespace | None = SPACE
        self.events = TierEvents()
        self.events._convert = lambda event: event
        self.view: set[tuple[str, int]] = set()
        self.costs: list[LoadCost] = []
        self.events.attach(self)

    def served_namespace(self) -> bytes | None:
        return None if self.space is None else self.space.digest

    def hear(self, cleared: bool = False) -> None:
        events: list[Any] = [AllBlocksCleared()] if cleared else []
        self.events.move(events, cleared)
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.view.clear()
                continue
            if isinstance(event, CostedBlockStored) and event.load_cost is not None:
                self.costs.append(event.load_cost)
            for block in event.block_hashes:
                place = (event.medium, block)
                if isinstance(event, BlockRemoved):
                    self.view.remove(place)  # KeyError: removed, though never stored
                else:
                    assert place not in self.view, "stored twice"
                    self.view.add(place)

    def sees(self, medium: str, keys: list[bytes], seconds: float = 15) -> None:
        """Wait until the view is these pages."""
        wanted = {(medium, number(key)) for key in keys}
        until = time.monotonic() + seconds
        while self.view != wanted:
            assert time.monotonic() < until, f"{len(self.view)} blocks instead of {len(wanted)}"
            self.hear()
            time.sleep(0.005)

    def write(self, keys: list[bytes]) -> None:
        assert self.store_pages(keys) == {Outcome.HIT}

    def store_pages(self, keys: list[bytes]) -> set[Outcome]:
        notes = notes_of(keys)
        batch = HostPool(SPACE, len(keys)).write_batch(keys)
        batch = replace(batch, tokens=notes.tokens, event_hashes=notes.hashes)
        outcomes = set(self.store.write(batch).result(30))
        self.events.know(SPACE.digest, batch.keys, notes)  # as the adapter does: not every backend reports them
        return outcomes

    def close(self) -> None:
        self.events.detach(self)
        self.store.close()


def number(key: bytes) -> int:
    return int.from_bytes(key[:8], "big", signed=True)


def notes_of(keys: list[bytes]) -> Notes:
    numbers = [number(key) for key in keys]
    tokens = np.arange(len(keys) * 16, dtype=np.uint32).reshape(-1, 16)
    return Notes(tokens, np.array([numbers, [0, *numbers[:-1]]], np.int64).T.copy())


@pytest.fixture
def worker() -> Iterator[Callable[[dict[str, Any]], Worker]]:
    opened: list[Worker] = []

    def open_one(tier: dict[str, Any]) -> Worker:
        opened.append(Worker(tier))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_every_worker_announces_a_shared_directory_and_withdraws_it(
    worker: Callable[[dict[str, Any]], Worker], tmp_path: Path
) -> None:
    tier = {"type": "local", "path": str(tmp_path), "capacity": "64MiB", "engine": "threads"}
    writer, reader = worker(tier), worker(tier)
    keys, more = chain("a", 150), chain("b", 20)
    writer.write(keys)
    for one in (writer, reader):
        one.sees("DISK", keys)
    reader.write(more)
    for one in (writer, reader):
        one.sees("DISK", keys + more)
    writer.store.remove(key_batch(SPACE, keys[:50]))
    for one in (writer, reader):
        one.sees("DISK", keys[50:] + more)
    late = worker(tier)
    late.sees("DISK", keys[50:] + more)
    reader.store.clear([SPACE])  # its extents go, which no record of a page says
    writer.sees("DISK", keys[50:])
    late.sees("DISK", keys[50:])


def test_of_a_server_a_worker_announces_what_it_saw_and_can_name(worker: Callable[[dict[str, Any]], Worker]) -> None:
    Remote.pages.clear()
    tier = {"type": f"{__name__}:Remote", "name": "remote"}
    writer, reader = worker(tier), worker(tier)
    keys = chain("a", 10)
    writer.write(keys)
    writer.sees("EXTERNAL", keys)
    reader.store.lookup(key_batch(SPACE, keys))
    until = time.monotonic() + 10
    while reader.events.announcer.stats()["pages"] < 10 and time.monotonic() < until:
        time.sleep(0.01)
    reader.events.know(SPACE.digest, b"".join(keys[:6]), notes_of(keys[:6]))  # by a request with these tokens
    reader.sees("EXTERNAL", keys[:6])
    assert reader.events.stats()["unknown"] == 4
    writer.store.remove(key_batch(SPACE, keys[:3]))
    writer.sees("EXTERNAL", keys[3:])
    reader.store.lookup(key_batch(SPACE, keys))
    reader.sees("EXTERNAL", keys[3:6])


@pytest.mark.parametrize("on", [True, False])
def test_costs_are_said_once_reads_are_measured_and_if_they_are_asked_for(tmp_path: Path, on: bool) -> None:
    one = Worker({"type": "local", "path": str(tmp_path), "capacity": "64MiB", "engine": "threads"}, event_costs=on)
    try:
        keys = chain("a", 20)
        one.write(keys)
        one.sees("DISK", keys)
        assert not one.costs, "nothing was read yet"
        assert set(one.store.read(HostPool(SPACE, 20).batch(keys)).result(30)) == {Outcome.HIT}
        until = time.monotonic() + (20 if on else 0.6)
        more: list[bytes] = []
        while not one.costs and time.monotonic() < until:
            more += chain(f"more {len(more)}", 5)
            one.write(more[-5:])
            one.sees("DISK", keys + more)
        assert bool(one.costs) is on
        assert all(cost.bytes_per_s > 0 and cost.latency_s >= 0 for cost in one.costs)
    finally:
        one.close()


def test_threads_that_store_and_remove_the_same_pages_end_in_what_the_tier_holds(
    worker: Callable[[dict[str, Any]], Worker], tmp_path: Path
) -> None:
    """Reports of one page come from several I/O threads; a router believes the last of them."""
    one = worker({"type": "local", "path": str(tmp_path), "capacity": "64MiB", "engine": "threads"})
    keys = chain("shared", 40)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            some = keys[(at := draw.randrange(40)) : at + draw.randrange(1, 12)]
            if draw.random() < 0.6:
                one.store_pages(some)
            else:
                one.store.remove(key_batch(SPACE, some))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        one.hear()
        time.sleep(0.002)
    there = one.store.lookup(key_batch(SPACE, keys)) != NO_TIER
    assert there.sum() > 0
    one.sees("DISK", [key for key, has in zip(keys, there, strict=True) if has])


def test_what_a_tier_reports_does_not_wait_for_the_tiers_turn(
    worker: Callable[[dict[str, Any]], Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "_TURN_SECONDS", 3600.0)
    one = worker({"type": "local", "path": str(tmp_path), "capacity": "64MiB", "engine": "threads"})
    keys = chain("a", 20)
    for at in range(0, 20, 5):
        one.write(keys[at : at + 5])
        one.sees("DISK", keys[: at + 5])
    one.store.remove(key_batch(SPACE, keys[7:]))
    one.sees("DISK", keys[:7])
    one.hear(cleared=True)
    one.sees("DISK", keys[:7])


def test_flushes_between_stores_and_removals_lose_nothing(
    worker: Callable[[dict[str, Any]], Worker], tmp_path: Path
) -> None:
    one = worker({"type": "local", "path": str(tmp_path), "capacity": "64MiB", "engine": "threads"})
    stop = threading.Event()
    names = [f"chain-{turn}" for turn in range(12)]

    def churn() -> None:
        for turn, name in enumerate(names):
            one.write(chain(name, 60))
            if turn % 3 == 2:
                one.store.remove(key_batch(SPACE, chain(names[turn - 1], 60)))
        stop.set()

    thread = threading.Thread(target=churn)
    thread.start()
    turn = 0
    while not stop.is_set():
        one.hear(cleared=turn % 7 == 0)
        turn += 1
        time.sleep(0.002)
    thread.join()
    left = [name for turn, name in enumerate(names) if turn % 3 != 1]
    one.sees("DISK", [key for name in left for key in chain(name, 60)])
    assert one.events.stats()["clears"] > 0
    one.space = None  # a weight update: nothing can be loaded now
    one.sees("DISK", [])
    one.space = SPACE
    one.sees("DISK", [key for name in left for key in chain(name, 60)])


def test_without_a_publisher_that_publishes_nothing_is_listened_to() -> None:
    events = TierEvents()
    tree = SimpleNamespace(take_events=list)
    publisher = SimpleNamespace(enable_kv_cache_events=False, tree_cache=tree)
    events.publishes(publisher)
    heard: list[Any] = []

    class Adapter:
        store = SimpleNamespace(on_residency=heard.append)

    events.attach(Adapter())
    assert publisher.tree_cache is tree
    assert not heard
    assert events._thread is None
    assert events.stats() == {}


def test_the_publishers_cache_is_the_cache_in_all_else() -> None:
    moved: list[bool] = []
    ours = SimpleNamespace(move=lambda events, cleared: moved.append(cleared))
    tree = SimpleNamespace(take_events=lambda: [AllBlocksCleared()], page_size=7)
    wrapped = _WithTiers(tree, ours, AllBlocksCleared)  # type: ignore[arg-type]
    assert wrapped.page_size == 7
    assert len(wrapped.take_events()) == 1
    tree.take_events = list
    assert wrapped.take_events() == []
    assert moved == [True, False]


def test_a_turn_that_fails_is_said_once_and_the_next_comes(
    worker: Callable[[dict[str, Any]], Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = worker({"type": "local", "path": str(tmp_path), "capacity": "64MiB", "engine": "threads"})
    one.space = "none"  # type: ignore[assignment]
    time.sleep(0.6)
    one.space = SPACE
    keys = chain("a", 5)
    one.write(keys)
    one.sees("DISK", keys)
    assert sum("a turn failed" in record.message for record in caplog.records) == 1

"""Extents come and go while writes and lookups go on: nobody waits, nothing stale comes back, shares follow use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import Outcome
from storage_backends.format import ExtentHeader, SlotShape
from storage_backends.local import LocalBackend, supply
from storage_backends.local.extents import Extent, ExtentFiles, extent_numbers, extent_path
from tests import pages
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, local_tiers
from tests.worker import QUICK, Worker

MIB = 1 << 20
LENGTHS = (131072, 131072)
A, B = namespace(LENGTHS, model="a"), namespace(LENGTHS, model="b")


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Open]:
    with local_tiers(tmp_path / "tier", "threads") as open_one:
        yield open_one


def store(backend: LocalBackend, space: Any, keys: list[bytes]) -> list[Outcome]:
    return backend.write(HostPool(space, len(keys)).write_batch(keys)).result(30)


def found(backend: LocalBackend, space: Any, keys: list[bytes]) -> int:
    return int(backend.lookup(key_batch(space, keys)).sum())


def served(backend: LocalBackend, space: Any, keys: list[bytes]) -> list[Outcome]:
    return pages.served(backend, space, keys)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


class Gate:
    """A call that, once shut, does not return before it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.shut = False
        self.entered, self.opened = threading.Event(), threading.Event()
        self.threads: list[str] = []
        kept = getattr(ExtentFiles, name)

        def gated(*arguments: Any) -> Any:
            self.threads.append(threading.current_thread().name)
            if self.shut:
                self.entered.set()
                assert self.opened.wait(30)
            return kept(*arguments)

        monkeypatch.setattr(ExtentFiles, name, gated)

    def open(self) -> None:
        self.opened.set()


def goes_on(backend: LocalBackend) -> bool:
    """Whether a write, a read and a lookup come to their end."""
    done = threading.Event()

    def use() -> None:
        store(backend, A, chain("more", 4))
        served(backend, A, chain("more", 4))
        found(backend, A, chain("a", 12))
        done.set()

    threading.Thread(target=use, daemon=True).start()
    return done.wait(3)


def test_nobody_waits_for_a_slow_delete(tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "delete")
    backend = tier()
    store(backend, A, chain("a", 12))
    store(backend, B, chain("b", 12))
    gate.shut = True
    backend.clear([B])
    assert gate.entered.wait(10)
    assert found(backend, B, chain("b", 12)) == 0
    assert goes_on(backend)
    assert not gate.opened.is_set(), "all that happened while the deletion did not return"
    held = backend.stats()["own_bytes"]
    assert held == sum(file.stat().st_size for file in (tmp_path / "tier" / "w0").glob("e*")), "held until it is gone"
    gate.open()
    until(lambda: not list((tmp_path / "tier" / "w0").glob("*.gone")))
    until(lambda: backend.stats()["own_bytes"] < held)


def test_were_it_deleted_under_the_lock_they_would_wait(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "delete")
    backend = tier()
    store(backend, A, chain("a", 12))
    store(backend, B, chain("b", 12))
    kept = backend._disks.in_use[0].supply._patiently

    def locked(act: Callable[[], Any]) -> Any:
        with backend._lock:
            return kept(act)

    backend._disks.in_use[0].supply._patiently = locked  # type: ignore[method-assign, assignment]
    gate.shut = True
    backend.clear([B])
    assert gate.entered.wait(10)
    assert not goes_on(backend)
    gate.open()


def test_nobody_waits_for_a_slow_growth(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply, "PATIENCE_SECONDS", -1.0)
    gate = Gate(monkeypatch, "create")
    backend = tier()
    store(backend, A, chain("a", 12))
    assert "hicache-supply" not in gate.threads
    gate.shut = True
    store(backend, A, chain("b", 3))  # the last free slots, so that more are wanted
    assert gate.entered.wait(10)
    for turn in range(4):
        assert set(store(backend, A, chain(f"c{turn}", 6))) == {Outcome.HIT}, "the oldest go instead"
    assert goes_on(backend)
    assert not gate.opened.is_set()
    gate.open()
    writer = backend._disks.in_use[0].directory.writer
    assert writer is not None
    until(lambda: writer.free_count(A.digest, False) >= 6)
    before = backend.stats()["evicted"]
    assert set(store(backend, A, chain("d", 6))) == {Outcome.HIT}
    assert backend.stats()["evicted"] == before, "what was made meanwhile is used"


def test_what_will_be_needed_is_made_before(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "create")
    backend = tier()
    for turn in range(12):
        assert set(store(backend, A, chain(str(turn), 3))) == {Outcome.HIT}
        until(lambda: not backend._disks.in_use[0].directory.short)
    assert len(gate.threads) > 2
    assert set(gate.threads[1:]) == {"hicache-supply"}, "only a namespace's first extent is made in a write"


def test_a_hot_namespace_gets_the_extents_of_a_cold_one_in_place(tier: Open, tmp_path: Path) -> None:
    backend = tier(capacity=32 * MIB)
    for turn in range(16):
        store(backend, A, chain(f"a{turn}", 8))
    folder = tmp_path / "tier" / "w0"
    before = {file.stat().st_ino for file in folder.glob("e*.ext")}
    reader = tier(capacity=32 * MIB)
    keys = [key for turn in range(16) for key in chain(f"a{turn}", 8)]
    assert Outcome.HIT in served(reader, A, keys), "and it has the extents open"
    for turn in range(16):
        assert Outcome.HIT in store(backend, B, chain(f"b{turn}", 8))
        # The reader's index is what it was; what it reads is verified, and never another page.
        served(reader, A, keys[:32])
    after = {file.stat().st_ino for file in folder.glob("e*.ext")}
    assert after <= before, "no file was made"
    assert backend.stats()["reclaimed"]
    assert sum(found(backend, B, chain(f"b{turn}", 8)) for turn in range(16)) > 40


@pytest.mark.parametrize("forged", [False, True])
def test_pages_of_a_former_use_do_not_come_back(tier: Open, tmp_path: Path, forged: bool) -> None:
    """forged: the extent's generation is made older than they are: then the scan takes them in, so it does see them."""
    backend = tier()
    keys = chain("old", 12)
    store(backend, A, keys)
    with backend._lock:
        writer = backend._disks.in_use[0].directory.writer
        assert writer is not None
        (number,) = writer.extents
        for taker in (B, A):  # the same namespace has it again in the end
            assert writer.reclaim(next(iter(writer.by_namespace)), taker, SlotShape.of_namespace(taker))
        (last,) = writer.extents.values()
        assert last.number == number + 2
    assert found(backend, A, keys) == 0
    backend.close()
    folder = tmp_path / "tier" / "w0"
    (folder / "residency.log").unlink()
    if forged:
        path = extent_path(folder, last.number)
        header = ExtentHeader.decode(path.read_bytes()[:4096])
        with open(path, "r+b") as file:
            file.write(ExtentHeader(1, *list(vars(header).values())[1:]).encode())
    again = tier()
    store(again, A, chain("new", 1))
    for thread in again._disks.in_use[0].upkeep.threads:
        if thread.name == "hicache-scan":
            thread.join(20)
    assert (found(again, A, keys) > 0) == forged


def test_what_a_crash_left_half_deleted_is_cleaned_up(tier: Open, tmp_path: Path) -> None:
    first = tier()
    store(first, A, chain("a", 4))
    first.close()
    folder = tmp_path / "tier" / "w0"
    ExtentFiles(first._disks.in_use[0].direct).retire(folder, extent_numbers(folder)[0])
    (tmp_path / "tier" / "w7").mkdir()
    (tmp_path / "tier" / "w7" / "e0000000003.gone").write_bytes(bytes(8192))
    again = tier()
    store(again, B, chain("b", 4))
    until(lambda: not list((tmp_path / "tier").glob("w*/*.gone")))
    assert served(again, B, chain("b", 4)) == [Outcome.HIT] * 4


def test_a_retired_extent_waits_for_what_still_uses_it(tier: Open, tmp_path: Path) -> None:
    backend = tier()
    store(backend, A, chain("a", 4))
    with backend._lock:
        writer = backend._disks.in_use[0].directory.writer
        assert writer is not None
        extent: Extent = next(iter(writer.extents.values()))
        extent.pins += 1
    backend.clear([A])
    store(backend, B, chain("b", 4))
    time.sleep(0.5)
    assert extent.number in writer.leaving
    with backend._lock:
        extent.unpin(1)
    until(lambda: not writer.leaving)


# --- shares


def held(place: Path) -> dict[str, int]:
    def size(file: Path) -> int:
        try:
            return file.stat().st_size
        except FileNotFoundError:
            return 0

    return {folder.name: sum(map(size, folder.glob("e*"))) for folder in place.glob("w*")}


def test_the_capacity_goes_to_who_uses_it_and_back(tmp_path: Path) -> None:
    capacity, extent = 64 * MIB, 5 * MIB
    workers = [Worker(tmp_path, capacity, model, **{QUICK: "1"}) for model in ("one", "two")]
    try:
        workers[0].ask("store", chain="first", pages=8)
        workers[1].ask("store", chain="first", pages=8)
        names = ["w0", "w1"]

        def becomes_largest(busy: int) -> None:
            deadline, turn = time.monotonic() + 60, 0
            while True:
                workers[busy].ask("store", chain=f"{busy}/{turn % 40}", pages=16)
                workers[busy].ask("served", chain=f"{busy}/{turn % 40}", pages=16)
                now = held(tmp_path)
                assert sum(now.values()) <= capacity + extent
                if now[names[busy]] > 0.7 * capacity:
                    return
                assert time.monotonic() < deadline, now
                turn += 1

        becomes_largest(0)
        becomes_largest(1)
        becomes_largest(0)
        assert workers[1].ask("store", chain="last", pages=4) == ["HIT"] * 4, "who is idle keeps a floor"
    finally:
        for worker in workers:
            worker.stop()


def test_a_full_disk_is_shared_by_what_is_free_in_fact(tier: Open, tmp_path: Path) -> None:
    one = tier(capacity=32 * MIB)
    for turn in range(16):
        store(one, A, chain(f"a{turn}", 8))
    full = sum(held(tmp_path / "tier").values())
    two = tier(capacity=32 * MIB)
    store(two, B, chain("b", 8))
    assert sum(held(tmp_path / "tier").values()) <= 32 * MIB
    until(lambda: Outcome.HIT in store(two, B, chain("b", 8)), 30)
    assert sum(held(tmp_path / "tier").values()) <= 32 * MIB
    assert full > 24 * MIB

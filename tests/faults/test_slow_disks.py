"""Disks that take their time over files and directories: whoever does not need them goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import Outcome
from storage_backends.local import LocalBackend, disk, disks, recovery, writers
from storage_backends.local.directory import FOLDERS
from storage_backends.local.extents import ExtentFiles
from storage_backends.local.tier import Tier
from tests import pages
from tests.fuse import fuse_disk
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, tiers

MIB = 1 << 20
SPACE = namespace((16384, 16384))


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Open]:
    with tiers(capacity=64 * MIB, engine="threads") as open_one:
        yield open_one


def store(backend: LocalBackend, keys: list[bytes]) -> list[Outcome]:
    return backend.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(30)


def served(backend: LocalBackend, keys: list[bytes]) -> list[Outcome]:
    return pages.served(backend, SPACE, keys, 5)


def found(backend: LocalBackend, keys: list[bytes]) -> int:
    return int(backend.lookup(key_batch(SPACE, keys)).sum())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


class Gate:
    """Calls of one function that do not return before it is opened. which: whether a call is meant."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, which: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        kept = getattr(where, name)

        def gated(*arguments: Any, **named: Any) -> Any:
            if which(*arguments, **named):
                self.entered.set()
                assert self.opened.wait(30)
            return kept(*arguments, **named)

        monkeypatch.setattr(where, name, gated)


def opened_to_write(below: Path) -> Callable[..., bool]:
    return lambda _, folder, number, write: write and folder.is_relative_to(below)


@pytest.fixture
def filled(tier: Open, tmp_path: Path) -> Path:
    """A tier of one extent with forty pages."""
    first = tier(tmp_path / "tier")
    store(first, chain("old", 40))
    first.close()
    return tmp_path / "tier"


def test_reads_go_on_while_a_folder_becomes_ours(tier: Open, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tier(filled)
    gate = Gate(monkeypatch, ExtentFiles, "open", opened_to_write(filled))
    outcomes: list[Outcome] = []
    writer = threading.Thread(target=lambda: outcomes.extend(store(backend, chain("new", 4))))
    writer.start()
    assert gate.entered.wait(10)
    assert served(backend, chain("old", 40)) == [Outcome.HIT] * 40
    assert found(backend, chain("old", 40)) == 40
    assert not outcomes
    gate.opened.set()
    writer.join(20)
    assert outcomes == [Outcome.HIT] * 4
    assert served(backend, chain("old", 40) + chain("new", 4)) == [Outcome.HIT] * 44


def test_a_write_does_not_wait_for_ever(tier: Open, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "CLAIM_SECONDS", 0.1)
    backend = tier(filled)
    gate = Gate(monkeypatch, ExtentFiles, "open", opened_to_write(filled))
    for _ in range(3):
        assert store(backend, chain("new", 4)) == [Outcome.REJECTED] * 4
    assert backend.stats()["rejected_starting"] == 12
    assert served(backend, chain("old", 40)) == [Outcome.HIT] * 40
    gate.opened.set()
    until(lambda: store(backend, chain("new", 4)) == [Outcome.HIT] * 4)
    assert [path.name for path in filled.glob("w*")] == ["w0"], "there was one attempt"


def test_a_tier_that_is_closed_while_it_starts_lets_go_of_the_folder(
    tier: Open, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "CLAIM_SECONDS", 0.1)
    backend = tier(filled)
    gate = Gate(monkeypatch, ExtentFiles, "open", opened_to_write(filled))
    store(backend, chain("new", 1))
    threading.Timer(0.3, gate.opened.set).start()
    backend.close()
    again = tier(filled)
    assert store(again, chain("new", 1)) == [Outcome.HIT]
    assert [path.name for path in filled.glob("w*")] == ["w0"]


def test_a_disk_that_does_not_answer_keeps_no_other_from_being_written(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "CLAIM_SECONDS", 0.2)
    two = [tmp_path / "a", tmp_path / "b"]
    first = tier(*two)
    store(first, chain("old", 80))
    first.close()
    backend = tier(*two)
    gate = Gate(monkeypatch, ExtentFiles, "open", opened_to_write(two[1]))
    assert store(backend, chain("new", 40)) == [Outcome.HIT] * 40
    assert served(backend, chain("old", 80)) == [Outcome.HIT] * 80
    gate.opened.set()
    until(lambda: bool(store(backend, chain("newer", 4))) and len(backend._tier.writers._members()) == 2)
    assert served(backend, chain("old", 80) + chain("new", 40)) == [Outcome.HIT] * 120


def test_pages_that_the_scan_did_not_reach_yet_are_not_overwritten(
    tier: Open, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as there is room for another extent."""
    (filled / "w0" / "residency.log").unlink()
    gate = Gate(monkeypatch, recovery, "read_headers")
    backend = tier(filled)
    assert store(backend, chain("new", 20)) == [Outcome.HIT] * 20
    assert store(backend, chain("newer", 80)) == [Outcome.HIT] * 80
    gate.opened.set()
    until(lambda: "recovered_by_scan" in backend.stats())
    assert served(backend, chain("old", 40)) == [Outcome.HIT] * 40
    assert served(backend, chain("new", 20) + chain("newer", 80)) == [Outcome.HIT] * 100
    assert len(list(filled.rglob("*.ext"))) > 1


def test_a_disk_that_comes_back_slowly_holds_up_nobody(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_FIRST_PROBE_SECONDS", 0.1)
    two = [tmp_path / "a", tmp_path / "b"]
    backend = tier(*two)
    keys = chain("old", 80)
    store(backend, keys)
    two[1].rename(tmp_path / "away")
    until(lambda: backend.stats()["disks_out"] == 1)
    left = found(backend, keys)
    gate = Gate(monkeypatch, disk, "open_engine")
    shutil.move(tmp_path / "away", two[1])
    assert gate.entered.wait(20)
    outcomes = served(backend, keys)
    assert outcomes.count(Outcome.HIT) == left > 20
    assert store(backend, chain("new", 4)) == [Outcome.HIT] * 4
    gate.opened.set()
    until(lambda: backend.stats()["disks_out"] == 0)
    until(lambda: served(backend, keys) == [Outcome.HIT] * 80)


def test_a_disk_that_hangs_altogether_keeps_nobody_from_the_other(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a stat nor an append to a log comes back. Lookups, reads of the other disk and calls of `write` do."""
    monkeypatch.setattr(disks, "SILENT_SECONDS", 60.0)
    with fuse_disk(tmp_path) as hung:
        backend = tier(hung.path, tmp_path / "other")
        keys = [key for turn in range(12) for key in chain(f"c{turn}", 20)]
        for turn in range(12):
            store(backend, chain(f"c{turn}", 20))
        with backend._lock:
            places = [backend._index.get(SPACE.digest, key) for key in keys]
        ours = [key for key, page in zip(keys, places, strict=True) if page and page.folder // FOLDERS == 1]
        assert len(ours) > 50
        until(lambda: not any(disk.directory.short for disk in backend._disks.in_use))
        hung.hang()
        pending, rounds = [], 0
        pool = HostPool(SPACE, 20)

        def use() -> None:
            nonlocal rounds
            for turn in range(20):
                found(backend, keys)
                served(backend, ours[:20])
                pending.append(backend.write(pool.write_batch(chain(f"n{turn}", 2))))
                backend.stats()
                rounds += 1

        user = threading.Thread(target=use, daemon=True)
        user.start()
        user.join(15)
        hung.go_on()
        assert rounds == 20
        for done in pending:
            done.result(20)
        backend.close()


def test_another_writers_extent_is_opened_beside_everything_else(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read of it waits for the disk; lookups, writes and reads of what is open do not."""
    one, two = tier(tmp_path / "tier"), tier(tmp_path / "tier")
    store(one, chain("a", 8))
    store(two, chain("b", 8))
    assert found(two, chain("a", 8)) == 8
    gate = Gate(monkeypatch, ExtentFiles, "open", lambda _, folder, number, write: folder.name == "w0")
    outcomes: list[Outcome] = []
    readers = [threading.Thread(target=lambda: outcomes.extend(served(two, chain("a", 8)))) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert gate.entered.wait(10)
    assert two.lookup_local(key_batch(SPACE, chain("a", 8))).tolist() == [1] * 8
    assert served(two, chain("b", 8)) == [Outcome.HIT] * 8
    assert store(two, chain("c", 8)) == [Outcome.HIT] * 8
    assert not outcomes
    gate.opened.set()
    for reader in readers:
        reader.join(20)
    assert outcomes == [Outcome.HIT] * 24
    (there,) = [folder for folder in two._disks.in_use[0].directory.folders.values() if folder.path.name == "w0"]
    assert len(there.extents) == 1, "of three that opened it two let go of it"


def test_an_extent_that_goes_while_it_is_opened_is_not_kept(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tier(tmp_path / "tier"), tier(tmp_path / "tier")
    store(one, chain("a", 8))
    assert found(two, chain("a", 8)) == 8
    opened: list[int] = []
    kept = ExtentFiles.open

    def open_late(files: ExtentFiles, folder: Path, number: int, write: bool) -> Any:
        extent = kept(files, folder, number, write)
        opened.append(extent.fd)
        one.clear([SPACE])
        assert found(two, chain("a", 8)) == 0
        return extent

    monkeypatch.setattr(ExtentFiles, "open", open_late)
    assert served(two, chain("a", 8)) == [Outcome.MISS] * 8
    assert len(opened) == 1
    assert not [folder for folder in two._disks.in_use[0].directory.folders.values() if folder.extents]
    monkeypatch.undo()
    assert store(two, chain("a", 8)) == [Outcome.HIT] * 8
    assert served(two, chain("a", 8)) == [Outcome.HIT] * 8


def test_a_damaged_slot_is_cleared_beside_everything_else(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tier(tmp_path / "tier")
    store(backend, chain("a", 8))
    (extent,) = (tmp_path / "tier").rglob("*.ext")
    with extent.open("r+b", buffering=0) as file:
        file.seek(4096 + 4096 + 100)
        file.write(b"\xff" * 16)
    gate = Gate(monkeypatch, Tier, "erase")
    outcomes: list[Outcome] = []
    reader = threading.Thread(target=lambda: outcomes.extend(served(backend, chain("a", 8))))
    reader.start()
    assert gate.entered.wait(10)
    assert backend.lookup_local(key_batch(SPACE, chain("a", 8))).sum() == 7
    assert store(backend, chain("a", 8)) == [Outcome.HIT] * 8, "and its slot is nobody's meanwhile"
    gate.opened.set()
    reader.join(20)
    assert sorted(outcomes) == sorted([Outcome.HIT] * 7 + [Outcome.CORRUPT])
    assert served(backend, chain("a", 8)) == [Outcome.HIT] * 8


OTHER = namespace((16384,), model="model-b")


def write_that_needs_an_extent(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> tuple[Gate, threading.Thread, list[Outcome]]:
    """A write of eight pages of another namespace, held while it makes its extent; who writes, and what came of it."""
    gate = Gate(monkeypatch, ExtentFiles, "create", lambda _, folder, header: header.namespace == OTHER.digest)
    outcomes: list[Outcome] = []

    def write() -> None:
        outcomes.extend(backend.write(HostPool(OTHER, 8).write_batch(chain("b", 8))).result(30))

    writer = threading.Thread(target=write)
    writer.start()
    assert gate.entered.wait(10)
    return gate, writer, outcomes


def test_an_extent_is_made_beside_everything_else(tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that needs one waits for its file; lookups, reads and a write that needs none do not."""
    backend = tier(tmp_path / "tier")
    store(backend, chain("a", 40))
    gate, writer, outcomes = write_that_needs_an_extent(backend, monkeypatch)
    assert backend.lookup_local(key_batch(SPACE, chain("a", 40))).sum() == 40
    assert served(backend, chain("a", 40)) == [Outcome.HIT] * 40
    assert store(backend, chain("c", 8)) == [Outcome.HIT] * 8
    assert not outcomes
    gate.opened.set()
    writer.join(20)
    assert outcomes == [Outcome.HIT] * 8
    assert pages.served(backend, OTHER, chain("b", 8), 5) == [Outcome.HIT] * 8


def test_a_close_waits_for_an_extent_that_a_write_makes(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is nobody else's before that."""
    backend = tier(tmp_path / "tier")
    store(backend, chain("a", 8))
    gate, writer, outcomes = write_that_needs_an_extent(backend, monkeypatch)
    closer = threading.Thread(target=backend.close)
    closer.start()
    closer.join(0.3)
    assert closer.is_alive()
    gate.opened.set()
    closer.join(20)
    writer.join(20)
    assert not closer.is_alive()
    assert outcomes == [Outcome.REJECTED] * 8
    monkeypatch.undo()
    again = tier(tmp_path / "tier")
    assert store(again, chain("c", 8)) == [Outcome.HIT] * 8
    assert served(again, chain("a", 8)) == [Outcome.HIT] * 8
    assert [path.name for path in (tmp_path / "tier").glob("w*")] == ["w0"]


def test_removed_pages_are_cleared_beside_everything_else(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tier(tmp_path / "tier")
    store(backend, chain("a", 8))
    gate = Gate(monkeypatch, Tier, "erase")
    removed: list[int] = []
    remover = threading.Thread(target=lambda: removed.append(backend.remove(key_batch(SPACE, chain("a", 8)[6:]))))
    remover.start()
    assert gate.entered.wait(10)
    assert backend.lookup_local(key_batch(SPACE, chain("a", 8))).tolist() == [1] * 6 + [0] * 2
    assert store(backend, chain("b", 8)) == [Outcome.HIT] * 8, "in other slots"
    assert not removed
    gate.opened.set()
    remover.join(20)
    assert removed == [2]
    assert served(backend, chain("a", 6) + chain("b", 8)) == [Outcome.HIT] * 14
    writer = backend._disks.in_use[0].directory.writer
    assert writer is not None
    free = writer.free_count(SPACE.digest, False)
    assert store(backend, chain("a", 8)) == [Outcome.HIT] * 8
    assert writer.free_count(SPACE.digest, False) == free - 2, "and these slots are free again"

"""The local tier alone: restart, capacity, eviction, sharing within a process, versions, clear, recovery."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import OptionError, Outcome
from storage_backends.local import LocalBackend
from storage_backends.local import engine as engine_module
from tests import pages
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, local_tiers

MIB = 1 << 20
LENGTHS = (131072, 131072)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Open]:
    with local_tiers(tmp_path / "tier", "threads") as open_one:
        yield open_one


def store(backend: LocalBackend, space: Any, keys: list[bytes], parent: bytes | None = None) -> list[Outcome]:
    return backend.write(HostPool(space, len(keys)).write_batch(keys, parent)).result(30)


def found(backend: LocalBackend, space: Any, keys: list[bytes]) -> list[int]:
    return backend.lookup(key_batch(space, keys)).tolist()


def served(backend: LocalBackend, space: Any, keys: list[bytes]) -> list[Outcome]:
    """Read the pages; every HIT is checked against the content that its identity asks for."""
    return pages.served(backend, space, keys)


def held(tmp_path: Path) -> int:
    """Bytes of extents, those that wait for their deletion too."""
    total = 0
    for file in (tmp_path / "tier").glob("w*/e*"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            total += file.stat().st_size
    return total


def test_pages_survive_a_restart(tier: Open) -> None:
    space, keys = namespace(LENGTHS), chain("a", 30)
    first = tier()
    store(first, space, keys)
    first.close()
    again = tier()
    assert found(again, space, keys) == [1] * 30
    assert served(again, space, keys) == [Outcome.HIT] * 30
    assert again.stats().get("stored", 0) == 0


def test_a_restarted_writer_takes_its_folder_back(tier: Open, tmp_path: Path) -> None:
    space = namespace(LENGTHS)
    for turn in range(3):
        backend = tier()
        store(backend, space, chain(f"c{turn}", 4))
        backend.close()
    assert sorted(p.name for p in (tmp_path / "tier").glob("w*")) == ["w0"]


@pytest.mark.parametrize("damage", ["log gone", "log cut", "log garbled", "log of other bytes"])
def test_the_header_scan_finds_what_the_log_lacks(tier: Open, tmp_path: Path, damage: str) -> None:
    space, keys = namespace(LENGTHS), chain("a", 24)
    first = tier()
    store(first, space, keys)
    first.close()
    log = tmp_path / "tier" / "w0" / "residency.log"
    raw = bytearray(log.read_bytes())
    match damage:
        case "log gone":
            log.unlink()
        case "log cut":
            log.write_bytes(raw[: 128 * 10 + 77])
        case "log garbled":
            for at in range(128, len(raw), 256):
                raw[at + 60] ^= 0x40
            log.write_bytes(raw)
        case "log of other bytes":
            log.write_bytes(os.urandom(len(raw)))
    again = tier()
    store(again, space, chain("b", 1))  # the first write claims the folder, and the scan begins
    deadline = time.monotonic() + 10
    while "recovered_by_scan" not in again.stats() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served(again, space, keys) == [Outcome.HIT] * 24
    assert again.stats()["recovered_by_scan"]


def test_capacity_holds_and_goes_suffix_first(tier: Open, tmp_path: Path) -> None:
    space = namespace(LENGTHS)
    backend = tier(capacity=32 * MIB)
    old, new = chain("old", 80), chain("new", 80)
    assert store(backend, space, old) == [Outcome.HIT] * 80
    store(backend, space, new)
    assert sum(f.stat().st_size for f in (tmp_path / "tier").rglob("*.ext")) <= 32 * MIB
    kept = found(backend, space, old)
    assert 0 < sum(kept) < 80
    assert kept == sorted(kept, reverse=True), "what is left of a chain is a prefix: every page of it is usable"
    assert found(backend, space, new) == [1] * 80
    assert backend.stats()["evicted"] == 80 - sum(kept)


def test_a_chain_longer_than_the_tier_keeps_its_head(tier: Open) -> None:
    space, keys = namespace(LENGTHS), chain("long", 200)
    backend = tier(capacity=16 * MIB)
    outcomes = []
    for at in range(0, 200, 20):
        outcomes += store(backend, space, keys[at : at + 20], keys[at - 1] if at else None)
    assert set(outcomes) == {Outcome.HIT, Outcome.REJECTED}
    kept = found(backend, space, keys)
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) > 40


@pytest.mark.parametrize("capacity", [16 * MIB, 128 * MIB])
def test_another_capacity_evicts_or_grows_but_never_wipes(tier: Open, tmp_path: Path, capacity: int) -> None:
    space, keys = namespace(LENGTHS), chain("a", 100)
    first = tier(capacity=48 * MIB)
    store(first, space, keys)
    first.close()
    again = tier(capacity=capacity)
    store(again, space, chain("b", 8))
    deadline = time.monotonic() + 10
    while held(tmp_path) > capacity and time.monotonic() < deadline:
        time.sleep(0.02)
    kept = found(again, space, keys)
    assert kept == sorted(kept, reverse=True)
    assert sum(kept) == 100 if capacity > 48 * MIB else 10 < sum(kept) < 100
    assert held(tmp_path) <= capacity
    assert Outcome.HIT in served(again, space, keys)


def test_namespaces_of_different_page_sizes_share_the_room(tier: Open) -> None:
    small, large = namespace((65536,), model="small"), namespace((262144, 262144), model="large")
    backend = tier(capacity=32 * MIB)
    store(backend, small, chain("s", 400))
    outcomes = store(backend, large, chain("l", 20))
    assert outcomes.count(Outcome.HIT) == 20, "a full tier makes room for a namespace that has none"
    assert served(backend, large, chain("l", 20)) == [Outcome.HIT] * 20
    assert 0 < sum(found(backend, small, chain("s", 400))) < 400


def test_two_stores_of_one_directory_see_each_others_pages(tier: Open, tmp_path: Path) -> None:
    space = namespace(LENGTHS)
    one, two = tier(), tier()
    store(one, space, chain("a", 10))
    assert found(two, space, chain("a", 10)) == [1] * 10
    assert served(two, space, chain("a", 10)) == [Outcome.HIT] * 10
    store(two, space, chain("a", 10) + chain("b", 10))
    assert two.stats()["stored"] == 10, "what another writer holds is not written twice"
    assert found(one, space, chain("b", 10)) == [1] * 10
    assert served(one, space, chain("b", 10)) == [Outcome.HIT] * 10
    assert sorted(p.name for p in (tmp_path / "tier").glob("w*")) == ["w0", "w1"]


def test_a_lost_race_with_another_writers_eviction_is_a_miss(tier: Open) -> None:
    space = namespace(LENGTHS)
    writer, reader = tier(capacity=16 * MIB), tier(capacity=16 * MIB)
    store(writer, space, chain("a", 20))
    assert found(reader, space, chain("a", 20)) == [1] * 20
    for turn in range(4):  # the slots are reused while the reader's index still names the old pages
        store(writer, space, chain(f"b{turn}", 20))
    outcomes = served(reader, space, chain("a", 20))
    assert Outcome.HIT not in outcomes[10:]
    assert set(outcomes) <= {Outcome.HIT, Outcome.MISS}
    assert reader.stats().get("corrupt", 0) == 0


def test_clear_drops_these_namespaces_only_and_for_good(tier: Open) -> None:
    mine, theirs, keys = namespace(LENGTHS), namespace(LENGTHS, model="theirs"), chain("a", 10)
    backend = tier()
    store(backend, mine, keys)
    store(backend, theirs, keys)
    backend.clear([mine])
    assert found(backend, mine, keys) == [0] * 10
    assert found(backend, theirs, keys) == [1] * 10
    backend.close()
    again = tier()
    assert found(again, mine, keys) == [0] * 10
    assert served(again, theirs, keys) == [Outcome.HIT] * 10


def test_abandoned_folders_are_served_and_make_room_when_it_is_short(tier: Open, tmp_path: Path) -> None:
    old, new = namespace(LENGTHS, model="old"), namespace(LENGTHS, model="new")
    first = tier(capacity=32 * MIB)
    store(first, old, chain("o", 100))
    first.close()
    second = tier(capacity=32 * MIB)
    assert found(second, old, chain("o", 100)) == [1] * 100
    for turn in range(4):
        assert store(second, new, chain(f"n{turn}", 25)) == [Outcome.HIT] * 25
    assert sum(f.stat().st_size for f in (tmp_path / "tier").rglob("*.ext")) <= 32 * MIB
    assert sum(found(second, old, chain("o", 100))) < 100
    served(second, old, chain("o", 100))


def test_an_unknown_format_refuses_and_names_the_fix(tier: Open, tmp_path: Path) -> None:
    tier().close()
    (tmp_path / "tier" / "FORMAT").write_text("hicache-ext local tier, format 99\n")
    with pytest.raises(OptionError, match=r"format 99.*Fix: use the program version"):
        tier()


def test_an_extent_of_an_unknown_version_refuses(tier: Open, tmp_path: Path) -> None:
    space = namespace(LENGTHS)
    first = tier()
    store(first, space, chain("a", 2))
    first.close()
    extent = next((tmp_path / "tier").rglob("*.ext"))
    with extent.open("r+b") as file:
        file.seek(8)
        file.write(b"\x63")
    with pytest.raises(OptionError, match=r"extent format 99.*Fix:"):
        tier()


def test_no_directory_entry_is_left_over(tier: Open, tmp_path: Path) -> None:
    """Nothing temporary stays, whatever happened: the directory holds the format line and writer folders alone."""
    space = namespace(LENGTHS)
    backend = tier()
    store(backend, space, chain("a", 4))
    backend.close()
    names = {p.name for p in (tmp_path / "tier").iterdir()}
    inside = {p.name for p in (tmp_path / "tier" / "w0").iterdir()}
    assert names == {"FORMAT", "w0"}
    assert inside - {"use"} == {"lock", "residency.log", "e0000000000.ext"}


def test_pools_that_do_not_fit_direct_io_bounce_and_are_counted(tier: Open) -> None:
    odd, even = namespace((70272,), model="mla"), namespace(LENGTHS)
    backend = tier()
    store(backend, odd, chain("a", 3))
    assert backend.stats()["pages_bounced"] == 3 or backend.stats()["direct_io"] != "yes"
    store(backend, even, chain("a", 3))
    assert backend.stats()["pages_direct"] >= 3
    assert served(backend, odd, chain("a", 3)) == [Outcome.HIT] * 3


def test_an_engine_that_is_not_there_is_refused_by_name(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine_module._CLASSES, "native", ("storage_backends.local.not_there", "NativeEngine"))
    with pytest.raises(OptionError, match=r"engine = 'native'.*Fix:"):
        tier(engine="native")


def test_a_directory_that_vanishes_fails_writes_and_serves_what_is_open(tier: Open, tmp_path: Path) -> None:
    space, keys = namespace(LENGTHS), chain("a", 8)
    backend = tier()
    store(backend, space, keys)
    shutil.rmtree(tmp_path / "tier")
    deadline = time.monotonic() + 10
    while backend.stats()["state"] != "directory gone" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert backend.stats()["state"] == "directory gone"
    assert store(backend, space, chain("b", 4)) == [Outcome.FAILED] * 4
    assert served(backend, space, keys) == [Outcome.HIT] * 8


def test_an_extent_that_cannot_be_opened_costs_only_its_pages(tier: Open, tmp_path: Path) -> None:
    space = namespace(LENGTHS)
    first = tier(capacity=128 * MIB)
    store(first, space, chain("a", 40))
    first.close()
    folder = tmp_path / "tier" / "w0"
    extents = sorted(folder.glob("*.ext"))
    assert len(extents) > 1
    extents[0].unlink()
    extents[0].mkdir()  # root may open any file, but nobody a directory for writing
    os.mkfifo(folder / "e0000009999.ext")
    again = tier(capacity=128 * MIB)
    assert store(again, space, chain("b", 20)) == [Outcome.HIT] * 20
    outcomes = served(again, space, chain("a", 40))
    assert outcomes.count(Outcome.HIT) == 40 - outcomes.count(Outcome.MISS) > 10


def test_a_newer_program_beside_us_is_not_understood_and_does_no_harm(
    tier: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space, keys = namespace(LENGTHS), chain("a", 4)
    backend = tier()
    store(backend, space, keys)
    other = tmp_path / "tier" / "w7"
    other.mkdir()
    (other / "residency.log").write_bytes(b"HICRLOG1" + (9).to_bytes(4, "little") + bytes(500))
    for turn in range(3):
        assert store(backend, space, chain(f"b{turn}", 2)) == [Outcome.HIT] * 2
        assert served(backend, space, keys) == [Outcome.HIT] * 4
    assert sum("a newer program writes here" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(OptionError, match=r"residency log format 9.*Fix:"):
        tier()

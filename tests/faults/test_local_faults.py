"""Damage and faults under the local tier: nothing wrong is ever served, everything heals, nothing hangs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hicache_ext.store.tiered import Tier, TieredStore
from storage_backends.base import Outcome
from storage_backends.format import BLOCK, ExtentHeader, SlotShape
from storage_backends.local import LocalBackend
from tests import pages
from tests.pages import HostPool, chain, content, key_batch, namespace
from tests.tiers import Open, local_tiers

MIB = 1 << 20
SPACE = namespace((16384, 16384))
SHAPE = SlotShape.of_namespace(SPACE)


@pytest.fixture(params=["threads", "native"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Without injected faults the native engine seals and judges slots itself; with them Python does, over it."""
    if request.param == "native":
        pytest.importorskip("hicache_ext._io", reason="not built")
    with local_tiers(tmp_path / "tier", request.param) as open_one:
        yield open_one


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what the engine of tiers opened from now on does wrong; may be changed at any time."""
    plan = tmp_path / "faults.json"
    monkeypatch.setenv("HICACHE_EXT_FAULTS", str(plan))

    def set_faults(**rules: Any) -> None:
        plan.write_text(json.dumps(rules))
        os.utime(plan, ns=(time.time_ns(), time.time_ns()))

    set_faults()
    return set_faults


def store(backend: LocalBackend | TieredStore, keys: list[bytes]) -> list[Outcome]:
    return backend.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(30)


def served(backend: LocalBackend | TieredStore, keys: list[bytes]) -> list[Outcome]:
    return pages.served(backend, SPACE, keys)


class Disk:
    """The extents' bytes, and which page each slot holds: found by reading the format, not by asking the tier."""

    def __init__(self, path: Path, keys: list[bytes]) -> None:
        self.slots: dict[bytes, tuple[Path, int]] = {}
        for extent in sorted(path.rglob("*.ext")):
            raw = extent.read_bytes()
            header = ExtentHeader.decode(raw[:BLOCK])
            for slot in range(header.slots):
                at = header.slot_offset(slot)
                key = raw[at + 32 : at + 64]
                if raw[at : at + 8] == b"HICSLOT1" and key in keys:
                    self.slots[key] = (extent, at)

    def read(self, key: bytes) -> bytes:
        path, at = self.slots[key]
        with path.open("rb") as file:
            file.seek(at)
            return file.read(SHAPE.slot_bytes)

    def write(self, key: bytes, data: bytes, skip: int = 0) -> None:
        path, at = self.slots[key]
        with path.open("r+b", buffering=0) as file:
            file.seek(at + skip)
            file.write(data)


def test_ten_thousand_corruptions_serve_no_wrong_page(tier: Open, tmp_path: Path) -> None:
    chance = random.Random(1)
    keys = chain("a", 64)
    backend = tier()
    store = TieredStore([Tier("local", backend)], backend.dispatcher)
    damaged_pages = corruptions = 0
    while corruptions < 10_000:
        outcomes = store.write(HostPool(SPACE, 64).write_batch(keys)).result(30)
        assert outcomes == [Outcome.HIT] * 64, "the next write heals what was quarantined"
        disk = Disk(tmp_path / "tier", keys)
        assert len(disk.slots) == 64
        hurt: set[bytes] = set()
        for _ in range(100):
            corruptions += 1
            key, other = chance.sample(keys, 2)
            kind = chance.choice(
                ["flip", "flip", "flip", "zero", "garbage", "swap", "header of another", "half of another"]
            )
            data = disk.read(key)
            match kind:
                case "flip":
                    at = chance.randrange(SHAPE.slot_bytes)
                    disk.write(key, bytes([data[at] ^ (1 << chance.randrange(8))]), at)
                case "zero":
                    disk.write(key, bytes(512), 512 * chance.randrange(SHAPE.slot_bytes // 512))
                case "garbage":
                    disk.write(key, chance.randbytes(chance.randrange(1, 2000)), chance.randrange(0, 30000))
                case "swap":
                    theirs = disk.read(other)
                    disk.write(key, theirs)
                    disk.write(other, data)
                    hurt.add(other)
                case "header of another":
                    disk.write(key, disk.read(other)[:BLOCK])
                case "half of another":
                    half = SHAPE.slot_bytes // 2
                    disk.write(key, disk.read(other)[half:], half)
            hurt.add(key)
        # Two corruptions may undo each other; what counts is what the disk holds now.
        whole = {key for key in keys if _is_whole(disk.read(key), key)}
        assert len(hurt - whole) > 10
        for key, outcome in zip(keys, served(store, keys), strict=True):
            assert (outcome == Outcome.HIT) == (key in whole), (key.hex(), outcome)
            damaged_pages += outcome == Outcome.CORRUPT
    assert damaged_pages == backend.stats()["corrupt"] > 2500
    assert backend.stats()["stale"], "a whole header of another page: that page is there, and this one is not"


def _is_whole(slot: bytes, key: bytes) -> bool:
    """Whether a slot's bytes are this page, by a second opinion: the right payload under a header not touched."""
    payload = slot[SHAPE.header_bytes : SHAPE.header_bytes + SHAPE.payload_bytes]
    if not np.array_equal(np.frombuffer(payload, np.uint8), content(SPACE, key)):
        return False
    from storage_backends.format import FormatError, SlotHeader

    try:
        return SlotHeader.decode(slot[: SHAPE.header_bytes]).key == key
    except FormatError:
        return False


def test_damage_is_counted_said_once_and_healed(tier: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = chain("a", 8)
    backend = tier()
    store(backend, keys)
    disk = Disk(tmp_path / "tier", keys)
    for key in keys[:3]:
        disk.write(key, b"\xff" * 16, SHAPE.header_bytes + 5000)
    with caplog.at_level(logging.WARNING):
        assert served(backend, keys) == [Outcome.CORRUPT] * 3 + [Outcome.HIT] * 5
    assert backend.stats()["corrupt"] == 3
    assert sum("verification" in record.message for record in caplog.records) == 1
    assert backend.lookup(key_batch(SPACE, keys)).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    store(backend, keys)
    assert served(backend, keys) == [Outcome.HIT] * 8


def test_a_quarantined_page_does_not_come_back_by_a_restart(tier: Open, tmp_path: Path) -> None:
    keys = chain("a", 4)
    backend = tier()
    store(backend, keys)
    Disk(tmp_path / "tier", keys).write(keys[1], b"\xff" * 16, SHAPE.header_bytes)
    served(backend, keys)
    backend.close()
    (tmp_path / "tier" / "w0" / "residency.log").unlink()
    again = tier()
    store(again, chain("b", 1))
    deadline = time.monotonic() + 10
    while again.lookup(key_batch(SPACE, keys)).tolist() != [1, 0, 1, 1] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert again.lookup(key_batch(SPACE, keys)).tolist() == [1, 0, 1, 1]


def test_a_truncated_page_heals(tier: Open, tmp_path: Path) -> None:
    """Stock `file` never heals one: it exists, so it is never written again, and reading it raises for ever."""
    keys = chain("a", 8)
    backend = tier()
    store(backend, keys)
    extent = next((tmp_path / "tier").rglob("*.ext"))
    size = extent.stat().st_size
    os.truncate(extent, BLOCK + 3 * SHAPE.slot_bytes + 100)
    outcomes = served(backend, keys)
    assert outcomes.count(Outcome.HIT) == 3
    assert outcomes.count(Outcome.CORRUPT) == 5
    os.truncate(extent, size)
    assert store(backend, keys) == [Outcome.HIT] * 8
    assert served(backend, keys) == [Outcome.HIT] * 8


def test_power_cut_at_any_write(tier: Open, tmp_path: Path, faults: Callable[..., None]) -> None:
    """Writes that were acknowledged but tore, with a log that lost its end: only whole pages come back."""
    faults(seed=3, write=[{"fault": "torn", "probability": 0.3}])
    keys = chain("a", 200)
    before = tier(path=tmp_path / "tier")
    assert store(before, keys) == [Outcome.HIT] * 200
    chance = random.Random(2)
    faults()
    for turn in range(5):
        copy = tmp_path / f"after{turn}"
        shutil.copytree(tmp_path / "tier", copy)
        log = copy / "w0" / "residency.log"
        os.truncate(log, chance.randrange(log.stat().st_size))
        disk = Disk(copy, keys)
        whole = {key for key in keys if key in disk.slots and _is_whole(disk.read(key), key)}
        assert 100 < len(whole) < 180, "the injector fired"
        after = tier(path=copy)
        store(after, chain("b", 1))
        deadline = time.monotonic() + 10
        while "recovered_by_scan" not in after.stats() and time.monotonic() < deadline:
            time.sleep(0.02)
        hits = {key for key, outcome in zip(keys, served(after, keys), strict=True) if outcome == Outcome.HIT}
        assert hits == whole
        after.close()


@pytest.mark.parametrize("name", ["EIO", "EROFS", "ENOSPC"])
def test_failing_writes(tier: Open, faults: Callable[..., None], name: str) -> None:
    backend = tier()
    tiered = TieredStore([Tier("local", backend)], backend.dispatcher)
    assert store(tiered, chain("a", 8)) == [Outcome.HIT] * 8
    faults(write=[{"fault": "errno", "errno": name}])
    expected = Outcome.REJECTED if name == "ENOSPC" else Outcome.FAILED
    for turn in range(4):
        assert set(store(tiered, chain(f"b{turn}", 8))) <= {expected, Outcome.REJECTED}
        assert served(tiered, chain("a", 8)) == [Outcome.HIT] * 8, "what is there is still served"
    state = tiered.stats()["local"]
    assert state["io_errors"]
    if name != "ENOSPC":
        assert state["write_health"] == "open"
        assert state["read_health"] == "closed"
    faults()
    deadline = time.monotonic() + 10
    while store(tiered, chain("c", 8)) != [Outcome.HIT] * 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert served(tiered, chain("c", 8)) == [Outcome.HIT] * 8
    assert tiered.stats()["local"]["write_health"] == "closed", "the tier came back by itself"


def test_enospc_in_the_middle_of_a_batch(tier: Open, faults: Callable[..., None]) -> None:
    backend = tier()
    faults(write=[{"fault": "errno", "errno": "ENOSPC", "after": 5, "count": 3}])
    outcomes = store(backend, chain("a", 16))
    assert outcomes.count(Outcome.REJECTED) == 3
    assert outcomes.count(Outcome.HIT) == 13
    assert store(backend, chain("a", 16)) == [Outcome.HIT] * 16
    assert served(backend, chain("a", 16)) == [Outcome.HIT] * 16


def test_failing_reads_are_failures_not_misses_and_recover(tier: Open, faults: Callable[..., None]) -> None:
    backend = tier()
    store(backend, chain("a", 8))
    faults(read=[{"fault": "errno", "errno": "EIO", "count": 3}])
    assert sorted(served(backend, chain("a", 8))) == [Outcome.HIT] * 5 + [Outcome.FAILED] * 3
    assert served(backend, chain("a", 8)) == [Outcome.HIT] * 8


@pytest.mark.parametrize("fault", ["short", "flip"])
def test_reads_that_bring_less_or_other_bytes(tier: Open, faults: Callable[..., None], fault: str) -> None:
    backend = tier()
    store(backend, chain("a", 32))
    faults(read=[{"fault": fault, "probability": 0.5}])
    outcomes = served(backend, chain("a", 32))
    assert {Outcome.HIT, Outcome.CORRUPT} == set(outcomes)
    faults()
    store(backend, chain("a", 32))
    assert served(backend, chain("a", 32)) == [Outcome.HIT] * 32


def test_short_writes_are_not_believed(tier: Open, faults: Callable[..., None]) -> None:
    backend = tier()
    faults(write=[{"fault": "short", "probability": 0.5}])
    outcomes = store(backend, chain("a", 32))
    assert Outcome.HIT in outcomes
    assert len(set(outcomes)) > 1
    faults()
    stored = [key for key, outcome in zip(chain("a", 32), outcomes, strict=True) if outcome == Outcome.HIT]
    assert served(backend, stored) == [Outcome.HIT] * len(stored)


def test_a_slow_device_never_touches_pages_past_the_deadline(tier: Open, faults: Callable[..., None]) -> None:
    """The device takes 5 s, the caller 100 ms; the caller's pages are somebody else's by then."""
    backend = tier()
    tiered = TieredStore([Tier("local", backend)], backend.dispatcher)
    keys = chain("a", 16)
    store(tiered, keys)
    faults(read=[{"fault": "delay", "seconds": 5, "after": 6}])
    pool = HostPool(SPACE, 16)
    pool.poison()
    began = time.monotonic()
    outcomes = tiered.read(pool.batch(keys), deadline=began + 0.1).result(10)
    assert time.monotonic() - began < 2
    assert outcomes.count(Outcome.TIMEOUT) >= 10
    for page, outcome in enumerate(outcomes):
        assert outcome in (Outcome.HIT, Outcome.TIMEOUT)
        assert outcome != Outcome.HIT or pool.right(page, keys[page])
    rng = np.random.default_rng(0)
    pool.bytes[:] = rng.integers(0, 256, len(pool.bytes), np.uint8)  # the pages are reused
    reused = pool.bytes.copy()
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        time.sleep(0.25)
        assert np.array_equal(pool.bytes, reused), "a late byte landed in memory that was given back"


def test_a_direct_read_is_waited_for_whatever_it_takes(tier: Open, faults: Callable[..., None]) -> None:
    """The negative of the test above: without a deadline the bytes do land late, so the caller must be kept waiting."""
    backend = tier()
    keys = chain("a", 4)
    store(backend, keys)
    faults(read=[{"fault": "delay", "seconds": 1}])
    pool = HostPool(SPACE, 4)
    pool.poison()
    completion = backend.read(pool.batch(keys))
    assert not completion.wait(0.3)
    assert completion.outcomes == bytearray(4)
    assert completion.result(10) == [Outcome.HIT] * 4
    assert all(pool.right(page, key) for page, key in enumerate(keys))


def test_close_does_not_wait_for_a_device_that_does_not_answer(tier: Open, faults: Callable[..., None]) -> None:
    backend = tier()
    keys = chain("a", 4)
    store(backend, keys)
    faults(read=[{"fault": "delay", "seconds": 20}])
    pending = backend.read(HostPool(SPACE, 4).batch(keys))
    time.sleep(0.1)
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began <= 8.5
    assert not pending.done or set(pending.result()) <= {Outcome.TIMEOUT}


def test_the_directory_removed_under_load(tier: Open, tmp_path: Path) -> None:
    backend = tier()
    tiered = TieredStore([Tier("local", backend)], backend.dispatcher)
    store(tiered, chain("a", 16))
    shutil.rmtree(tmp_path / "tier")
    deadline = time.monotonic() + 10
    while tiered.stats()["local"]["write_health"] != "open" and time.monotonic() < deadline:
        outcomes = store(tiered, chain(f"b{time.monotonic()}", 4))
        assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED, Outcome.REJECTED}
        time.sleep(0.02)
    state = tiered.stats()["local"]
    assert state["write_health"] == "open"
    assert state["state"] == "directory gone"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up(tier: Open, small_disk: Path) -> None:
    """Somebody else takes the rest of the disk: the tier goes on within what it has, and grows again later."""
    backend = tier(path=small_disk / "tier", capacity=40 * MIB)
    assert store(backend, chain("a", 200)) == [Outcome.HIT] * 200
    with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))
    for turn in range(6):
        outcomes = store(backend, chain(f"b{turn}", 200))
        assert set(outcomes) <= {Outcome.HIT, Outcome.REJECTED}
        assert Outcome.HIT in outcomes
        served(backend, chain(f"b{turn}", 200))
    assert backend.stats()["state"] == "disk full"
    assert backend.stats()["evicted"]
    (small_disk / "other").unlink()
    assert store(backend, chain("c", 200)).count(Outcome.HIT) == 200


def test_a_disk_that_is_full_from_the_start(tier: Open, small_disk: Path) -> None:
    backend = tier(path=small_disk / "tier", capacity=40 * MIB)
    with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))
    assert store(backend, chain("a", 8)) == [Outcome.REJECTED] * 8
    assert served(backend, chain("a", 8)) == [Outcome.MISS] * 8

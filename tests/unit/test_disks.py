"""Several disks under one tier: how pages spread, what one disk's end costs, and how it comes back."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from hicache_ext.cli.main import app
from storage_backends.base import KeyBatch, OptionError, Outcome
from storage_backends.format import BLOCK, ExtentHeader
from storage_backends.local import LocalBackend, disks
from tests import pages
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import tiers

MIB = 1 << 20
SPACE = namespace((65536,))


@pytest.fixture(params=["python", "native"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        pytest.importorskip("storage_backends.local.index_native", exc_type=ImportError)
    monkeypatch.setenv("HICACHE_EXT_INDEX", request.param)


@pytest.fixture
def tier() -> Iterator[Callable[..., LocalBackend]]:
    with tiers(capacity=32 * MIB, engine="threads") as open_one:
        yield open_one


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [tmp_path / "a" / "tier", tmp_path / "b" / "tier"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks come back soon."""
    monkeypatch.setattr(disks, "_FIRST_PROBE_SECONDS", 0.05)
    monkeypatch.setattr(disks, "_LONGEST_PROBE_SECONDS", 0.2)


def store(backend: LocalBackend, keys: list[bytes], parent: bytes | None = None) -> list[Outcome]:
    return backend.write(HostPool(SPACE, len(keys)).write_batch(keys, parent)).result(30)


def found(backend: LocalBackend, keys: list[bytes]) -> list[int]:
    return backend.lookup(key_batch(SPACE, keys)).tolist()


def served(backend: LocalBackend, keys: list[bytes]) -> list[Outcome]:
    return pages.served(backend, SPACE, keys)


def on_disk(path: Path, keys: list[bytes]) -> set[bytes]:
    """Which of the pages lie there, by the bytes on the disk."""
    there = set()
    for extent in path.rglob("*.ext"):
        raw = extent.read_bytes()
        header = ExtentHeader.decode(raw[:BLOCK])
        for at in map(header.slot_offset, range(header.slots)):
            if raw[at : at + 8] == b"HICSLOT1":
                there.add(raw[at + 32 : at + 64])
    return there.intersection(keys)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.parametrize("capacity", [[48 * MIB] * 3, [96 * MIB, 32 * MIB, 16 * MIB]])
@pytest.mark.usefixtures("index")
def test_pages_spread_by_capacity(tier: Callable[..., LocalBackend], tmp_path: Path, capacity: list[int]) -> None:
    paths = [tmp_path / name for name in "abc"]
    backend = tier(*paths, capacity=capacity)
    keys = [key for turn in range(60) for key in chain(f"c{turn}", 10)]
    for turn in range(60):
        assert store(backend, chain(f"c{turn}", 10)) == [Outcome.HIT] * 10
    parts = [on_disk(path, keys) for path in paths]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 600, "each page lies once"
    for part, bytes_ in zip(parts, capacity, strict=True):
        assert abs(len(part) / 600 - bytes_ / sum(capacity)) < 0.08
    assert served(backend, keys) == [Outcome.HIT] * 600


@pytest.mark.usefixtures("index")
def test_a_full_tier_fills_every_disk_and_keeps_prefixes(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    """Chains span disks, and go from their ends all the same: what is left of each is usable whole."""
    chance = random.Random(3)
    backend = tier(*two, capacity=[24 * MIB, 12 * MIB])
    chains = [chain(f"c{n}", 60) for n in range(40)]
    for keys in chains:
        for at in range(0, 60, 20):
            assert store(backend, keys[at : at + 20], keys[at - 1] if at else None) == [Outcome.HIT] * 20
        found(backend, chance.choice(chains)[:5])
    stats = backend.stats()
    assert stats["evicted"]
    assert stats["pages"] == int(stats["stored"]) - int(stats["evicted"])
    for path, capacity in zip(two, (24 * MIB, 12 * MIB), strict=True):
        assert 0.7 * capacity < sum(f.stat().st_size for f in path.rglob("*.ext")) <= capacity
    for keys in chains:
        kept = backend.lookup_local(key_batch(SPACE, keys)).tolist()
        assert kept == sorted(kept, reverse=True)
        assert served(backend, keys[: sum(kept)]) == [Outcome.HIT] * sum(kept)


@pytest.mark.usefixtures("index")
def test_a_restart_serves_whatever_the_order_of_the_paths(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    keys = chain("a", 100)
    first = tier(*two)
    store(first, keys)
    first.close()
    again = tier(*two[::-1], capacity=[20 * MIB, 24 * MIB])
    assert served(again, keys) == [Outcome.HIT] * 100
    assert store(again, chain("b", 20)) == [Outcome.HIT] * 20
    assert served(again, keys + chain("b", 20)) == [Outcome.HIT] * 120
    assert [sorted(p.name for p in path.glob("w*")) for path in two] == [["w0"], ["w0"]]


def test_two_processes_share_both_disks(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    one, other = tier(*two), tier(*two)
    store(one, chain("a", 30))
    until(lambda: found(other, chain("a", 30)) == [1] * 30)  # each disk's thread reads what the others write there
    store(other, chain("b", 30))
    until(lambda: found(one, chain("b", 30)) == [1] * 30)
    assert served(one, chain("b", 30)) == served(other, chain("a", 30)) == [Outcome.HIT] * 30
    assert [sorted(p.name for p in path.glob("w*")) for path in two] == [["w0", "w1"], ["w0", "w1"]]


@pytest.mark.usefixtures("index", "quick")
def test_a_directory_removed_costs_its_pages_and_no_more(
    tier: Callable[..., LocalBackend], two: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = tier(*two)
    keys = chain("a", 100)
    store(backend, keys)
    lost = on_disk(two[1], keys)
    assert 20 < len(lost) < 80
    two[1].rename(tmp_path / "elsewhere")
    until(lambda: backend.stats()["disks_out"] == 1 and backend.stats()["pages"] == 100 - len(lost))
    assert [key in lost for key in keys] == [not there for there in found(backend, keys)]
    assert set(served(backend, keys)) == {Outcome.HIT, Outcome.MISS}
    fresh = [store(backend, [key]) for key in chain("b", 50)]  # one by one: each is a chain of its own
    assert fresh == [[Outcome.HIT]] * 50
    assert on_disk(two[0], chain("b", 50)) == set(chain("b", 50)), "whoever would rather be there lies elsewhere"
    (tmp_path / "elsewhere").rename(two[1])
    until(lambda: backend.stats()["disks_out"] == 0)
    until(lambda: found(backend, keys) == [1] * 100)
    assert served(backend, keys + chain("b", 50)) == [Outcome.HIT] * 150
    assert store(backend, chain("c", 50)) == [Outcome.HIT] * 50
    assert on_disk(two[1], chain("c", 50))
    said = [record.message for record in caplog.records if str(two[1]) in record.message]
    assert sum("out of use" in message for message in said) == sum("in use again" in message for message in said) == 1


@pytest.mark.usefixtures("quick")
def test_pages_that_leave_with_a_disk_are_reported(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    backend = tier(*two)
    heard: list[tuple[str, int]] = []
    backend.on_residency(lambda change, _, keys, __: heard.append((change.name, len(keys) // 32)))
    keys = chain("a", 40)
    store(backend, keys)
    lost = len(on_disk(two[0], keys))
    shutil.rmtree(two[0])
    until(lambda: sum(count for change, count in heard if change == "REMOVED") == lost)
    assert backend.stats()["disk_out"] == lost


@pytest.mark.usefixtures("index", "quick")
def test_a_restart_with_a_disk_missing_and_with_it_back(
    tier: Callable[..., LocalBackend], two: list[Path], tmp_path: Path
) -> None:
    keys = chain("a", 100)
    first = tier(*two)
    store(first, keys)
    first.close()
    kept = on_disk(two[0], keys)
    two[1].parent.rename(tmp_path / "elsewhere")
    two[1].parent.write_text("no directory")
    again = tier(*two)
    assert again.stats()["disks_out"] == 1
    assert "disk" not in str(again.stats()["disk_0_state"])
    assert {key for key, there in zip(keys, found(again, keys), strict=True) if there} == kept
    assert store(again, chain("b", 10)) == [Outcome.HIT] * 10
    two[1].parent.unlink()
    (tmp_path / "elsewhere").rename(two[1].parent)
    until(lambda: again.stats()["disks_out"] == 0)
    assert found(again, keys) == [1] * 100
    assert served(again, keys) == [Outcome.HIT] * 100


def test_no_disk_at_all_is_an_error(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    for path in two:
        path.parent.write_text("no directory")
    with pytest.raises(OptionError, match="cannot be used"):
        tier(*two)


@pytest.mark.usefixtures("quick")
def test_a_hung_disk_holds_up_nothing_else(
    tier: Callable[..., LocalBackend], two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages in flight stay in the device's hands to the end; all others go on; it comes back when it answers."""
    monkeypatch.setattr(disks, "SILENT_SECONDS", 1.0)
    plan = tmp_path / "faults.json"
    monkeypatch.setenv("HICACHE_EXT_FAULTS", str(plan))
    backend = tier(*two)
    keys = chain("a", 100)
    store(backend, keys)
    slow = backend._disks.bays[1].disk
    assert slow is not None
    healthy = backend._disks.bays[0].disk
    assert healthy is not None
    # Only the second disk's engine: the plan file is everybody's.
    healthy.slots = type(healthy.slots)(healthy.engine.inner)  # type: ignore[attr-defined,call-arg]
    plan.write_text(json.dumps({"read": [{"fault": "delay", "seconds": 6}]}))
    pool = HostPool(SPACE, 100)
    pool.poison()
    pending = backend.read(pool.batch(keys))
    theirs = on_disk(two[1], keys)
    until(lambda: backend.stats()["disks_out"] == 1, 8)
    assert not pending.done, "what is in flight is waited for"
    ours = [key for key in keys if key not in theirs]
    assert served(backend, ours) == [Outcome.HIT] * len(ours)
    fresh = [store(backend, [key]) for key in chain("b", 30)]
    assert fresh == [[Outcome.HIT]] * 30
    assert backend.stats()["disks_out"] == 1
    outcomes = pending.result(30)
    assert all(pool.right(page, key) for page, key in enumerate(keys) if outcomes[page] == Outcome.HIT)
    plan.unlink()
    until(lambda: backend.stats()["disks_out"] == 0)
    assert served(backend, keys) == [Outcome.HIT] * 100


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system on a loop device, and what makes that device end after its first 4 MiB, for good."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    made = (
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], capture_output=True)
        if shutil.which("mkfs.ext4")
        else None
    )
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True) if made else None
    if mounted is None or mounted.returncode:
        pytest.skip("no loop device can be mounted here")
    device = subprocess.run(["findmnt", "-no", "SOURCE", str(mount)], capture_output=True, check=True, text=True)

    def cut() -> None:
        os.truncate(image, 4 * MIB)
        # The device must know: else what the kernel still writes makes the file longer, and that part reads well.
        subprocess.run(["losetup", "--set-capacity", device.stdout.strip()], check=True)

    yield mount, cut
    subprocess.run(["umount", "-l", str(mount)], check=False)


@pytest.mark.usefixtures("quick")
def test_a_disk_that_gives_input_errors(
    tier: Callable[..., LocalBackend], loop_disk: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    mount, cut = loop_disk
    backend = tier(tmp_path / "a", mount / "tier", capacity=[48 * MIB, 48 * MIB])
    keys = chain("a", 200)
    store(backend, keys)
    theirs = on_disk(mount / "tier", keys)
    assert len(theirs) > 40
    subprocess.run(["sync", "-f", str(mount)], check=True)
    cut()

    def is_out() -> bool:
        served(backend, keys)
        return backend.stats()["disks_out"] == 1

    until(is_out)
    assert int(backend.stats()["disk_1_errors"]) >= 8
    ours = [key for key in keys if key not in theirs]
    until(lambda: backend.stats()["pages"] == len(ours))
    assert served(backend, ours) == [Outcome.HIT] * len(ours)
    assert [store(backend, [key]) for key in chain("b", 30)] == [[Outcome.HIT]] * 30
    assert backend.stats()["disks_out"] == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_no_failed_disk(tier: Callable[..., LocalBackend], small_disk: Path, tmp_path: Path) -> None:
    with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for _ in range(18):
            file.write(bytes(MIB))
    backend = tier(tmp_path / "a", small_disk / "tier", capacity=[32 * MIB, 20 * MIB])
    for turn in range(30):
        assert store(backend, chain(f"c{turn}", 20)) == [Outcome.HIT] * 20
    assert backend.stats()["disks_out"] == 0
    assert "disk full" in str(backend.stats()["state"])
    assert sum(served(backend, chain(f"c{turn}", 20)) == [Outcome.HIT] * 20 for turn in range(30)) > 10


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"path": [], "capacity": "1GiB"}, "path"),
        ({"path": ["/a", "/b"], "capacity": ["1GiB"]}, "give one for each, or one for all"),
        ({"path": ["/a"] * 300, "capacity": "900GiB"}, "at most 255"),
        ({"path": ["/a", 7], "capacity": "1GiB"}, "path"),
    ],
)
def test_options_that_say_nothing_of_use(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        LocalBackend.Options.model_validate(options)


def test_checks_of_several_paths(tmp_path: Path) -> None:
    def check(paths: list[str | Path], capacity: Any) -> None:
        LocalBackend.check(LocalBackend.Options.model_validate({"path": paths, "capacity": capacity}))

    check([tmp_path / "a", tmp_path / "b"], "2MiB")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    with pytest.raises(OptionError, match="is the same directory as"):
        check([tmp_path / "a", tmp_path / "link"], "2MiB")
    with pytest.raises(OptionError, match="NUL"):
        check([tmp_path / "a", "/tmp/x\0y"], "2MiB")
    room = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    check([tmp_path / "a"], room // 2)
    with pytest.raises(OptionError, match="the disk has"):
        check([tmp_path / "a", tmp_path / "b"], [room * 2 // 3, room * 2 // 3])


def test_the_other_disks_pages_are_never_mixed_up(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    """The same folder, extent and slot on two disks are two places."""
    backend = tier(*two)
    for turn in range(5):
        keys = chain(f"c{turn}", 40)
        assert store(backend, keys) == [Outcome.HIT] * 40
        assert backend.remove(KeyBatch(SPACE, keys[7] + keys[23])) == 2
        assert served(backend, keys) == [Outcome.MISS if i in (7, 23) else Outcome.HIT for i in range(40)]


def test_inspect_and_verify_take_every_disk(tier: Callable[..., LocalBackend], two: list[Path]) -> None:
    backend = tier(*two)
    store(backend, chain("a", 60))
    backend.close()
    names = [str(path) for path in two]
    told = json.loads(CliRunner().invoke(app, ["inspect", "--json", *names]).stdout)
    (space,) = told["namespaces"]
    assert (told["path"], space["pages"]) == (names, 60)
    assert (space["chains"]["chains"], space["chains"]["orphaned_pages"]) == (1, 0), "one chain, on both disks"
    alone = json.loads(CliRunner().invoke(app, ["inspect", "--json", names[1]]).stdout)
    assert alone["namespaces"][0]["chains"]["orphaned_pages"]
    checked = CliRunner().invoke(app, ["verify", "--json", "--limit", "none", *names])
    assert checked.exit_code == 0
    assert sum(disk["slots"]["valid"] for disk in json.loads(checked.stdout)) == 60
    extent = next(two[1].rglob("*.ext"))
    with extent.open("r+b") as file:
        file.seek(BLOCK + 9000)
        file.write(b"damage")
    assert CliRunner().invoke(app, ["verify", *names]).exit_code == 1

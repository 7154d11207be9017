"""Disks and buckets behind NIXL that fail, lie, fill up, crawl or go: no exception, no wrong byte, no late one."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import Backend, Dispatcher, OptionError, Outcome
from tests.fuse import Disk, fuse_disk
from tests.pages import HostPool, chain, key_batch, namespace, served_and_quiet
from tests.proxy import Proxy

pytest.importorskip("nixl_cu12")

SPACE = namespace((65536, 65536))
KEYS = chain("a", 16)
HITS = [Outcome.HIT] * len(KEYS)
SIZE = 4096 + 2 * 65536

Open = Callable[..., Backend]


class Tier:
    """A nixl tier and a pool. registered: pages go straight between the pool and the store."""

    def __init__(self, backend: Backend, registered: bool) -> None:
        self.backend, self.pool = backend, HostPool(SPACE, 32)
        if registered:
            backend.register_memory(self.pool.memory.address, self.pool.memory.size)

    def store(self, keys: list[bytes] = KEYS) -> list[Outcome]:
        return self.backend.write(self.pool.write_batch(keys)).result(60)

    def served(self, keys: list[bytes] = KEYS) -> list[Outcome]:
        """Read, and insist that hits are right."""
        self.pool.poison()
        outcomes = self.backend.read(self.pool.batch(keys)).result(60)
        for page, outcome in enumerate(outcomes):
            assert outcome != Outcome.HIT or self.pool.right(page, keys[page]), "a wrong page was served"
        return outcomes

    def count(self, name: str) -> int:
        return int(self.backend.stats()[name])


@pytest.fixture
def opened() -> Iterator[Open]:
    from storage_backends.nixl import NixlBackend

    dispatcher = Dispatcher()
    backends: list[Backend] = []

    def open_one(**options: Any) -> Backend:
        checked = NixlBackend.Options.model_validate(options)
        NixlBackend.check(checked)
        backends.append(NixlBackend(checked, dispatcher))
        return backends[-1]

    yield open_one
    for backend in backends:
        backend.close()
    dispatcher.close()


@pytest.fixture(params=[True, False], ids=["straight", "copied"])
def registered(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def tier(opened: Open, registered: bool) -> Callable[..., Tier]:
    def open_one(path: Path, **options: Any) -> Tier:
        return Tier(opened(**{"path": path, "capacity": 64 << 20, **options}), registered)

    return open_one


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with fuse_disk(tmp_path) as mounted:
        yield mounted


def files(root: Path) -> dict[str, Path]:
    """By key, of the pages that lie there."""
    return {path.stem: path for path in root.rglob("*.page") if path.parent.name != "tmp"}


# ---- what lies there is wrong


def damage(root: Path, keys: list[bytes], seed: int) -> set[bytes]:
    """Make a part of what lies there wrong, in every way we know; which keys are harmed."""
    chance, names = random.Random(seed), files(root)
    hurt = chance.sample(keys, 6)
    for kind, key in enumerate(hurt):
        path = names[key.hex()]
        data = bytearray(path.read_bytes())
        match kind:
            case 0:
                data[chance.randrange(SIZE)] ^= 1 << chance.randrange(8)  # the header's padding is under a checksum too
            case 1:
                data[:] = names[chance.choice([one for one in keys if one != key]).hex()].read_bytes()
            case 2:
                del data[chance.randrange(1, SIZE // 4096) * 4096 :]
            case 3:
                data += bytes(4096)
            case 4:
                data[:] = bytes(SIZE)
            case _:
                data.clear()
        path.write_bytes(data)
    return set(hurt)


def test_wrong_files_are_caught_and_healed_and_cost_nobody_else(tier: Callable[..., Tier], tmp_path: Path) -> None:
    one = tier(tmp_path)
    for turn in range(5):
        assert one.store() == HITS
        hurt = damage(tmp_path, KEYS, turn)
        outcomes = one.served()
        assert {key for key, outcome in zip(KEYS, outcomes, strict=True) if outcome == Outcome.CORRUPT} == hurt
        assert outcomes.count(Outcome.HIT) == len(KEYS) - len(hurt)
    assert one.store() == HITS
    damage(tmp_path, KEYS, 9)
    there = one.backend.lookup(key_batch(SPACE, KEYS))
    assert not there.all(), "files of another size are not there, for lookups"
    assert one.store() == HITS, "and are written over"
    assert (one.count("bounced") == 0) == (len(one.backend._known[0]) > 0)  # type: ignore[attr-defined]


def test_files_that_are_removed_are_misses_and_a_directory_that_goes_comes_back(
    tier: Callable[..., Tier], tmp_path: Path
) -> None:
    root = tmp_path / "pages"
    one = tier(root)
    assert one.store() == HITS
    for key in KEYS[::2]:
        files(root)[key.hex()].unlink()
    assert one.served() == [Outcome.MISS, Outcome.HIT] * (len(KEYS) // 2)
    shutil.rmtree(root)
    assert one.served() == [Outcome.MISS] * len(KEYS)
    assert set(one.store()) == {Outcome.FAILED}
    assert "is not there" in one.backend.stats()["state"]
    assert not one.backend.lookup(key_batch(SPACE, KEYS)).any()
    assert not root.exists(), "what is mounted there is gone: its pages must not fill the disk below"
    root.mkdir()
    deadline = time.monotonic() + 30
    while one.store() != HITS:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert one.served() == HITS
    assert one.backend.stats()["state"] == "ok"


def test_a_writer_that_is_killed_leaves_whole_pages_or_none(tier: Callable[..., Tier], tmp_path: Path) -> None:
    root = tmp_path / "pages"
    writer = f"""
import itertools
from pathlib import Path
from storage_backends.base import Dispatcher
from storage_backends.nixl import NixlBackend
from tests.pages import HostPool, chain, namespace
backend = NixlBackend(NixlBackend.Options(path=Path({str(root)!r}), capacity={64 << 20}), Dispatcher())
pool = HostPool(namespace((65536, 65536)), 16)
for turn in itertools.count():
    backend.write(pool.write_batch(chain(f"k{{turn}}", 16))).result(60)
    print(turn, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        time.sleep(random.Random(1).uniform(0.01, 0.1))
        process.send_signal(signal.SIGKILL)
    for old in (root / "hicache" / "tmp").iterdir():
        os.utime(old, (0, 0))
    one = tier(root)
    assert not list((root / "hicache" / "tmp").iterdir()), "what it left half done goes at the next start"
    for turn in range(4):
        assert set(one.served(chain(f"k{turn}", 16))) <= {Outcome.HIT, Outcome.MISS}
    assert set(one.served(chain("k0", 16))) == {Outcome.HIT}


# ---- the disk


def test_one_bad_transfer_costs_its_page_and_not_the_group(tier: Callable[..., Tier], disk: Disk) -> None:
    one = tier(disk.path)
    assert one.store() == HITS
    disk.plan.write_text(json.dumps({"read": [{"fault": "errno", "errno": "EIO", "count": 2}]}))
    assert one.served() == HITS, "asked again, each by itself"
    assert one.count("retried") >= 1
    disk.plan.write_text(json.dumps({"seed": 3, "read": [{"fault": "errno", "errno": "EIO", "probability": 0.25}]}))
    seen = [outcome for _ in range(4) for outcome in one.served()]
    assert set(seen) == {Outcome.HIT, Outcome.FAILED}
    disk.plan.write_text("{}")
    assert one.served() == HITS
    disk.plan.write_text(json.dumps({"seed": 3, "write": [{"fault": "errno", "errno": "EIO", "probability": 0.4}]}))
    outcomes = one.store(chain("b", 16))
    assert set(outcomes) == {Outcome.HIT, Outcome.FAILED}
    disk.plan.write_text("{}")
    stored = {Outcome.HIT: Outcome.HIT, Outcome.FAILED: Outcome.MISS}
    assert one.served(chain("b", 16)) == [stored[outcome] for outcome in outcomes]
    assert not list((disk.path / "hicache" / "tmp").iterdir())


def test_flipped_bits_short_reads_and_torn_writes(tier: Callable[..., Tier], disk: Disk) -> None:
    one = tier(disk.path)
    assert one.store() == HITS
    for fault, allowed in (("flip", {Outcome.CORRUPT}), ("short", {Outcome.FAILED, Outcome.CORRUPT})):
        disk.plan.write_text(json.dumps({"seed": 5, "read": [{"fault": fault, "probability": 0.3}]}))
        seen = set(one.served() + one.served())
        assert allowed & seen, fault
        assert seen <= {Outcome.HIT, Outcome.MISS, *allowed}
        disk.plan.write_text("{}")
        assert one.store() == HITS, "what was quarantined is healed"
        assert one.served() == HITS
    disk.plan.write_text(json.dumps({"seed": 5, "write": [{"fault": "torn", "probability": 0.3}]}))
    assert one.store(chain("b", 16)) == HITS, "the device says so"
    disk.plan.write_text("{}")
    assert set(one.served(chain("b", 16))) == {Outcome.HIT, Outcome.CORRUPT}
    assert one.store(chain("b", 16)) == HITS
    assert one.served(chain("b", 16)) == HITS


def test_a_slow_read_never_writes_late(tier: Callable[..., Tier], registered: bool, disk: Disk) -> None:
    one = tier(disk.path, timeout=0.2, connections=2)
    assert one.store() == HITS
    disk.plan.write_text(json.dumps({"read": [{"fault": "delay", "seconds": 0.8, "count": 40}]}))
    outcomes = one.served()
    if registered:
        assert outcomes == HITS, "it is the caller's memory: it is waited for"
    else:
        assert Outcome.TIMEOUT in outcomes
        assert set(outcomes) <= {Outcome.TIMEOUT, Outcome.FAILED}, "the tier is away for a moment"
        one.pool.bytes[:] = 0x77  # the pages are somebody else's now
        time.sleep(1)
        assert (one.pool.bytes == 0x77).all(), "a late byte landed in memory that was given back"
    assert one.count("late") >= 1
    disk.plan.write_text("{}")
    deadline = time.monotonic() + 30
    while one.served() != HITS:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_close_while_the_disk_hangs(tier: Callable[..., Tier], disk: Disk) -> None:
    one = tier(disk.path, timeout=0.2)
    assert one.store() == HITS
    disk.plan.write_text(json.dumps({"read": [{"fault": "delay", "seconds": 1.5}]}))
    pending = [one.backend.read(one.pool.batch(KEYS)) for _ in range(3)]
    time.sleep(0.1)
    began = time.monotonic()
    one.backend.close()
    assert time.monotonic() - began < 8
    assert {outcome for done in pending for outcome in done.result(30)} <= {
        Outcome.TIMEOUT,
        Outcome.FAILED,
        Outcome.HIT,
    }
    one.pool.bytes[:] = 0x77
    time.sleep(2)
    assert (one.pool.bytes == 0x77).all()


def test_a_full_disk_rejects_and_serves(tier: Callable[..., Tier], tmp_path: Path) -> None:
    full = tmp_path / "disk"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(full)], capture_output=True).returncode:
        pytest.skip("this user cannot mount")
    try:
        one = tier(full)
        outcomes = one.store()
        assert set(outcomes) == {Outcome.HIT, Outcome.REJECTED}
        assert one.served() == [Outcome.HIT if outcome == Outcome.HIT else Outcome.MISS for outcome in outcomes]
        assert one.count("rejected") == outcomes.count(Outcome.REJECTED)
        assert one.backend.stats()["state"] == "ok"
        one.backend.remove(key_batch(SPACE, KEYS))
        assert one.store(KEYS[-4:]) == [Outcome.HIT] * 4
        one.backend.close()
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_a_shared_directory_keeps_its_capacity_and_tells_of_what_goes(
    tier: Callable[..., Tier], tmp_path: Path
) -> None:
    first, second = (tier(tmp_path, capacity=32 * SIZE) for _ in range(2))
    gone: list[bytes] = []
    first.backend.on_residency(lambda change, _, keys, __: gone.append(keys) if change.name == "REMOVED" else None)
    for turn in range(8):
        assert set(first.store(chain(f"f{turn}", 8))) <= {Outcome.HIT, Outcome.REJECTED}
        assert set(second.store(chain(f"s{turn}", 8))) <= {Outcome.HIT, Outcome.REJECTED}
    assert len(files(tmp_path)) <= 2 * 32
    assert Outcome.HIT in first.served(chain("s7", 8)), "each serves what the other wrote"
    drained = threading.Event()
    first.backend.dispatcher.post(drained.set)
    assert drained.wait(10)
    assert gone
    assert not set(b"".join(gone).hex(" ", 32).split()) & set(files(tmp_path))


# ---- the process


def test_opened_and_closed_again_and_again_leaves_nothing_open(tier: Callable[..., Tier], tmp_path: Path) -> None:
    def now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    tier(tmp_path).backend.close()
    before = now()
    for turn in range(5):
        one = tier(tmp_path)
        assert one.store(chain(f"k{turn}", 8)) == [Outcome.HIT] * 8
        one.backend.close()
    assert now() <= (before[0] + 1, before[1] + 1)


def test_without_io_uring_the_default_works_and_asking_for_it_is_refused(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from storage_backends.base import Dispatcher, OptionError
from storage_backends.nixl import NixlBackend
from tests.faults.test_nixl_faults import KEYS, Tier
def make(**more):
    return NixlBackend(NixlBackend.Options(path=Path({str(tmp_path)!r}), capacity=1 << 24, **more), Dispatcher())
one = Tier(make(), True)
assert set(one.store()) == {{1}}
assert set(one.served()) == {{1}}
one.backend.close()
try:
    make(params={{"use_uring": "true"}})
except OptionError as error:
    print(error.key)
"""
    command = [sys.executable, "-m", "tests.seccomp", "errno", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "plugin"), done.stderr


def test_a_plugin_that_cannot_be_opened_is_said(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be opened here") as wrong:
        opened(path=tmp_path, capacity=1 << 24, params={"use_aio": "true", "use_uring": "true"})
    assert wrong.value.key == "plugin"
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(OptionError, match="needs a GPU"):
            opened(path=tmp_path, capacity=1 << 24, plugin="GDS")


# ---- a bucket


@pytest.fixture
def bucket(opened: Open, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[..., Tier], Proxy, Any, str]]:
    """Opens tiers on a new bucket through a proxy; the proxy, the server, the bucket's name."""
    from tests.s3_server import CREDENTIALS, s3_server

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = s3_server()
    name = server.bucket()
    with Proxy(server.port) as proxy:

        def open_one(**options: Any) -> Tier:
            where = {"endpoint": f"http://127.0.0.1:{proxy.port}", "allow_http": True, "bucket": name}
            return Tier(opened(**{"plugin": "OBJ", "timeout": 60, **where, **options}), False)

        yield open_one, proxy, server, name


def test_wrong_objects_are_caught_and_healed(bucket: tuple[Callable[..., Tier], Proxy, Any, str]) -> None:
    import obstore

    open_one, _, server, name = bucket
    one, raw = open_one(), server.store(name)
    assert one.store() == HITS
    names = {path.rpartition("/")[2]: path for path in (entry["path"] for entry in obstore.list(raw).collect())}
    good = {key: bytes(obstore.get(raw, names[key.hex()]).bytes()) for key in KEYS}
    wrong = {
        KEYS[1]: good[KEYS[1]][:5000] + b"\1" + good[KEYS[1]][5001:],
        KEYS[4]: good[KEYS[5]],
        KEYS[7]: good[KEYS[7]][:70000],
        KEYS[9]: b"other data under our key",
        KEYS[10]: b"",
    }
    assert all(data != good[key] for key, data in wrong.items())
    for key, data in wrong.items():
        obstore.put(raw, names[key.hex()], data, use_multipart=False)
    obstore.delete(raw, names[KEYS[12].hex()])
    outcomes = dict(zip(KEYS, one.served(), strict=True))
    assert {key for key, outcome in outcomes.items() if outcome == Outcome.CORRUPT} == set(wrong)
    assert outcomes[KEYS[12]] == Outcome.MISS
    assert list(outcomes.values()).count(Outcome.HIT) == len(KEYS) - len(wrong) - 1
    assert one.store() == HITS
    assert one.served() == HITS


def test_the_s3_tier_reads_what_obj_wrote(bucket: tuple[Callable[..., Tier], Proxy, Any, str]) -> None:
    from storage_backends.s3 import S3Backend

    open_one, _, _, _ = bucket
    one = open_one()
    assert one.store() == HITS
    with contextlib.closing(S3Backend(one.backend.options.s3(), one.backend.dispatcher)) as s3:  # type: ignore[attr-defined]
        assert served_and_quiet(s3, SPACE, KEYS, 60) == HITS
        b = chain("b", 4)
        assert s3.write(HostPool(SPACE, 4).write_batch(b)).result(60) == HITS[:4]
        assert one.served(b) == HITS[:4]


def test_a_bucket_that_does_not_answer(bucket: tuple[Callable[..., Tier], Proxy, Any, str]) -> None:
    open_one, proxy, _, _ = bucket
    one = open_one(timeout=2)
    assert one.store() == HITS
    proxy.frozen = True
    began = time.monotonic()
    outcomes = one.served()
    assert time.monotonic() - began < 30
    assert set(outcomes) <= {Outcome.TIMEOUT, Outcome.FAILED}
    assert Outcome.TIMEOUT in outcomes
    one.pool.bytes[:] = 0x77
    proxy.frozen = False
    proxy.cut()
    time.sleep(0.5)
    assert (one.pool.bytes == 0x77).all(), "a late byte landed in memory that was given back"
    deadline = time.monotonic() + 60
    while one.served() != HITS:
        assert time.monotonic() < deadline, one.backend.stats()
        time.sleep(0.1)


def test_a_wrong_secret_fails_and_shows_nowhere(
    bucket: tuple[Callable[..., Tier], Proxy, Any, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    open_one, proxy, _, _ = bucket
    monkeypatch.setenv("MY_KEY", "an-id")
    monkeypatch.setenv("MY_SECRET", "hunter2-very-secret")
    proxy.close()
    one = open_one(access_key_env="MY_KEY", secret_key_env="MY_SECRET", timeout=1)
    assert set(one.store()) <= {Outcome.FAILED, Outcome.TIMEOUT}
    assert set(one.served()) <= {Outcome.FAILED, Outcome.TIMEOUT}
    shown = [repr(one.backend), repr(one.backend.options), str(dict(one.backend.stats())), caplog.text]
    assert all("hunter2" not in text for text in shown)

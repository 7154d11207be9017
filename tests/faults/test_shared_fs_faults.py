"""A share that hangs, lies, fills up or is not there, hosts that die on it: no exception, no wrong byte, no orphan."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hicache_ext.doctor import Level
from hicache_ext.doctor import share as doctor
from hicache_ext.doctor.disk import Mount
from hicache_ext.doctor.share import SharePlace
from storage_backends.base import Backend, Dispatcher, Outcome, Residency
from storage_backends.shared_fs import SharedFsBackend, cleaner
from storage_backends.shared_fs.directory import bucket_of
from storage_backends.shared_fs.segment import SegmentName
from tests import pages
from tests.fuse import Disk, fuse_disk
from tests.netns import Host
from tests.pages import HostPool, chain, key_batch, namespace
from tests.remote import Asking
from tests.worker import Worker

SPACE = namespace((65536, 65536))
SLOT = 65536 * 2 + 4096
KEYS = chain("a", 8)
HITS = [Outcome.HIT] * len(KEYS)
HOUR = 3600

Open = Callable[..., Backend]

asking = Asking(SPACE, KEYS, seconds=60, recovery=60, pause=0.02)
store, served, recovers = asking.store, asking.served, asking.recovers


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as all_of_it:
        yield all_of_it


@pytest.fixture
def tier(stack: ExitStack) -> Open:
    dispatcher = Dispatcher()
    stack.callback(dispatcher.close)

    def open_one(path: Path, **options: Any) -> Backend:
        values = {"path": path, "linger": 0.05, "refresh": 0.05, "threads": 4, **options}
        backend = SharedFsBackend(SharedFsBackend.Options.model_validate(values), dispatcher)
        SharedFsBackend.check(backend.options)
        stack.callback(backend.close)
        return backend

    return open_one


@pytest.fixture
def disk(tmp_path: Path, stack: ExitStack) -> Disk:
    return stack.enter_context(fuse_disk(tmp_path))


@contextlib.contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    """Skips where this user cannot mount. The last argument is the mount point."""
    tried = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount here: {tried.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", arguments[-1]], check=True)


@pytest.fixture
def small_share(tmp_path: Path, stack: ExitStack) -> Path:
    """24 MiB in memory, which says at any moment how much is used."""
    path = tmp_path / "small"
    path.mkdir()
    stack.enter_context(mounted("-t", "tmpfs", "-o", "size=24m", "hicache-test", str(path)))
    return path


def until(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def sees(backend: Backend, keys: list[bytes] = KEYS) -> None:
    until(lambda: bool(backend.lookup(key_batch(SPACE, keys)).all()), "pages of another host were not found")


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("v1/*/*/*.seg"))


def temporaries(path: Path) -> list[Path]:
    return sorted(path.glob("v1/*/*/*.tmp"))


def aged(file: Path, seconds: float) -> Path:
    """As if it had been written that long ago, and not used since."""
    then = time.time() - seconds
    os.utime(file, (then, then))
    place = file.parents[2] / bucket_of(int(then * 1e9)) / file.parent.name
    place.mkdir(parents=True, exist_ok=True)
    return file.rename(place / file.name)


# ---- several hosts


def test_batches_share_a_segment_and_another_host_reads_it(tier: Open, tmp_path: Path) -> None:
    writer, reader = tier(tmp_path / "share", linger=0.5), tier(tmp_path / "share")
    keys = chain("a", 24)
    for first in range(0, 24, 8):
        assert store(writer, keys[first : first + 8]) == HITS
    assert served(writer, keys) == [Outcome.HIT] * 24, "read by its writer before anybody else sees it"
    assert not segments(tmp_path / "share")
    sees(reader, keys)
    assert served(reader, keys) == [Outcome.HIT] * 24
    (file,) = segments(tmp_path / "share")
    assert SegmentName.parse(file.name) == SegmentName(bytes.fromhex(file.name[:32]), 24, 24 * SLOT + 4096)
    assert file.stat().st_size == 24 * SLOT + 4096
    assert not temporaries(tmp_path / "share")
    assert store(reader, keys) == [Outcome.HIT] * 24
    assert (reader.stats()["stored"], reader.stats()["present"]) == (0, 24), "what is known is not written again"


def test_two_that_do_not_know_of_each_other(tier: Open, tmp_path: Path) -> None:
    first, second = tier(tmp_path / "share"), tier(tmp_path / "share", refresh=3600)
    assert not second.lookup(key_batch(SPACE, KEYS)).any()  # its look comes before the page
    assert store(first) == HITS
    assert store(second) == HITS
    third = tier(tmp_path / "share")
    until(lambda: len(segments(tmp_path / "share")) == 2, "both stored them")
    sees(third)
    for backend in (first, second, third):
        assert served(backend) == HITS


def test_a_writer_dies_and_readers_go_on(
    tier: Open, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "_UPKEEP_SECONDS", 0.1)
    share = tmp_path / "share"
    reader = tier(share, capacity="1GiB")
    said = []
    for turn in range(2):
        writer = Worker(share, 0, engine="shared_fs")
        stack.callback(writer.stop)
        writer.tell("write_forever", chain=f"w{turn}")
        while len(segments(share)) <= 2 * turn:
            said.append(writer.answer())
        said += [writer.answer() for _ in range(3)]
        writer.process.kill()
        writer.process.wait()
    left = temporaries(share)
    assert left, "killed in the middle of a segment"
    seen = 0
    time.sleep(0.2)
    for name in said:
        reader.lookup(key_batch(SPACE, chain(name, 8)))
        seen += pages.served(reader, SPACE, chain(name, 8)).count(Outcome.HIT)
    assert seen, "what was finished is there"
    kept = aged(left[0], HOUR)  # a writer that lives, by a clock that is an hour late
    for orphan in left[1:]:
        aged(orphan, 3 * HOUR)
    until(lambda: temporaries(share) == [kept], "an orphan stayed, or somebody's segment did not")
    recovers(reader)


def test_a_host_dies_and_another_goes_on(tmp_path: Path, stack: ExitStack) -> None:
    """Two hosts without a network between them: all that they share is the file system."""
    share = tmp_path / "share"
    writing, reading = stack.enter_context(Host()), stack.enter_context(Host())
    writer = Worker(share, 0, engine="shared_fs", host=writing)
    stack.callback(writer.stop)
    reader = Worker(share, 0, engine="shared_fs", host=reading)
    stack.callback(reader.stop)
    writer.tell("write_forever", chain="w")
    said = []
    while len(segments(share)) < 2:
        said.append(writer.answer())
    until(lambda: all(reader.ask("found", chain=said[0], pages=8)), "not found")
    assert reader.ask("served", chain=said[0], pages=8) == ["HIT"] * 8
    writing.kill()
    writer.process.wait()
    outcomes = [outcome for name in said for outcome in reader.ask("served", chain=name, pages=8)]
    assert set(outcomes) <= {"HIT", "MISS"}
    assert reader.ask("served", chain=said[0], pages=8) == ["HIT"] * 8
    assert reader.ask("store", chain="own", pages=8) == ["HIT"] * 8
    assert reader.ask("served", chain="own", pages=8) == ["HIT"] * 8


def test_many_write_read_and_clean_at_once(tier: Open, tmp_path: Path, stack: ExitStack) -> None:
    """Three writers in processes of their own, one of them killed, and a reader; all with the same capacity."""
    share, capacity, segment = tmp_path / "share", 16 << 20, 2 << 20
    writers = [Worker(share, capacity, engine="shared_fs") for _ in range(3)]
    names: list[str] = []
    most = 0
    stop = threading.Event()

    def listen(writer: Worker) -> None:
        with contextlib.suppress(ValueError, OSError):
            names.extend(json.loads(line) for line in writer.process.stdout or ())

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            before = segments(share) + temporaries(share)
            with contextlib.suppress(FileNotFoundError):
                size = sum(file.stat().st_size for file in before)
                if before == segments(share) + temporaries(share):  # all of them there at the same time
                    most = max(most, size)

    threads = [threading.Thread(target=listen, args=(writer,)) for writer in writers]
    threads.append(threading.Thread(target=watch))
    for i, writer in enumerate(writers):
        stack.callback(writer.stop)
        writer.tell("write_forever", chain=f"w{i}")
    for thread in threads:
        thread.start()
    reader = tier(share, capacity=capacity)
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 4
    killed = False
    while time.monotonic() < deadline:
        for name in random.sample(names, min(4, len(names))) + names[-2:]:
            keys = chain(name, 8)
            reader.lookup(key_batch(SPACE, keys))
            outcomes += pages.served(reader, SPACE, keys)
        if not killed and len(names) > 60:
            writers[0].process.kill()
            killed = True
    for writer in writers:
        writer.stop()
    stop.set()
    for thread in threads:
        thread.join()
    assert killed
    assert len(names) * 8 * SLOT > 2 * capacity, "more was written than fits"
    assert Outcome.HIT in outcomes
    assert set(outcomes) <= {Outcome.HIT, Outcome.MISS}
    assert most <= capacity + 3 * segment, f"{most / (1 << 20)} MiB"
    assert most > capacity // 2
    for orphan in temporaries(share):
        aged(orphan, 3 * HOUR)
    assert store(reader) == HITS


def test_what_another_host_removed_is_a_miss_and_is_reported(tier: Open, tmp_path: Path) -> None:
    share = tmp_path / "share"
    writer, reader = tier(share), tier(share, refresh=3600)
    heard: list[tuple[Residency, int]] = []
    others: list[Residency] = []
    writer.on_residency(lambda change, _, keys, __: heard.append((change, len(keys) // 32)))
    reader.on_residency(lambda change, _, keys, __: others.append(change))
    assert store(writer) == HITS
    until(lambda: bool(segments(share)), "not published")
    sees(reader)
    for file in segments(share):
        file.unlink()
    assert served(reader) == [Outcome.MISS] * 8
    assert served(writer) == [Outcome.MISS] * 8
    assert not reader.lookup(key_batch(SPACE, KEYS)).any()
    until(lambda: (Residency.REMOVED, 8) in heard, "the writer did not say that they are gone")
    recovers(writer)
    until(lambda: sum(n for change, n in heard if change is Residency.STORED) == 16, "stored, and stored again")
    assert others == [], "other writers' pages are theirs to report"


# ---- what lies there is not what was written


@pytest.mark.parametrize("where", ["slot header", "payload", "index", "end cut", "index cut", "empty"])
def test_damage_is_a_miss_everywhere_and_healed_by_a_write(tier: Open, tmp_path: Path, where: str) -> None:
    share = tmp_path / "share"
    writer = tier(share)
    assert store(writer) == HITS
    until(lambda: bool(segments(share)), "not published")
    (file,) = segments(share)
    raw = bytearray(file.read_bytes())
    match where:
        case "slot header":
            raw[2 * SLOT + 40] ^= 1
        case "payload":
            raw[2 * SLOT + 4096 + 70000] ^= 0x10
        case "index":
            raw[8 * SLOT + 130] ^= 1
        case "end cut":
            del raw[5 * SLOT :]
        case "index cut":
            del raw[-4000:]
        case _:
            raw.clear()
    file.write_bytes(raw)
    second = tier(share)
    if where in ("slot header", "payload"):
        sees(second)
        outcomes = served(second)
        assert sorted(outcomes) == [*HITS[1:], Outcome.CORRUPT]
        assert second.lookup(key_batch(SPACE, KEYS)).tolist() == [outcome == Outcome.HIT for outcome in outcomes]
        assert second.stats()["corrupt"] == 1
    else:
        until(lambda: (second.lookup(key_batch(SPACE, KEYS)), second.stats()["damaged"] == 1)[1], "not given up")
        assert served(second) == [Outcome.MISS] * 8
    recovers(second)
    until(lambda: len(segments(share)) == 2, "the healing write is a segment of its own")
    third = tier(share)
    sees(third)
    assert served(third) == HITS, "the younger copy counts"
    recovers(writer)


def test_other_data_under_our_names(tier: Open, tmp_path: Path) -> None:
    share = tmp_path / "share"
    writer, other = tier(share), namespace((65536, 65536), model="model-b")
    assert store(writer) == HITS
    assert store(writer, chain("b", 8)) == HITS
    until(lambda: len(segments(share)) == 1, "not published")
    time.sleep(0.1)
    assert store(writer, chain("c", 8)) == HITS
    assert store(writer, KEYS, other) == HITS
    until(lambda: len(segments(share)) == 3, "not published")
    mine = sorted(share.glob(f"v1/*/{SPACE.digest.hex()}/*.seg"), key=lambda file: file.stat().st_size)
    (theirs,) = share.glob(f"v1/*/{other.digest.hex()}/*.seg")
    small, large = mine
    slots = large.read_bytes()
    large.write_bytes(slots[8 * SLOT : 16 * SLOT] + slots[: 8 * SLOT] + slots[16 * SLOT :])  # good pages, exchanged
    small.write_bytes(theirs.read_bytes())  # whole, and another namespace's
    (large.parent / f"{'0' * 32}-3-{1 << 20}.seg").write_bytes(os.urandom(1 << 20))
    (large.parent / "notes.txt").write_text("somebody's")
    (share / "v1" / "99999999T9999").mkdir()
    reader = tier(share)
    sees(reader, KEYS)
    assert served(reader, KEYS + chain("b", 8)) == [Outcome.CORRUPT] * 16
    assert Outcome.HIT not in served(reader, chain("c", 8))
    until(lambda: (reader.lookup(key_batch(SPACE, KEYS)), reader.stats()["damaged"] == 2)[1], "not given up")
    recovers(reader)
    assert (large.parent / "notes.txt").exists()


# ---- a share that is not there, full, read-only


def test_absent_at_the_start_and_removed_later(tier: Open, tmp_path: Path) -> None:
    share = tmp_path / "mount" / "share"
    backend = tier(share)
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    assert set(store(backend)) <= {Outcome.FAILED, Outcome.REJECTED}
    assert served(backend) == [Outcome.MISS] * 8
    assert "No such file" in backend.stats()["state"]
    assert not (tmp_path / "mount").exists(), "nothing is made above the path"
    (tmp_path / "mount").mkdir()
    recovers(backend)
    shutil.rmtree(share)
    assert set(served(backend)) <= {Outcome.HIT, Outcome.MISS}
    until(lambda: not backend.lookup(key_batch(SPACE, chain("x", 1) + KEYS)).any(), "still claimed")
    assert served(backend) == [Outcome.MISS] * 8
    recovers(backend)


def test_what_is_said_of_a_share_beforehand(tmp_path: Path, stack: ExitStack) -> None:
    place = SharePlace("share", tmp_path / "mnt" / "hicache", tmp_path / "mnt", 1 << 20)
    (missing,) = doctor.probe(place)
    assert missing.level is Level.ERROR
    assert "nothing is mounted" in missing.text
    (tmp_path / "mnt").mkdir()
    stack.enter_context(mounted("-t", "tmpfs", "-o", "size=8m", "hicache-test", str(tmp_path / "mnt")))
    levels = {finding.name.partition(": ")[2]: finding.level for finding in doctor.probe(place)}
    assert (levels["path"], levels["space"], levels["clock"]) == (Level.OK, Level.OK, Level.OK)
    assert levels["share"] is Level.WARNING, "memory of this machine is no share"
    large = SharePlace("share", tmp_path / "mnt" / "hicache", None, 1 << 40)
    assert Level.ERROR in {finding.level for finding in doctor.probe(large)}
    nfs = Mount("/mnt/kv", "nfs4", "server:/kv", "rw,vers=4.2,hard,nconnect=8")
    place = SharePlace("share", Path("/mnt/kv/hicache"), Path("/mnt/kv"), 1 << 40)
    assert doctor.kind(place, nfs).level is Level.OK
    for options, fix in (("rw,soft", "hard"), ("rw,hard,noac", "noac")):
        found = doctor.kind(place, Mount("/mnt/kv", "nfs4", "server:/kv", options))
        assert (found.level, fix in found.fix) == (Level.WARNING, True)
    assert os.listdir(tmp_path / "mnt") == [], "a look changes nothing"


def test_nothing_is_written_below_a_mount_point_without_its_mount(tier: Open, tmp_path: Path, stack: ExitStack) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    backend = tier(point / "share", mount=point)
    assert set(store(backend)) <= {Outcome.FAILED, Outcome.REJECTED}
    assert "nothing is mounted" in backend.stats()["state"]
    assert os.listdir(point) == []
    stack.enter_context(mounted("-t", "tmpfs", "hicache-test", str(point)))
    recovers(backend)


def test_a_share_that_is_full(tier: Open, small_share: Path) -> None:
    backend = tier(small_share / "s", linger=30)
    outcomes: list[Outcome] = []
    kept = []
    for turn in range(40):
        keys = chain(f"fill{turn}", 8)
        outcomes += (said := store(backend, keys))
        kept += [key for key, outcome in zip(keys, said, strict=True) if outcome == Outcome.HIT]
    assert set(outcomes) == {Outcome.HIT, Outcome.REJECTED}
    assert backend.stats()["state"] == "disk full"
    until(lambda: not temporaries(small_share / "s"), "an unfinished segment stayed")
    last = served(backend, kept)
    assert set(last) <= {Outcome.HIT, Outcome.MISS}
    assert last.count(Outcome.MISS) <= 2, "the last page makes room for the index"
    assert len(kept) > 100
    for file in segments(small_share / "s"):
        file.unlink()
    recovers(backend)


def test_a_share_that_is_read_only(tier: Open, tmp_path: Path, stack: ExitStack) -> None:
    share, seen = tmp_path / "share", tmp_path / "seen"
    writer = tier(share)
    assert store(writer) == HITS
    until(lambda: bool(segments(share)), "not published")
    seen.mkdir()
    stack.enter_context(mounted("-o", "bind,ro", str(share), str(seen)))
    if os.access(seen, os.W_OK):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(seen)], check=True)
    reader = tier(seen, capacity="64MiB")
    sees(reader)
    assert served(reader) == HITS
    assert store(reader, chain("b", 8)) == [Outcome.REJECTED] * 8
    assert "read-only" in reader.stats()["state"]
    assert served(reader) == HITS
    reader.remove(key_batch(SPACE, KEYS[:1]))
    assert served(reader) == [Outcome.MISS, *HITS[1:]]
    assert served(writer) == HITS


# ---- age, and clocks


def test_age_counts_from_the_last_use_and_by_the_share_s_clock(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "_UPKEEP_SECONDS", 0.1)
    share = tmp_path / "share"
    with monkeypatch.context() as patch:
        ahead = time.time_ns() + HOUR * 10**9
        patch.setattr("time.time_ns", lambda: ahead)
        writer = tier(share)
        assert store(writer) == HITS
    until(lambda: len(segments(share)) == 1, "not published")
    (file,) = segments(share)
    born = file.parent.parent.name
    assert abs(time.mktime(time.strptime(born + "UTC", "%Y%m%dT%H%M%Z")) - time.timezone - time.time()) < 1800
    names = {}
    for name, age in (("unused", 3 * HOUR), ("ahead", -HOUR), ("behind", HOUR)):
        assert store(writer, chain(name, 2)) == HITS[:2]
        until(lambda: len(set(segments(share)) - {file, *names.values()}) == 1, "not published")
        (made,) = set(segments(share)) - {file, *names.values()}
        names[name] = aged(made, age)
    reader = tier(share, ttl=2 * HOUR)
    until(lambda: not names["unused"].exists(), "too old, and still there")
    time.sleep(0.3)
    assert set(segments(share)) == {file, names["ahead"], names["behind"]}
    sees(reader, chain("behind", 2))
    assert served(reader, chain("behind", 2)) == HITS[:2]
    until(lambda: time.time() - names["behind"].stat().st_mtime < 60, "reading did not mark it as used")
    until(lambda: served(writer, chain("unused", 2)) == [Outcome.MISS] * 2, "gone for its writer as well")


# ---- errors, delays and wrong answers from below


def plan(disk: Disk, **rules: list[dict[str, Any]]) -> None:
    disk.plan.with_suffix(".new").write_text(json.dumps({"seed": 1, **rules}))
    disk.plan.with_suffix(".new").rename(disk.plan)


def test_errors_of_the_share_cost_pages_and_nothing_else(tier: Open, disk: Disk) -> None:
    backend = tier(disk.path / "s")
    recovers(backend)
    plan(disk, read=[{"fault": "errno", "errno": "EIO"}])
    assert served(backend) == [Outcome.FAILED] * 8
    plan(disk, write=[{"fault": "errno", "errno": "EIO", "probability": 0.3}])
    seen = set()
    for turn in range(10):
        seen |= set(store(backend, chain(f"e{turn}", 8)))
        time.sleep(0.1)
    assert seen <= {Outcome.HIT, Outcome.FAILED, Outcome.REJECTED}
    assert seen >= {Outcome.HIT, Outcome.FAILED}
    plan(disk, read=[{"fault": "errno", "errno": "ESTALE"}])
    assert served(backend) == [Outcome.MISS] * 8
    plan(disk, write=[{"fault": "errno", "errno": "ENOSPC"}])
    assert store(backend, chain("f", 8)) == [Outcome.REJECTED] * 8
    plan(disk)
    recovers(backend)


def test_one_answer_in_ten_is_wrong(tier: Open, disk: Disk) -> None:
    writer = tier(disk.path / "s")
    assert store(writer) == HITS
    plan(disk, read=[{"fault": "flip", "probability": 0.1}], write=[{"fault": "torn", "probability": 0.1}])
    reader = tier(disk.path / "s")
    seen: set[Outcome] = set()
    for turn in range(12):
        for backend in (writer, reader):
            backend.lookup(key_batch(SPACE, KEYS))
            seen |= set(served(backend)) | set(store(backend, KEYS + chain(f"t{turn}", 4)))
    assert Outcome.CORRUPT in seen
    assert seen <= {Outcome.HIT, Outcome.MISS, Outcome.CORRUPT, Outcome.REJECTED, Outcome.FAILED}
    plan(disk)
    recovers(writer)
    recovers(reader)


def test_answers_that_take_five_seconds(tier: Open, disk: Disk) -> None:
    backend = tier(disk.path / "s", timeout=1)
    recovers(backend)
    plan(disk, read=[{"fault": "delay", "seconds": 5}])
    pool = HostPool(SPACE, 8)
    began = time.monotonic()
    reading = backend.read(pool.batch(KEYS))
    until(lambda: backend.stats()["state"] == "does not answer", "nobody noticed")
    assert served(backend) == [Outcome.FAILED] * 8, "refused at once"
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    assert time.monotonic() - began < 4
    assert set(reading.result(30)) <= {Outcome.HIT, Outcome.TIMEOUT}
    assert Outcome.HIT in reading.result(0), "the one that had begun is given, not recalled"
    plan(disk)
    recovers(backend)


def test_a_share_that_hangs_and_comes_back(tier: Open, disk: Disk) -> None:
    backend, closing = tier(disk.path / "s", timeout=0.5, threads=2), tier(disk.path / "s", timeout=0.5)
    recovers(backend)
    sees(closing)
    disk.hang()
    try:
        pool, more = HostPool(SPACE, 8), HostPool(SPACE, 4)
        pool.poison()
        begun = [backend.read(pool.batch(KEYS)), backend.write(more.write_batch(chain("h", 4)))]
        also = closing.read(HostPool(SPACE, 8).batch(KEYS))
        until(lambda: backend.stats()["state"] == "does not answer", "nobody noticed")
        began = time.monotonic()
        assert served(backend) == [Outcome.FAILED] * 8
        assert store(backend, chain("g", 4)) == [Outcome.FAILED] * 4
        assert not backend.lookup(key_batch(SPACE, KEYS)).any()
        assert backend.remove(key_batch(SPACE, KEYS[:1])) == 1
        assert time.monotonic() - began < 3
        began = time.monotonic()
        closing.close()
        assert time.monotonic() - began < 8
    finally:
        disk.go_on()
    for completion in (*begun, also):
        assert set(completion.result(30)) <= {Outcome.HIT, Outcome.TIMEOUT, Outcome.FAILED}
    recovers(backend)

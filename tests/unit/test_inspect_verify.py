"""`inspect` and `verify`: what they say of a directory, that they change nothing, and that garbage gets a line."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hicache_ext.cli.main import app
from hicache_ext.page import NO_PARENT
from storage_backends.base import Dispatcher, Outcome
from storage_backends.format import BLOCK, ExtentHeader, SlotHeader
from storage_backends.local import LocalBackend
from storage_backends.local.files import try_lock
from storage_backends.local.folder import LOCK
from storage_backends.local.residency import Kind, LogReader, LogWriter, Record
from storage_backends.local.scrub import Pace, Scrub, SlotVerdict
from storage_backends.local.survey import Chains, NotATier, Trouble, chains, summarise, survey
from storage_backends.local.use import Told, write_use
from tests.pages import HostPool, chain, key_batch, namespace

MIB = 1 << 20
LENGTHS = (131072, 131072)
SPACE = namespace(LENGTHS)


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    made = Dispatcher()
    yield made
    made.close()


def open_tier(path: Path, dispatcher: Dispatcher, capacity: int = 64 * MIB) -> LocalBackend:
    values = {"path": path, "capacity": capacity, "engine": "threads"}
    return LocalBackend(LocalBackend.Options.model_validate(values), dispatcher)


def store(tier: LocalBackend, space: Any, keys: list[bytes], parent: bytes | None = None) -> None:
    outcomes = tier.write(HostPool(space, len(keys)).write_batch(keys, parent)).result(30)
    assert set(outcomes) == {Outcome.HIT}


@pytest.fixture
def filled(tmp_path: Path, dispatcher: Dispatcher) -> Path:
    """A closed tier: chains of 20 and 5 pages of one namespace, 4 of another with a secret salt."""
    path = tmp_path / "tier"
    tier = open_tier(path, dispatcher)
    store(tier, SPACE, chain("a", 20))
    store(tier, SPACE, chain("b", 5))
    store(tier, namespace((65536, 65536), salt="secret"), chain("c", 4))
    tier.close()
    return path


def command(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def as_json(*args: object) -> Any:
    return json.loads(command(*args, "--json").stdout)


def state(path: Path) -> dict[str, tuple[int, int, int, str]]:
    """Everything that a reader could have changed: inode, size, mtime, content."""
    return {
        str(file): (
            (status := file.stat()).st_ino,
            status.st_size,
            status.st_mtime_ns,
            hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "",
        )
        for file in [path, *sorted(path.rglob("*"))]
    }


def extents(path: Path) -> list[Path]:
    return sorted(path.glob("w*/e*.ext"))


def slot_at(file: Path, key: bytes) -> int:
    """Offset of the slot that holds `key`."""
    data = file.read_bytes()
    header = ExtentHeader.decode(data[:BLOCK])
    for slot in range(header.slots):
        at = header.slot_offset(slot)
        if data[at + 32 : at + 64] == key:
            return at
    raise AssertionError("not there")


def flip(file: Path, at: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 0x40]))


# --- inspect


def test_inspect_shows_what_a_living_writer_says_of_its_use(filled: Path) -> None:
    folder = filled / "w0"
    write_use(folder, Told(1, 3 * MIB, 2 * MIB, MIB, 0, True))
    os.rename(extents(filled)[-1], folder / "e0000000009.gone")
    assert as_json("inspect", filled)["folders"][0]["use"] is None, "the writer is gone, so its word is too"
    lock = try_lock(folder / LOCK)
    assert lock is not None
    try:
        (told,) = as_json("inspect", filled)["folders"]
        assert told["use"] == {
            "time_ns": 1, "hit": 3 * MIB, "stored": 2 * MIB, "held": MIB, "pinned": 0, "wants_more": True
        }  # fmt: skip
        assert told["retired_bytes"] > 0
        assert "3.0 MiB" in command("inspect", filled).stdout
        assert survey(filled).problems == []
        flip(folder / "use", 30)
        assert [problem.kind for problem in survey(filled).problems] == [Trouble.DAMAGED]
    finally:
        os.close(lock)


def test_inspect_counts_what_was_stored(filled: Path) -> None:
    told = as_json("inspect", filled)
    large, small = told["namespaces"]
    assert large["namespace"] == SPACE.digest.hex()
    assert (large["pages"], large["payload_bytes"], large["slot_bytes"]) == (25, 262144, 262144 + BLOCK)
    assert large["overhead"] == pytest.approx(BLOCK / 262144)
    assert large["chains"] == {"chains": 2, "longest": 20, "median": 12.5, "usable_pages": 25, "orphaned_pages": 0}
    assert 0 <= large["age_s"]["newest"] <= large["age_s"]["median"] <= large["age_s"]["oldest"] < 300
    assert (small["pages"], small["chains"]["longest"]) == (4, 4)
    assert [(f["name"], f["live"], f["pages"], f["pages_lost"]) for f in told["folders"]] == [("w0", False, 29, 0)]
    assert told["problems"] == []


def test_inspect_shows_the_description_and_no_secret(filled: Path) -> None:
    told = as_json("inspect", filled)
    description = told["namespaces"][1]["description"]
    assert description["layout"]["buffer_lengths"] == [65536, 65536]
    assert description["shard"]["tp_size"] == 1
    text = command("inspect", filled).stdout
    for part in ("namespace " + SPACE.digest.hex(), "bfloat16", "tp 0 of 1", "longest 20 pages", "w0", "none"):
        assert part in text
    assert "secret" not in text + json.dumps(told)


def test_inspect_tells_a_living_writer_and_does_not_disturb_it(tmp_path: Path, dispatcher: Dispatcher) -> None:
    path = tmp_path / "tier"
    tier = open_tier(path, dispatcher)
    store(tier, SPACE, chain("a", 10))
    try:
        time.sleep(0.3)  # the writer's own maintenance has looked at the directory
        before = state(path)
        assert as_json("inspect", path)["folders"][0]["live"] is True
        assert "alive" in command("inspect", path).stdout
        assert command("verify", path).exit_code == 0
        assert state(path) == before
        store(tier, SPACE, chain("b", 10))
        pool = HostPool(SPACE, 10)
        assert set(tier.read(pool.batch(chain("a", 10))).result(30)) == {Outcome.HIT}
        assert as_json("inspect", path)["namespaces"][0]["pages"] == 20
    finally:
        tier.close()
    assert as_json("inspect", path)["folders"][0]["live"] is False


def test_both_leave_every_byte_and_time_as_it_was(filled: Path) -> None:
    (filled / "w0" / "e0000000077.ext").write_bytes(b"garbage" * 1000)
    before = state(filled)
    command("inspect", filled)
    command("verify", filled)
    assert state(filled) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_both_work_for_a_user_who_may_only_read(filled: Path) -> None:
    """In a process of the user nobody, which could open no file of the directory for writing."""
    place = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(filled, place / "tier")
        for file in [place, *place.rglob("*")]:
            file.chmod(0o755 if file.is_dir() else 0o644)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                valid = Scrub(place / "tier").run().counts[SlotVerdict.VALID]
                code = 0 if len(survey(place / "tier").folders) == 1 and valid == 29 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([], Chains()),
        ([("a", ""), ("b", "a"), ("c", "b"), ("d", "b")], Chains(2, 3, 3, 4, 0)),  # a fork: two chains
        ([("b", "a"), ("c", "b")], Chains(0, 0, 0, 0, 2)),  # the head is gone
        ([("a", ""), ("c", "b")], Chains(1, 1, 1, 1, 1)),
        ([("a", "b"), ("b", "a"), ("c", "a")], Chains(0, 0, 0, 0, 3)),  # a ring, which nobody should write
        ([("a", "a")], Chains(0, 0, 0, 0, 1)),
    ],
)
def test_chains(pages: list[tuple[str, str]], expected: Chains) -> None:
    packed = [(key.encode() * 32, parent.encode() * 32 or NO_PARENT) for key, parent in pages]
    assert chains(packed) == expected
    assert chains(reversed(packed)) == expected


def test_chains_are_linear_in_the_pages() -> None:
    keys = [i.to_bytes(32, "little") for i in range(1, 100_001)]
    start = time.monotonic()
    assert chains(zip(keys, [NO_PARENT, *keys], strict=False)).longest == 100_000
    assert time.monotonic() - start < 5


def test_a_clock_that_went_back_gives_no_negative_age(filled: Path) -> None:
    assert summarise(survey(filled), now=0.0)[0].oldest == 0.0


# --- verify


def test_verify_finds_every_page_whole(filled: Path) -> None:
    told = as_json("verify", filled)
    assert told["clean"] is True
    assert told["slots"]["valid"] == told["named"] == 29
    assert told["slots"]["damaged"] == told["slots"]["foreign"] == told["slots"]["changing"] == 0
    assert sum(told["slots"].values()) == as_json("inspect", filled)["folders"][0]["slots"]
    assert command("verify", filled).exit_code == 0


@pytest.mark.parametrize("where", [9, 33, 200, BLOCK, BLOCK + 70000, BLOCK + 131072, BLOCK + 262143])
def test_verify_names_the_damaged_slot(filled: Path, where: int) -> None:
    """A byte of the version, the key, a length, and of the payload's first, later and last chunks."""
    key = chain("a", 20)[7]
    file = next(f for f in extents(filled) if key in f.read_bytes())
    at = slot_at(file, key)
    flip(file, at + where)
    done = command("verify", filled, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert [(d["file"], d["offset"], d["key"], d["named"]) for d in told["damaged"]] == [
        (str(file), at, key.hex(), True)
    ]
    text = command("verify", filled).stdout
    assert f"offset {at}" in text
    assert key.hex() in text


def test_verify_finds_pages_and_damage_that_no_log_names(filled: Path) -> None:
    (filled / "w0" / "residency.log").unlink()
    told = as_json("verify", filled)
    assert (told["slots"]["valid"], told["named"], told["clean"]) == (29, 0, True)
    key = chain("b", 5)[2]
    file = next(f for f in extents(filled) if key in f.read_bytes())
    flip(file, slot_at(file, key) + BLOCK + 5)
    done = command("verify", filled, "--json")
    (damage,) = json.loads(done.stdout)["damaged"]
    assert (damage["key"], damage["named"], done.exit_code) == (key.hex(), False, 1)


def test_a_page_that_never_reached_the_disk_is_damage(filled: Path) -> None:
    key = chain("a", 20)[0]
    file = next(f for f in extents(filled) if key in f.read_bytes())
    at = slot_at(file, key)
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(bytes(BLOCK))
    (damage,) = as_json("verify", filled)["damaged"]
    assert damage["reason"] == "never reached the disk, or erased"


def test_a_page_of_another_place_is_foreign(filled: Path) -> None:
    """A whole slot copied over another: its checksums hold, and it is not what the log names there."""
    keys = chain("a", 20)
    file = next(f for f in extents(filled) if keys[3] in f.read_bytes() and keys[4] in f.read_bytes())
    slot_bytes = ExtentHeader.decode(file.read_bytes()[:BLOCK]).slot_bytes
    source, target = slot_at(file, keys[3]), slot_at(file, keys[4])
    data = bytearray(file.read_bytes())
    data[target : target + slot_bytes] = data[source : source + slot_bytes]
    file.write_bytes(data)
    told = as_json("verify", filled)
    assert (told["slots"]["foreign"], told["slots"]["damaged"], told["clean"]) == (1, 0, True)


def test_a_removed_page_is_no_damage(filled: Path, dispatcher: Dispatcher) -> None:
    key = chain("a", 20)[19]
    file = next(f for f in extents(filled) if key in f.read_bytes())
    at = slot_at(file, key)
    flip(file, at + BLOCK + 5)
    tier = open_tier(filled, dispatcher)
    store(tier, SPACE, chain("d", 1))  # takes the folder: only its writer removes a page for good
    assert tier.remove(key_batch(SPACE, [key])) == 1
    tier.close()
    assert command("verify", filled).exit_code == 0


def test_the_limit_is_kept(filled: Path) -> None:
    fast = as_json("verify", filled, "--limit", "none")
    rate = fast["bytes_read"] / 1.5
    start = time.monotonic()
    report = Scrub(filled, rate).run()
    assert report.bytes_read == fast["bytes_read"]
    assert 1.2 < time.monotonic() - start < 6


def test_pace_does_not_make_up_for_a_long_stop() -> None:
    pace = Pace(1e6)
    pace.spend(50_000)
    time.sleep(1.0)
    start = time.monotonic()
    for _ in range(10):
        pace.spend(50_000)
    assert time.monotonic() - start > 0.35


@pytest.mark.parametrize("limit", ["fast", "-5", "200MX/s", ""])
def test_a_wrong_limit_is_a_usage_error(filled: Path, limit: str) -> None:
    done = command("verify", filled, "--limit", limit)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_progress_reaches_the_end(filled: Path) -> None:
    seen = []
    report = Scrub(filled, on_progress=seen.append).run()
    assert seen[-1].slots == seen[-1].total == sum(report.counts.values())


# --- beside a living writer


def test_verify_beside_a_writer_that_evicts_all_the_time(tmp_path: Path, dispatcher: Dispatcher) -> None:
    """Slots are rewritten under the scrub: none of it is damage."""
    path = tmp_path / "tier"
    tier = open_tier(path, dispatcher, capacity=16 * MIB)
    stop = threading.Event()
    turns = [0]

    def churn() -> None:
        pool = HostPool(SPACE, 8)
        while not stop.is_set():
            tier.write(pool.write_batch(chain(f"t{turns[0]}", 8))).result(30)
            turns[0] += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        while turns[0] < 20:
            time.sleep(0.01)
        for _ in range(6):
            report = Scrub(path, pause=0.2).run()
            assert report.damaged == []
            assert report.clean, report.problems
            assert report.counts[SlotVerdict.VALID] > 0
    finally:
        stop.set()
        thread.join()
        tier.close()


def test_real_damage_beside_a_living_writer_is_found(tmp_path: Path, dispatcher: Dispatcher) -> None:
    path = tmp_path / "tier"
    tier = open_tier(path, dispatcher)
    keys = chain("a", 10)
    store(tier, SPACE, keys)
    file = next(f for f in extents(path) if keys[5] in f.read_bytes())
    flip(file, slot_at(file, keys[5]) + BLOCK + 1)
    try:
        report = Scrub(path, pause=0.1).run()
    finally:
        tier.close()
    assert [damage.key for damage in report.damaged] == [keys[5]]


def test_a_slot_rewritten_between_the_looks_is_not_damage(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look meets a half-written slot, the second what its writer made of it."""
    key = chain("a", 20)[2]
    file = next(f for f in extents(filled) if key in f.read_bytes())
    at = slot_at(file, key)
    flip(file, at + BLOCK + 1)

    def heal(_: float) -> None:
        flip(file, at + BLOCK + 1)

    monkeypatch.setattr("storage_backends.local.scrub.is_locked", lambda path: True)
    monkeypatch.setattr("storage_backends.local.scrub.time.sleep", heal)
    assert Scrub(filled).run().damaged == []


def test_a_page_removed_between_the_looks_is_not_damage(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled / "w0" / "residency.log"
    reader = LogReader(log)
    record = next(r for r in reader.read() if r.key == chain("a", 20)[2])
    reader.close()
    file = next(f for f in extents(filled) if record.key in f.read_bytes())
    flip(file, slot_at(file, record.key) + BLOCK + 1)

    def remove(_: float) -> None:
        writer = LogWriter(log)
        writer.append([record._replace(kind=Kind.REMOVED)])
        writer.close()

    monkeypatch.setattr("storage_backends.local.scrub.is_locked", lambda path: True)
    monkeypatch.setattr("storage_backends.local.scrub.time.sleep", remove)
    report = Scrub(filled).run()
    assert report.damaged == []
    assert report.counts[SlotVerdict.CHANGING] == 1


def test_the_page_cache_is_left_alone(filled: Path) -> None:
    """The scrub reads past it: what was not cached before is not cached after."""
    if as_json("inspect", filled)["folders"][0]["bytes"] == 0 or not _direct_io(filled):
        pytest.skip("a file system without O_DIRECT")
    file = extents(filled)[0]
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert command("verify", filled).exit_code == 0
    # The extent's header is read through the cache, with what the kernel reads ahead of it.
    assert _cached_bytes(file) <= 1 * MIB < file.stat().st_size


def _direct_io(path: Path) -> bool:
    try:
        os.close(os.open(extents(path)[0], os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _cached_bytes(file: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        pages = -(-len(mapped) // 4096)
        vector = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p(ctypes.addressof(anchor := ctypes.c_char.from_buffer(mapped)))
        assert libc.mincore(address, ctypes.c_size_t(len(mapped)), vector) == 0
        del anchor
        return 4096 * sum(byte & 1 for byte in vector)


# --- garbage


def test_no_tier_is_a_clear_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, Path("/dev/null")):
        for name in ("inspect", "verify"):
            done = command(name, path)
            assert done.exit_code == 2
            assert str(path) in done.output
            assert "Fix:" in done.output
            assert "Traceback" not in done.output


def test_an_unknown_format_is_a_clear_line(filled: Path) -> None:
    (filled / "FORMAT").write_text("hicache-ext local tier, format 9\n")
    for name in ("inspect", "verify"):
        done = command(name, filled)
        assert done.exit_code == 2
        assert "format 9" in done.output
        assert "reads format 1" in done.output


def _garble(path: Path) -> dict[str, Trouble]:
    """Every kind of garbage at once; what each file should be called."""
    folder = path / "w0"
    extent = ExtentHeader(1, 2 * BLOCK, 9 * BLOCK, 4, 50, bytes(16), 1)
    future = bytearray(extent.encode())
    future[8] = 7
    (folder / "e0000000050.ext").write_bytes(future)
    (folder / "e0000000051.ext").write_bytes(extent.encode())  # says that it is 50
    (folder / "e0000000052.ext").write_bytes(os.urandom(10 * BLOCK))
    (folder / "e0000000053.ext").write_bytes(b"")
    (folder / "e0000000054.ext").write_bytes(bytes(100 * BLOCK))
    (folder / "e0000000055.ext").write_bytes(b"short")
    (folder / "e00000000056.ext").mkdir()
    os.mkfifo(folder / "e0000000057.ext")
    (folder / "e58.ext").write_bytes(extent.encode())
    (path / "w\N{SUPERSCRIPT TWO}").mkdir()
    (path / "w007").mkdir()
    (folder / "notes.txt").write_text("mine")
    (path / "lost+found").mkdir()
    (path / "w7").write_text("a file with a folder's name")
    (path / "w8").mkdir()
    (path / "w8" / "residency.log").write_bytes(os.urandom(1000))
    (path / "w9").mkdir()
    (path / "w9" / "residency.log").write_bytes(b"HICRLOG1" + (7).to_bytes(4, "little") + bytes(500))
    return {
        "e0000000050.ext": Trouble.UNKNOWN_VERSION,
        "e0000000051.ext": Trouble.DAMAGED,
        "e0000000052.ext": Trouble.DAMAGED,
        "e0000000053.ext": Trouble.UNFINISHED,
        "e0000000054.ext": Trouble.UNFINISHED,
        "e0000000055.ext": Trouble.DAMAGED,
        "e00000000056.ext": Trouble.NOT_OURS,
        "e0000000057.ext": Trouble.NOT_OURS,
        "e58.ext": Trouble.NOT_OURS,
        "notes.txt": Trouble.NOT_OURS,
        "w\N{SUPERSCRIPT TWO}": Trouble.NOT_OURS,
        "w007": Trouble.NOT_OURS,
        "lost+found": Trouble.NOT_OURS,
        "w7": Trouble.NOT_OURS,
        "w8": Trouble.DAMAGED,
        "w9": Trouble.UNKNOWN_VERSION,
    }


def test_garbage_gets_a_line_each_and_the_rest_is_read(filled: Path) -> None:
    expected = _garble(filled)
    told = as_json("inspect", filled)
    named = {problem["path"].removesuffix("/residency.log"): problem["kind"] for problem in told["problems"]}
    assert {Path(path).name: kind for path, kind in named.items()} == expected
    assert told["namespaces"][0]["pages"] == 25
    done = command("verify", filled, "--json")
    report = json.loads(done.stdout)
    assert (report["slots"]["valid"], report["slots"]["damaged"]) == (29, 0)
    assert (done.exit_code, report["clean"]) == (1, False)
    text = command("verify", filled).stdout
    assert all(name in text for name in expected)


def test_a_truncated_extent_loses_only_what_was_cut(filled: Path) -> None:
    keys = chain("a", 20)
    file = next(f for f in extents(filled) if keys[9] in f.read_bytes())
    at = slot_at(file, keys[9])
    after = [key for key in keys if key in file.read_bytes() and slot_at(file, key) > at]
    os.truncate(file, at + 10_000)
    told = as_json("verify", filled)
    damaged = {damage["key"]: damage["reason"] for damage in told["damaged"]}
    assert set(damaged) >= {key.hex() for key in [keys[9], *after]}
    assert damaged[keys[9].hex()] == "cut off by the end of the file"
    assert told["slots"]["valid"] + told["slots"]["damaged"] == 29
    assert [problem["kind"] for problem in told["problems"]] == ["truncated"]


def test_a_sealed_extent_header_with_wild_numbers_is_survived(filled: Path) -> None:
    """Right checksum, absurd contents: four thousand million slots of a file that has none."""
    slots = (1 << 32) - 1
    huge = ExtentHeader(1, 2 * BLOCK, BLOCK + slots * 2 * BLOCK, slots, 60, b"n" * 16, 1, b"[" * 4000)
    wide = ExtentHeader(1, 1 << 40, BLOCK + (1 << 40), 1, 61, b"o" * 16, 1, b'{"layout": 3}')
    for header in (huge, wide):
        (filled / "w0" / f"e{header.number:010d}.ext").write_bytes(header.encode())
    told = as_json("verify", filled)
    assert told["slots"]["valid"] == 29
    assert command("inspect", filled).exit_code == 0


def test_a_sealed_slot_header_with_wild_lengths_is_damage(filled: Path) -> None:
    file = extents(filled)[0]
    extent = ExtentHeader.decode(file.read_bytes()[:BLOCK])
    wild = SlotHeader(
        extent.namespace, b"k" * 32, NO_PARENT, 1 << 62, 1, (extent.slot_bytes,), np.zeros(5, np.uint32)
    )  # fmt: skip
    raw = bytearray(BLOCK)
    wild.encode_into(memoryview(raw))
    (filled / "w0" / "residency.log").unlink()
    with open(file, "r+b") as opened:
        opened.seek(extent.slot_offset(0))
        opened.write(raw)
    (damage,) = as_json("verify", filled)["damaged"]
    assert damage["reason"] == "larger than its slot"


def test_pages_of_a_deleted_extent_are_lost_not_damaged(filled: Path) -> None:
    gone = next(f for f in extents(filled) if chain("c", 4)[0] in f.read_bytes())
    gone.unlink()
    told = as_json("inspect", filled)
    assert told["folders"][0]["pages_lost"] == 4
    assert command("verify", filled).exit_code == 0


def test_two_records_for_one_page_count_once(filled: Path) -> None:
    """A page stored anew elsewhere in the folder leaves its old place without a record of its own."""
    log = filled / "w0" / "residency.log"
    reader = LogReader(log)
    record = next(r for r in reader.read() if r.key == chain("a", 20)[2])
    reader.close()
    writer = LogWriter(log)
    writer.append([record._replace(slot=record.slot + 1), Record(Kind.REMOVED, 99, 99)])
    writer.close()
    assert sum(len(slots) for slots in survey(filled).folders[0].pages.values()) in (28, 29)


def test_unreadable_for_this_user_is_a_clear_line(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("storage_backends.local.survey.os.listdir", refuse)
    with pytest.raises(NotATier, match=r"Permission denied.*Fix"):
        survey(filled)


def test_the_tier_itself_works_beside_garbage(
    filled: Path, dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """What inspect only names must not keep the tier from reading and writing, nor fill its log."""
    for kind in _garble(filled):
        if kind == "w9":  # of another version: that is refused, by design
            shutil.rmtree(filled / "w9")
    for name in ("e0000000050.ext", "e0000000057.ext", "e00000000056.ext"):
        path = filled / "w0" / name
        path.rmdir() if path.is_dir() else path.unlink()
    tier = open_tier(filled, dispatcher)
    try:
        store(tier, SPACE, chain("new", 3))
        time.sleep(1)
        pool = HostPool(SPACE, 20)
        assert set(tier.read(pool.batch(chain("a", 20))).result(30)) == {Outcome.HIT}
    finally:
        tier.close()
    assert sum("not a residency log" in record.message for record in caplog.records) == 1


def test_a_log_without_records_is_news(filled: Path) -> None:
    """A reader forgets what an emptied folder had."""
    from storage_backends.direct_io import probe_direct
    from storage_backends.local.extents import ExtentFiles
    from storage_backends.local.folder import Folder
    from storage_backends.local.index import Index

    folder, index = Folder(filled / "w0", ExtentFiles(probe_direct(filled))), Index()
    folder.poll(index)
    assert len(index) == 29
    (filled / "w0" / "residency.log").unlink()
    LogWriter(filled / "w0" / "residency.log").close()
    folder.poll(index)
    assert len(index) == 0
    folder.close()

"""What may befall a directory between and during runs: logs and headers torn, old or gone, clocks, owners, forks.

Throughout: no wrong page is served, and where only the log suffered, what was acknowledged is usable again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import Dispatcher, Outcome
from storage_backends.format import BLOCK, ExtentHeader, SlotHeader, SlotShape
from storage_backends.local import LocalBackend, files
from storage_backends.local.extents import extent_number
from storage_backends.local.recovery import HeaderScan
from storage_backends.local.residency import RECORD_BYTES, Kind, LogReader, Record
from tests import pages
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, local_tiers
from tests.worker import Worker

MIB = 1 << 20
SPACE = namespace((16384, 16384))
SHAPE = SlotShape.of_namespace(SPACE)


@pytest.fixture(params=["threads", "native"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    if request.param == "native":
        pytest.importorskip("hicache_ext._io", reason="not built")
    with local_tiers(tmp_path / "tier", request.param) as open_one:
        yield open_one


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "tier" / "w0" / "residency.log"


def store(backend: LocalBackend, keys: list[bytes]) -> list[Outcome]:
    return backend.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(30)


def served(backend: LocalBackend, keys: list[bytes]) -> list[Outcome]:
    return pages.served(backend, SPACE, keys)


def hits(backend: LocalBackend, keys: list[bytes]) -> int:
    return served(backend, keys).count(Outcome.HIT)


def recovered(backend: LocalBackend, last: str = "new") -> LocalBackend:
    """Claim the folder by one write, and wait for the end of the scan."""
    assert store(backend, chain(last, 1)) == [Outcome.HIT]
    deadline = time.monotonic() + 30
    while "recovered_by_scan" not in backend.stats():
        assert time.monotonic() < deadline, "the scan does not end"
        time.sleep(0.01)
    stats = backend.stats()
    assert stats["scan_done"] == stats["scan_total"] > 0
    return backend


CHAINS = 40


def written_over(backend: LocalBackend, turns: range) -> list[bytes]:
    """Store chains until slots were used again and again; every key there ever was."""
    for turn in turns:
        for outcome in store(backend, chain(f"c{turn}", 20)):
            assert outcome == Outcome.HIT
    return [key for turn in turns for key in chain(f"c{turn}", 20)]


def resident(backend: LocalBackend, keys: list[bytes]) -> list[bytes]:
    return [key for key, there in zip(keys, backend.lookup(key_batch(SPACE, keys)).tolist(), strict=True) if there]


def enough(backend: LocalBackend, before: list[bytes]) -> bool:
    """99 % of what was there, less what the write that claimed the folder took the place of."""
    gone = int(backend.stats().get("evicted", 0))
    return hits(backend, before) + gone + 1 >= 0.99 * len(before)


# -- the log -------------------------------------------------------------------------------------------------------


def tear(raw: bytes, how: str, chance: random.Random) -> bytes:
    at = chance.randrange(RECORD_BYTES, len(raw))
    sector = at // 512 * 512
    match how:
        case "cut":
            return raw[:at]
        case "cut at a sector":
            return raw[:sector]
        case "zeroes after a sector":
            return raw[:sector] + bytes(len(raw) - sector)
        case "lost sectors":
            lost = bytearray(raw)
            for sector in range(512, len(raw), 512):
                if chance.random() < 0.2:
                    lost[sector : sector + 512] = bytes(512)
            return bytes(lost)
        case "garbage":
            return raw[:at] + chance.randbytes(len(raw) - at)
        case "head":
            return chance.randbytes(512) + raw[512:]
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["cut", "cut at a sector", "zeroes after a sector", "lost sectors", "garbage", "head"])
def test_a_torn_log_costs_no_pages(tier: Open, tmp_path: Path, log: Path, how: str) -> None:
    first = tier(capacity=16 * MIB)
    keys = written_over(first, range(CHAINS))
    before = resident(first, keys)
    assert len(before) < len(keys), "slots were used twice"
    first.close()
    raw = log.read_bytes()
    chance = random.Random(how)
    for turn in range(3):
        copy = tmp_path / f"torn{turn}"
        shutil.copytree(tmp_path / "tier", copy)
        (copy / "w0" / "residency.log").write_bytes(tear(raw, how, chance))
        again = recovered(tier(path=copy, capacity=16 * MIB))
        served(again, keys)
        assert enough(again, before), again.stats()
        again.close()
        last = tier(path=copy, capacity=16 * MIB)
        assert enough(last, before), "and it lasts"
        last.close()


def an_old_log(tier: Open, log: Path) -> tuple[list[bytes], list[bytes]]:
    """The log of before most slots were used again; every key, and those that are on the disk."""
    first = tier(capacity=16 * MIB)
    written_over(first, range(CHAINS))
    copy = log.read_bytes()
    written_over(first, range(CHAINS, 2 * CHAINS))
    keys = [key for turn in range(2 * CHAINS) for key in chain(f"c{turn}", 20)]
    before = resident(first, keys)
    first.close()
    log.write_bytes(copy)
    return keys, before


def test_a_log_older_than_the_data_costs_no_pages(tier: Open, log: Path) -> None:
    keys, before = an_old_log(tier, log)
    again = recovered(tier(capacity=16 * MIB))
    served(again, keys)
    assert enough(again, before)
    assert again.stats()["stale"]


def test_without_the_sample_an_old_log_would_cost_most(tier: Open, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the two tests above. And reads find what the scan did not."""
    monkeypatch.setattr(HeaderScan, "_log_is_old", lambda self: False)
    keys, before = an_old_log(tier, log)
    again = recovered(tier(capacity=16 * MIB))
    assert not enough(again, before)
    assert Outcome.CORRUPT not in served(again, keys), "another page in a slot is no damage"
    assert enough(again, before), "each was found in the place of the one that the log names there"
    again.close()
    assert enough(tier(capacity=16 * MIB), before), "and is in the log"


def test_writes_take_slots_that_were_looked_at(tier: Open, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One extent, full but for its first slots, and no log: until the scan is through, those are the room there is."""
    from storage_backends.local import recovery

    chunk = 16
    first = tier(capacity=4 * MIB)
    slots = (4 * MIB - BLOCK) // SHAPE.slot_bytes
    keys = chain("a", slots)
    assert store(first, keys) == [Outcome.HIT] * slots
    first.close()
    log.unlink()
    with next(log.parent.glob("e*.ext")).open("r+b") as extent:
        for slot in range(chunk):
            extent.seek(BLOCK + slot * SHAPE.slot_bytes)
            extent.write(bytes(BLOCK))
    go, looked = threading.Event(), threading.Event()
    real = recovery.read_headers

    def held(extent: Any, slots: list[int], stop: Any) -> Any:
        if chunk in slots:  # the second chunk; by its slots, since the one of the first page may be sampled before
            looked.set()
            assert go.wait(30)
        return real(extent, slots, stop)

    monkeypatch.setattr(recovery, "read_headers", held)
    monkeypatch.setattr(recovery, "_CHUNK", chunk)
    again = tier(capacity=4 * MIB)
    assert store(again, chain("new", 1)) == [Outcome.HIT]
    assert looked.wait(30)
    assert store(again, chain("more", chunk)) == [Outcome.HIT] * chunk
    go.set()
    deadline = time.monotonic() + 30
    while "recovered_by_scan" not in again.stats():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert hits(again, keys) == slots - chunk - 1, "the first page had to go where nobody had looked"
    assert hits(again, chain("more", chunk)) == chunk


def test_reads_are_served_while_the_scan_runs(tier: Open, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, keys = tier(), chain("a", 60)
    store(first, keys)
    first.close()
    raw = log.read_bytes()
    log.write_bytes(raw[: RECORD_BYTES * 31])  # half of it
    named = [
        Record.decode(raw[at : at + RECORD_BYTES]).key for at in range(RECORD_BYTES, 31 * RECORD_BYTES, RECORD_BYTES)
    ]
    go, reading = threading.Event(), threading.Event()
    from storage_backends.local import recovery

    real = recovery.read_headers

    def held(*arguments: Any) -> Any:
        reading.set()
        assert go.wait(30)
        return real(*arguments)

    monkeypatch.setattr(recovery, "read_headers", held)
    again = tier()
    store(again, chain("new", 1))
    assert reading.wait(30)
    assert hits(again, named) == 30
    assert store(again, chain("more", 3)) == [Outcome.HIT] * 3
    assert hits(again, keys) == 30
    go.set()
    recovered(again)
    assert hits(again, keys) >= 60 - 4, "a write may have taken the place of a page that nobody knew of"


def test_an_intact_log_is_continued(tier: Open, log: Path) -> None:
    first, keys = tier(), chain("a", 30)
    store(first, keys)
    first.close()
    inode, size = log.stat().st_ino, log.stat().st_size
    again = recovered(tier())
    assert (log.stat().st_ino, log.stat().st_size) == (inode, size + RECORD_BYTES)
    assert again.stats()["recovered_by_scan"] == 0
    assert again.stats()["log_bytes"] == size + RECORD_BYTES
    assert hits(again, keys) == 30


def test_a_long_log_is_compacted_beside_the_serving(tier: Open, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage_backends.local.own_log._FLOOR", 1000)
    writer, reader = tier(capacity=16 * MIB), tier(capacity=16 * MIB)
    keys = written_over(writer, range(150))
    deadline = time.monotonic() + 30
    while not writer.stats()["compactions"]:
        assert time.monotonic() < deadline, writer.stats()
        time.sleep(0.02)
    assert writer.stats()["log_bytes"] < 2 * RECORD_BYTES * len(keys)
    before = resident(writer, keys)
    while set(resident(reader, keys)) != set(before):  # a lookup reads on in a log for so long, and not to its end
        assert time.monotonic() < deadline, "the reader misses what the log says"
        time.sleep(0.02)
    writer.close()
    again = tier(capacity=16 * MIB)
    assert resident(again, keys) == before
    assert hits(again, before) == len(before)


# -- clocks --------------------------------------------------------------------------------------------------------

DAY = 86_400_000_000_000


@pytest.mark.parametrize("log_is_there", [True, False])
def test_a_clock_that_went_back_between_runs(
    tier: Open, log: Path, monkeypatch: pytest.MonkeyPatch, log_is_there: bool
) -> None:
    now = time.time_ns
    first, keys = tier(), chain("a", 40)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now() + DAY)
        store(first, keys)
        first.close()
    if not log_is_there:
        log.unlink()
    second = recovered(tier())
    store(second, chain("b", 40))
    # Without its log, a page's slot may have been taken by the write that claimed the folder.
    assert hits(second, keys) >= 40 - (not log_is_there)
    second.close()
    third = tier()
    assert hits(third, chain("b", 40)) == 40
    assert hits(third, keys) >= 39
    third.close()
    reader = LogReader(log)
    records = list(reader.read())
    reader.close()
    slots: dict[tuple[int, int], int] = {}
    for record in records:
        if record.kind == Kind.STORED:
            assert slots.get((record.extent, record.slot), 0) < record.generation, "never twice the same, never less"
            slots[record.extent, record.slot] = record.generation


def test_a_clock_that_goes_back_within_a_run(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    now, chance = time.time_ns, random.Random(4)
    backend = tier(capacity=16 * MIB)
    monkeypatch.setattr(time, "time_ns", lambda: now() + chance.randrange(-DAY, DAY))
    keys = written_over(backend, range(CHAINS))
    before = resident(backend, keys)
    backend.close()
    again = tier(capacity=16 * MIB)
    assert resident(again, keys) == before
    assert hits(again, before) == len(before)


# -- headers and files ---------------------------------------------------------------------------------------------


def slots_of(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Where each page's slot begins, by reading the format."""
    found = {}
    for path in sorted(folder.glob("*.ext")):
        raw = path.read_bytes()
        header = ExtentHeader.decode(raw[:BLOCK])
        for at in map(header.slot_offset, range(header.slots)):
            if raw[at : at + 8] == b"HICSLOT1":
                found[SlotHeader.decode(raw[at : at + SHAPE.header_bytes]).key] = (path, at)
    return found


@pytest.mark.parametrize("log_is_there", [True, False])
def test_slot_headers_torn_at_every_sector(tier: Open, tmp_path: Path, log: Path, log_is_there: bool) -> None:
    """Every mix of a page's header and of what was there before: zeroes, or another page's header."""
    first, keys = tier(), chain("a", 48)
    store(first, keys)
    first.close()
    slots = slots_of(tmp_path / "tier" / "w0")
    torn = keys[:32]
    for n, key in enumerate(torn):
        path, at = slots[key]
        sectors = n % 8 * 512
        raw = bytearray(path.read_bytes()[at : at + BLOCK])
        other_path, other_at = slots[keys[40]]
        other = other_path.read_bytes()[other_at : other_at + BLOCK] if n >= 16 else bytes(BLOCK)
        if n % 16 < 8:
            raw[sectors:] = other[sectors:]  # the beginning of the new header arrived
        else:
            raw[: BLOCK - sectors] = other[: BLOCK - sectors]  # its end did
        with path.open("r+b") as file:
            file.seek(at)
            file.write(raw)
    if not log_is_there:
        log.unlink()
    whole = {key for key, (path, at) in slots.items() if _header_key(path, at) == key}
    assert set(keys[32:]) <= whole
    assert len(whole) < 48
    again = recovered(tier())
    for key, outcome in zip(keys, served(again, keys), strict=True):
        assert (outcome == Outcome.HIT) <= (key in whole), "what is torn is never served"
    assert hits(again, sorted(whole)) >= len(whole) - (not log_is_there)
    assert set(store(again, keys)) == {Outcome.HIT}
    assert hits(again, keys) == 48, "and heals"


def _header_key(path: Path, at: int) -> bytes | None:
    from storage_backends.format import FormatError

    try:
        return SlotHeader.decode(path.read_bytes()[at : at + SHAPE.header_bytes]).key
    except FormatError:
        return None


@pytest.mark.parametrize("sector", range(8))
def test_an_extent_header_torn_at_every_sector(tier: Open, tmp_path: Path, sector: int) -> None:
    first, keys = tier(capacity=16 * MIB), chain("a", 200)
    store(first, keys)
    first.close()
    slots = slots_of(tmp_path / "tier" / "w0")
    extent = slots[keys[0]][0]
    with extent.open("r+b") as file:
        file.seek(sector * 512)
        file.write(random.Random(sector).randbytes(512))
    others = [key for key in keys if slots[key][0] != extent]
    assert 0 < len(others) < 200
    again = recovered(tier(capacity=16 * MIB))
    assert hits(again, others) == len(others)
    assert hits(again, keys) == len(others)
    store(again, keys)
    assert hits(again, keys) == 200


def test_an_extent_deleted_under_a_stopped_server(tier: Open, tmp_path: Path, log: Path) -> None:
    first, keys = tier(capacity=16 * MIB), chain("a", 200)
    store(first, keys)
    first.close()
    slots = slots_of(tmp_path / "tier" / "w0")
    extent = slots[keys[0]][0]
    extent.unlink()
    others = [key for key in keys if slots[key][0] != extent]
    again = tier(capacity=16 * MIB)
    assert len(resident(again, keys)) == 200, "its log names them still"
    assert hits(again, keys) == len(others), "before the folder has an owner"
    recovered(again)
    assert hits(again, keys) == len(others)
    again.close()
    reader = LogReader(log)
    assert [record.extent for record in reader.read() if record.kind == Kind.EXTENT_GONE] == [
        extent_number(extent.name)
    ]
    reader.close()
    assert len(resident(tier(capacity=16 * MIB), keys)) == len(others)


def test_an_extent_deleted_under_a_living_server(tier: Open, tmp_path: Path) -> None:
    writer, keys = tier(capacity=16 * MIB), chain("a", 200)
    store(writer, keys)
    slots = slots_of(tmp_path / "tier" / "w0")
    extent = slots[keys[0]][0]
    others = [key for key in keys if slots[key][0] != extent]
    extent.unlink()
    served(writer, keys)
    reader = tier(capacity=16 * MIB)
    assert hits(reader, keys) == len(others), "who had not opened it misses"
    deadline = time.monotonic() + 30
    while len(resident(writer, keys)) > len(others):
        assert time.monotonic() < deadline, "pages in a file that will not outlive the process"
        time.sleep(0.05)
    assert set(store(writer, keys)) == {Outcome.HIT}
    writer.close()
    assert hits(tier(capacity=16 * MIB), keys) == 200


# -- owners --------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    """A second process reads what the first stores, and writes a folder of its own until the first one dies."""
    path = tmp_path / "tier"
    one = two = three = None
    try:
        one, two = Worker(path, 64 * MIB), Worker(path, 64 * MIB)
        one.ask("store", chain="a", pages=10)
        assert files.is_locked(path / "w0" / "lock")
        assert files.try_lock(path / "w0" / "lock") is None
        log = (path / "w0" / "residency.log").read_bytes()
        assert two.ask("store", chain="b", pages=10) == ["HIT"] * 10
        assert two.ask("served", chain="a", pages=10) == ["HIT"] * 10
        assert (path / "w0" / "residency.log").read_bytes() == log, "only its owner writes a folder"
        assert sorted(p.name for p in path.glob("w*")) == ["w0", "w1"]
        one.stop()
        assert not files.is_locked(path / "w0" / "lock")
        three = Worker(path, 64 * MIB)
        assert three.ask("store", chain="c", pages=10) == ["HIT"] * 10
        assert sorted(p.name for p in path.glob("w*")) == ["w0", "w1"], "it took the dead one's folder"
        for worker in (two, three):
            for name in "abc":
                assert worker.ask("served", chain=name, pages=10) == ["HIT"] * 10
    finally:
        for worker in (one, two, three):
            if worker is not None:
                worker.stop()


# -- forks ---------------------------------------------------------------------------------------------------------


def in_a_child(call: Callable[[], Any], then: Callable[[], Any] = lambda: None, seconds: float = 30) -> Any:
    """Fork; what `call` gave in the child. `then` runs in the parent while the child still lives."""
    answers, says = os.pipe()
    goes, may_go = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(says, json.dumps(call()).encode() + b"\n")
            os.read(goes, 1)
        finally:
            os._exit(0)
    os.close(says)
    os.close(goes)
    try:
        deadline, answer = time.monotonic() + seconds, b""
        os.set_blocking(answers, False)
        while not answer.endswith(b"\n"):
            assert time.monotonic() < deadline, "the child hangs"
            try:
                part = os.read(answers, 65536)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            assert part, "the child died"
            answer += part
        then()
        return json.loads(answer)
    finally:
        os.close(may_go)
        os.close(answers)
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_forked_child_finds_nothing_and_breaks_nothing(tier: Open, tmp_path: Path) -> None:
    backend, keys = tier(), chain("a", 20)
    store(backend, keys)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:  # as any thread may at the moment of a fork
        with backend._lock:
            held.set()
            let_go.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)

    def use() -> list[Any]:
        pool = HostPool(SPACE, 20)
        answers = [
            backend.lookup(key_batch(SPACE, keys)).sum().item(),
            backend.lookup_local(key_batch(SPACE, keys)).sum().item(),
            sorted(set(backend.read(pool.batch(keys)).result(5))),
            sorted(set(backend.write(pool.write_batch(keys)).result(5))),
            backend.remove(key_batch(SPACE, keys)),
            backend.stats()["state"],
        ]
        backend.clear([SPACE])
        backend.register_memory(pool.memory.address, 4096)
        backend.close()
        return answers

    try:
        assert in_a_child(use) == [0, 0, [Outcome.MISS], [Outcome.REJECTED], 0, "forked"]
    finally:
        let_go.set()
        holder.join()
    assert hits(backend, keys) == 20
    assert store(backend, chain("b", 20)) == [Outcome.HIT] * 20
    assert hits(backend, chain("b", 20)) == 20


def test_a_forked_child_opens_a_tier_of_its_own(tier: Open, tmp_path: Path) -> None:
    backend, keys = tier(), chain("a", 20)
    store(backend, keys)

    def use() -> list[Any]:
        options = {"path": tmp_path / "tier", "capacity": 64 * MIB, "engine": "threads"}
        own = LocalBackend(LocalBackend.Options.model_validate(options), Dispatcher())
        answer = [hits(own, keys), store(own, chain("child", 5)).count(Outcome.HIT)]
        own.close()
        return answer

    assert in_a_child(use) == [20, 5]
    assert sorted(p.name for p in (tmp_path / "tier").glob("w*")) == ["w0", "w1"]
    assert hits(backend, [*keys, *chain("child", 5)]) == 25


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_child_that_outlives_its_parent_does_not_hold_its_folder(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lets_go: bool
) -> None:
    """And the negative control: a child that kept its copy of the lock would."""
    backend = tier()
    store(backend, chain("a", 4))
    lock = tmp_path / "tier" / "w0" / "lock"
    if not lets_go:
        monkeypatch.setattr(files, "_locks", {})

    def ends() -> None:
        assert files.is_locked(lock), "the child took nothing from its parent"
        backend.close()
        assert files.is_locked(lock) != lets_go

    in_a_child(lambda: None, ends)


_CHILD_EXITS = """
import os, sys
from storage_backends.base import Dispatcher
from storage_backends.local import LocalBackend
backend = LocalBackend(LocalBackend.Options(path=sys.argv[1], capacity=1 << 26, engine=sys.argv[2]), Dispatcher())
child = os.fork()
if child:
    print(os.waitpid(child, 0)[1], backend.stats()["state"])
    backend.close()
"""


@pytest.mark.parametrize("engine", ["threads", "native"])
def test_a_forked_child_comes_to_its_end(tmp_path: Path, engine: str) -> None:
    """Through the whole shutdown of the interpreter, with engines whose threads it does not have."""
    if engine == "native":
        pytest.importorskip("hicache_ext._io", reason="not built")
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD_EXITS, str(tmp_path), engine], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout.strip()) == (0, "0 ok"), ended.stderr

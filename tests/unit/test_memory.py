"""The tier in shared memory, several of them in one process: each is another process to the others."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hicache_ext.config import Config
from hicache_ext.store import TieredStore
from storage_backends.base import Dispatcher, KeyBatch, OptionError, Outcome, Residency
from storage_backends.memory import MemoryBackend, backend, region
from storage_backends.memory.region import Pages, left, private_pages, reserved_bytes, shmem_pages
from tests.pages import HostPool, chain, content, key_batch, namespace, served

MIB = 1 << 20
SPACE = namespace((65536, 65536))
Open = Callable[..., MemoryBackend]


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Open]:
    dispatcher = Dispatcher()
    opened: list[MemoryBackend] = []

    def one(**options: Any) -> MemoryBackend:
        values = {"capacity": 16 * MIB, "region": "test", "directory": tmp_path / "region", **options}
        opened.append(MemoryBackend(MemoryBackend.Options.model_validate(values), dispatcher))
        return opened[-1]

    yield one
    for tier in opened:
        tier.close()
    dispatcher.close()


def _store(tier: MemoryBackend, keys: list[bytes], parent: bytes | None = None) -> None:
    assert tier.write(HostPool(SPACE, len(keys)).write_batch(keys, parent)).result(30) == [Outcome.HIT] * len(keys)


def _found(tier: MemoryBackend, keys: list[bytes]) -> list[int]:
    return tier.lookup_local(key_batch(SPACE, keys)).tolist()


def _fill(tier: MemoryBackend, name: str, batches: int) -> None:
    for turn in range(batches):
        _store(tier, chain(f"{name}/{turn}", 16))


def _flip(tier: MemoryBackend, key: bytes, at: int = 70_000) -> None:
    """Change a byte of a stored page, where it lies."""
    assert tier._memory is not None
    memory = tier._memory._map
    start = memory.find(content(SPACE, key)[:64].tobytes())
    assert start > 0
    memory[start + at] ^= 1


def test_what_one_stores_the_others_read_at_once(open_one: Open) -> None:
    one, two = open_one(), open_one()
    keys = chain("a", 20)
    _store(one, keys)
    assert _found(two, keys) == [1] * 20
    assert served(two, SPACE, keys) == [Outcome.HIT] * 20
    _store(two, keys)
    assert two.stats()["stored"] == 0
    assert two.remove(key_batch(SPACE, keys[:3])) == 3
    assert _found(one, keys) == [0] * 3 + [1] * 17
    assert (one.stats()["processes"], one.capabilities.shared) == (2, True)


def test_a_region_lives_as_long_as_anybody_has_it(open_one: Open) -> None:
    keys = chain("a", 4)
    one, two = open_one(), open_one()
    _store(one, keys)
    one.close()
    three = open_one()
    two.close()
    assert served(three, SPACE, keys) == [Outcome.HIT] * 4
    three.close()
    assert _found(open_one(), keys) == [0] * 4


def test_regions_and_private_memory_are_apart(open_one: Open) -> None:
    tiers = [open_one(), open_one(region="other"), open_one(region=""), open_one(region="")]
    keys = chain("a", 2)
    for i, tier in enumerate(tiers):
        assert _found(tier, keys) == [0, 0]
        _store(tier, keys[: 1 + i % 2])
    assert [tier.capabilities.shared for tier in tiers] == [True, True, False, False]


def test_a_flipped_byte_is_corrupt_and_healed(open_one: Open, caplog: pytest.LogCaptureFixture) -> None:
    one, two = open_one(), open_one()
    keys = chain("a", 3)
    _store(one, keys)
    _flip(one, keys[1])
    assert served(two, SPACE, keys) == [Outcome.HIT, Outcome.CORRUPT, Outcome.HIT]
    assert served(one, SPACE, keys) == [Outcome.HIT, Outcome.MISS, Outcome.HIT]
    _store(one, keys)
    assert served(two, SPACE, keys) == [Outcome.HIT] * 3
    assert two.stats()["corrupt"] == 1
    assert caplog.text.count("failed its verification") == 1


def test_a_flipped_byte_in_a_header_is_never_a_page(open_one: Open) -> None:
    tier, keys = open_one(), chain("a", 1)
    for at in range(-4096, -3000, 37):
        _store(tier, keys)
        assert tier._memory is not None
        start = tier._memory._map.find(content(SPACE, keys[0])[:64].tobytes())
        before = tier._memory._map[start + at]
        tier._memory._map[start + at] = before ^ 0x40
        assert served(tier, SPACE, keys)[0] in (Outcome.CORRUPT, Outcome.MISS)
        tier._memory._map[start + at] = before
        tier.clear([SPACE])
        tier._memory._map[start : start + 64] = bytes(64)


def test_without_verification_the_tests_see_wrong_bytes(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests can fail: a backend that believes what it copied serves the flipped byte."""
    tier, keys = open_one(), chain("a", 1)
    _store(tier, keys)
    _flip(tier, keys[0])
    monkeypatch.setitem(backend.OUTCOMES, backend.Verdict.DAMAGED, Outcome.HIT)
    with pytest.raises(AssertionError, match="a wrong page was served"):
        served(tier, SPACE, keys)


def test_the_capacity_holds_and_the_oldest_go(open_one: Open) -> None:
    one, two = open_one(), open_one()
    for turn in range(30):
        for tier in (one, two):
            _store(tier, chain(f"{id(tier)}/{turn}", 8))
            assert int(tier.stats()["bytes"]) <= 16 * MIB
    assert one._memory is not None
    assert os.fstat(one._memory.fd).st_blocks * 512 <= 16 * MIB + 4 * MIB
    counted = sum(sum(_found(two, chain(f"{id(tier)}/{turn}", 8))) for tier in (one, two) for turn in range(30))
    assert counted == one.stats()["pages"] == two.stats()["pages"]
    assert counted * 135168 > 0.6 * 16 * MIB, "room is used"
    assert _found(one, chain(f"{id(two)}/29", 8)) == [1] * 8
    assert _found(one, chain(f"{id(one)}/0", 8)) == [0] * 8


def test_pages_in_use_stay_with_their_beginnings(open_one: Open) -> None:
    """A chain of which only the end is read, as an engine does that has the beginning, stays whole."""
    tier = open_one()
    hot, cold = chain("hot", 8), chain("cold", 8)
    _store(tier, hot)
    _store(tier, cold)
    for turn in range(40):
        served(tier, SPACE, hot[-1:])
        _fill(tier, f"fill{turn}", 1)
    assert _found(tier, hot) == [1] * 8
    assert _found(tier, cold) == [0] * 8
    assert int(tier.stats()["kept"]) > 8
    assert served(tier, SPACE, hot) == [Outcome.HIT] * 8


def test_pages_of_many_sizes_share_the_room(open_one: Open) -> None:
    tier = open_one(capacity=32 * MIB)
    spaces = [namespace(lengths) for lengths in ((4096,), (70272,), (300_000, 300_000, 17), (1_000_000,))]
    for turn in range(25):
        for space in spaces:
            keys = chain(f"{turn}", 8)
            assert tier.write(HostPool(space, 8).write_batch(keys)).result(30) == [Outcome.HIT] * 8
            assert served(tier, space, keys) == [Outcome.HIT] * 8
    assert all(Outcome.HIT in served(tier, space, chain("24", 8)) for space in spaces)
    too_large = namespace((tier.capabilities.max_page_bytes + 1,))
    assert tier.write(HostPool(too_large, 1).write_batch(chain("a", 1))).result(30) == [Outcome.REJECTED]


def test_what_goes_next_is_told_before_it_goes(open_one: Open) -> None:
    tier = open_one()
    _store(tier, chain("a", 4))
    assert tier.going(64) == []
    _fill(tier, "fill", 12)
    there = {key for turn in range(12) for key in chain(f"fill/{turn}", 16)} | set(chain("a", 4))
    there = {key for key in there if _found(tier, [key])[0]}
    told: list[bytes] = []
    for _ in range(200):
        step = tier.going(5)
        told += [keys[i : i + 32] for digest, keys in step for i in range(0, len(keys), 32) if digest == SPACE.digest]
        if not step or len(set(told)) < len(told):
            break
    assert set(told) <= there
    _store(tier, chain("more", 6))
    gone = {key for key in there if not _found(tier, [key])[0]}
    assert gone
    assert gone <= set(told)


def _below_has_what_goes(store: TieredStore) -> bool:
    going = [keys for _, keys in store.tiers[0].backend.going(1000)]
    return all(store.tiers[1].backend.lookup(KeyBatch(SPACE, keys)).all() for keys in going)


def test_a_tier_below_gets_what_goes(tmp_path: Path) -> None:
    tiers = [
        {"type": "memory", "capacity": "8MiB"},
        {"type": "tests.dictionary:DictionaryBackend", "name": "below", "write": "evicted"},
    ]
    store = TieredStore.open(Config.load({"tiers": tiers}))
    keys = chain("a", 150)
    for at in range(0, 150, 5):
        assert Outcome.FAILED not in store.write(HostPool(SPACE, 5).write_batch(keys[at : at + 5])).result(10)
        until = time.monotonic() + 5
        while not _below_has_what_goes(store):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert store.tiers[1].counts["demoted"] > 20
    assert served(store, SPACE, keys) == [Outcome.HIT] * 150
    store.close()


def test_who_announced_a_page_takes_it_back(open_one: Open) -> None:
    one, two = open_one(), open_one()
    heard: dict[str, list[tuple[Residency, bytes]]] = {"one": [], "two": []}
    for name, tier in (("one", one), ("two", two)):
        tier.on_residency(lambda change, _, keys, _notes, to=heard[name]: to.extend(
            (change, keys[i : i + 32]) for i in range(0, len(keys), 32)))  # fmt: skip
    mine, kept = chain("mine", 8), chain("kept", 4)
    _store(one, mine)
    _store(two, kept)
    _store(two, mine)
    two.remove(key_batch(SPACE, mine[:2]))
    until = time.monotonic() + 10
    gone = [(Residency.REMOVED, key) for key in mine[:2]]
    while heard["one"][8:] != gone and sorted(heard["one"][8:]) != sorted(gone):
        assert time.monotonic() < until, heard["one"]
        time.sleep(0.02)
    _fill(one, "one's", 1)  # nobody evicts from an extent that a living process still fills
    _fill(two, "fill", 30)  # the pages were used, so they are spared once
    until = time.monotonic() + 10
    while len(told := [change for change in heard["one"] if change[1] in mine]) < 16:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert sorted(told) == sorted([(change, key) for change in Residency for key in mine])
    stored = [key for change, key in heard["two"] if change is Residency.STORED]
    assert sorted(stored) == sorted(kept + [key for turn in range(30) for key in chain(f"fill/{turn}", 16)])
    there = {key for key in stored if _found(two, [key])[0]}
    until = time.monotonic() + 10
    while there != set(stored) - {key for change, key in heard["two"] if change is Residency.REMOVED}:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_more_than_there_is_is_refused(open_one: Open) -> None:
    with pytest.raises(OptionError, match=r"capacity = '4.0TiB': .* has .* left. Fix: lower `capacity` to less than"):
        open_one(capacity=1 << 42)
    with pytest.raises(OptionError, match="capacity"):
        open_one(capacity=1 << 42, region="")


def test_what_is_left(tmp_path: Path) -> None:
    meminfo = "MemTotal: 100 kB\nMemAvailable:  4096 kB\nHugePages_Free: 3\nHugePages_Rsvd: 1\nHugepagesize: 2048 kB\n"
    assert left(meminfo, tmp_path).bytes == 4 * MIB
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, limit in ((inner, "max"), (inner.parent, str(3 * MIB))):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(f"{2 * MIB}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {MIB // 2}\n")
    room = left(meminfo, inner)
    assert room.bytes == MIB + MIB // 2
    assert str(inner.parent) in room.of
    assert reserved_bytes(meminfo) == 2 * region.HUGE_PAGE
    assert shmem_pages("always within_size [advise] never deny force") is Pages.TRANSPARENT
    assert shmem_pages("always within_size advise [never] deny force") is Pages.SMALL
    assert (private_pages("always [madvise] never"), private_pages("always madvise [never]"), private_pages("")) == (
        Pages.TRANSPARENT, Pages.SMALL, Pages.SMALL
    )  # fmt: skip


@pytest.mark.parametrize("region", ["test", ""])
def test_memory_is_taken_ahead_of_the_pages(open_one: Open, region: str) -> None:
    tier = open_one(capacity=64 * MIB, region=region)
    assert _resident(tier) <= 4 * MIB, "who writes nothing takes nothing"
    _store(tier, chain("a", 4))
    until = time.monotonic() + 30
    while _resident(tier) < 16 * MIB:
        assert time.monotonic() < until, f"{_resident(tier)} bytes are there"
        time.sleep(0.01)
    _fill(tier, "fill", 40)
    tier.close()
    assert not any(thread.name == "hicache-memory-ahead" for thread in threading.enumerate())


def _resident(tier: MemoryBackend) -> int:
    """Bytes of the region that the kernel has given."""
    assert tier._memory is not None
    address, pages = tier._memory.address, tier._memory.size // 4096
    there = np.zeros(pages, np.uint8)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * 4096), there.ctypes.data_as(
        ctypes.POINTER(ctypes.c_ubyte))) == 0  # fmt: skip
    return int((there & 1).sum()) * 4096


def test_memory_that_the_kernel_does_not_give_is_a_refusal(open_one: Open, tmp_path: Path) -> None:
    """Not a signal that ends the server: the region is of a file system that has no more room."""
    tier = open_one()
    _store(tier, chain("a", 4))
    assert tier._memory is not None
    memory = tier._memory
    with open("/dev/full", "r+b") as full:  # a descriptor that allocates nothing
        tier._region = backend._native.Region(memory.address, memory.size, full.fileno(), -1, 900, memory)
    keys = chain("b", 4)
    outcomes = tier.write(HostPool(SPACE, 4).write_batch(keys)).result(10)
    assert set(outcomes) <= {Outcome.REJECTED, Outcome.HIT}
    assert served(tier, SPACE, chain("a", 4)).count(Outcome.CORRUPT) == 0


def test_another_version_is_refused(open_one: Open) -> None:
    tier = open_one()
    assert tier._memory is not None
    tier._memory._map[8] = 9
    with pytest.raises(OptionError, match=r"region = 'test': .*another version.*\(format 9\). Fix: use one version"):
        open_one()


def test_the_folder_is_this_users_alone(open_one: Open, tmp_path: Path) -> None:
    (tmp_path / "region").mkdir(mode=0o755)
    with pytest.raises(OptionError, match=r"directory.*this user alone.*Fix"):
        open_one()
    (tmp_path / "region").rmdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="directory"):
        open_one(directory=tmp_path / "file")
    open_one()
    paths = [tmp_path / "region", *(tmp_path / "region").rglob("*")]
    assert all(not stat.S_IMODE(path.lstat().st_mode) & 0o077 for path in paths)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_gets_nothing(open_one: Open, tmp_path: Path) -> None:
    """Even where the folder's rights were opened by hand."""
    open_one()
    path = tmp_path / "region" / "test" / "1.sock"
    for opened in (*reversed(path.parents), path):
        if opened.is_relative_to(tmp_path.parents[2]) or opened == path:
            opened.chmod(0o777)
    script = (
        "import socket,sys,os; os.setuid(65534); s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "print(socket.recv_fds(s, 64, 1)[:2])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("(b'', [])", ""), done.stdout
    assert done.stdout or "PermissionError" in done.stderr


def test_a_stranger_at_the_socket_holds_nobody_up(open_one: Open, tmp_path: Path) -> None:
    one = open_one()
    held = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for connection in held:
        connection.connect(str(tmp_path / "region" / "test" / "1.sock"))
    _store(one, chain("a", 2))
    assert _found(open_one(), chain("a", 2)) == [1, 1]
    for connection in held:
        connection.close()


def test_a_forked_child_has_no_tier(open_one: Open) -> None:
    tier = open_one()
    _store(tier, chain("a", 2))
    pid = os.fork()
    if pid == 0:
        outcomes = tier.read(HostPool(SPACE, 2).batch(chain("a", 2))).result(5)
        os._exit(0 if outcomes == [Outcome.MISS] * 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert served(tier, SPACE, chain("a", 2)) == [Outcome.HIT] * 2


def test_threads_that_overtake_each_other(open_one: Open) -> None:
    """Reads in flight while every page is evicted again and again: HITs are right, whatever else they are."""
    one, two = open_one(capacity=2 * MIB), open_one()
    space = namespace((20_000, 300))
    over, wrong = threading.Event(), [0]

    def read() -> None:
        pool = HostPool(space, 8)
        while not over.is_set():
            try:
                served(two, space, chain("a", 8), pool=pool)
            except AssertionError:
                wrong[0] += 1

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    mine, others = HostPool(space, 8).write_batch(chain("a", 8)), HostPool(space, 8)
    until = time.monotonic() + 2
    turn = 0
    while time.monotonic() < until:
        one.write(mine).result(10)
        for _ in range(8):
            turn += 1
            one.write(others.batch(chain(f"other/{turn}", 8))).result(10)
    over.set()
    for thread in threads:
        thread.join()
    assert wrong == [0]
    assert int(one.stats()["evicted"]) > 100


SPACES = (namespace((8192, 8192)), namespace((70272,), model="model-b"))
_KEYS = chain("model", 24)


class AgainstADict(RuleBasedStateMachine):
    """Two processes' ends of one region, opened and closed at will, against a dictionary."""

    @initialize(capacity=st.sampled_from([2 * MIB, 64 * MIB]))
    def begin(self, capacity: int) -> None:
        self.dispatcher = Dispatcher()
        self.folder = Path(f"/dev/shm/hicache-ext-test-{os.getpid()}-{os.urandom(4).hex()}")
        self.capacity, self.spacious = capacity, capacity > 2 * MIB
        self.ends = [self.open_end(), self.open_end()]
        self.model: set[tuple[int, bytes]] = set()

    def open_end(self) -> MemoryBackend:
        values = {"capacity": self.capacity, "region": "m", "directory": self.folder, "threads": 2}
        return MemoryBackend(MemoryBackend.Options.model_validate(values), self.dispatcher)

    @rule(end=st.integers(0, 1), space=st.integers(0, 1), keys=st.sets(st.sampled_from(_KEYS), min_size=1, max_size=8))
    def write(self, end: int, space: int, keys: set[bytes]) -> None:
        order = sorted(keys)
        outcomes = self.ends[end].write(HostPool(SPACES[space], len(order)).write_batch(order)).result(10)
        assert outcomes == [Outcome.HIT] * len(order)
        self.model |= {(space, key) for key in order}

    @rule(end=st.integers(0, 1), space=st.integers(0, 1), keys=st.sets(st.sampled_from(_KEYS), min_size=1, max_size=8))
    def read(self, end: int, space: int, keys: set[bytes]) -> None:
        order = sorted(keys)
        outcomes = served(self.ends[end], SPACES[space], order)
        found = self.ends[1 - end].lookup(key_batch(SPACES[space], order)).tolist()
        for key, outcome, there in zip(order, outcomes, found, strict=True):
            assert outcome == (Outcome.HIT if there else Outcome.MISS)
            if self.spacious:
                assert there == ((space, key) in self.model)
            else:
                assert there <= ((space, key) in self.model)

    @rule(end=st.integers(0, 1), space=st.integers(0, 1), keys=st.sets(st.sampled_from(_KEYS), min_size=1, max_size=8))
    def remove(self, end: int, space: int, keys: set[bytes]) -> None:
        removed = self.ends[end].remove(key_batch(SPACES[space], sorted(keys)))
        gone = {(space, key) for key in keys} & self.model
        assert removed == len(gone) if self.spacious else removed <= len(gone)
        self.model -= gone

    @rule(end=st.integers(0, 1), space=st.integers(0, 1))
    def clear(self, end: int, space: int) -> None:
        self.ends[end].clear([SPACES[space]])
        self.model = {page for page in self.model if page[0] != space}

    @rule(end=st.integers(0, 1))
    def leave_and_come_back(self, end: int) -> None:
        self.ends[end].close()
        self.ends[end] = self.open_end()

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "ends"):
            stats = [end.stats() for end in self.ends]
            assert stats[0]["pages"] == stats[1]["pages"]
            assert stats[0]["pages"] == len(self.model) if self.spacious else int(stats[0]["pages"]) <= len(self.model)

    def teardown(self) -> None:
        if hasattr(self, "ends"):
            for end in self.ends:
                end.close()
            self.dispatcher.close()
            for path in sorted(self.folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            self.folder.rmdir()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


def test_numbers_of_the_region_are_pythons() -> None:
    tops = {int(verdict) for verdict in backend.Verdict}
    assert tops == set(range(8))
    assert set(backend.OUTCOMES) == set(backend.Verdict)
    for capacity in (1 << 18, MIB, 8 * MIB, 1 << 30, 100 << 30, 1 << 42):
        extents, each, start, size = backend._native.region_layout(capacity)
        assert 4 <= extents <= 1 << 16
        assert 0.9 * capacity <= extents * each <= capacity
        assert start + extents * each <= size <= capacity * 1.01 + (8 << 20)
        assert np.log2(max(each // 4096, 1)) <= 14

"""The residency log of a writer: claimed, appended to, compacted and crashed at any moment, under readers that tail it.

The index of every reader must become the writer's, whatever came between its looks.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from hicache_ext.page import NO_PARENT
from storage_backends.direct_io import DirectIo
from storage_backends.local import folder as folder_module
from storage_backends.local import own_log
from storage_backends.local.claim import adopt
from storage_backends.local.extents import ExtentFiles
from storage_backends.local.folder import Folder
from storage_backends.local.index import Index, Page
from storage_backends.local.index_choice import AnyIndex, open_index
from storage_backends.local.own_log import OwnLog
from storage_backends.local.residency import NAME, RECORD_BYTES, Head, Kind, LogReader, LogWriter, NotALog, Record

SPACE = b"n" * 16
SLOTS = 4
EXTENTS = 5

Pages = set[tuple[bytes, int, int, int]]


def key(name: int) -> bytes:
    return name.to_bytes(32, "big")


def pages_of(index: AnyIndex) -> Pages:
    return {(p.key, p.extent, p.slot, p.generation) for e in index.extents(0) for p in index.in_extent(0, e)}


def drain(steps: Generator[None, None, None]) -> None:
    for _ in steps:
        pass


class Owner:
    """A writer as far as its log goes: index and log change together, as in Writer."""

    def __init__(self, path: Path, index: AnyIndex) -> None:
        self.folder = Folder(path, ExtentFiles(DirectIo(False, 1, 1)))
        self.index = index
        self.folder.poll(index, final=True)
        self.log = OwnLog(path)
        adopt(index, threading.RLock(), [0])
        self.generation = max((index.newest_generation(0, extent) for extent in index.extents(0)), default=0)
        self.lock = threading.RLock()
        self.compaction: Generator[None, None, None] | None = None
        self.lazy = False

    def say(self, records: list[Record] | bytes) -> None:
        self.log.append(records)
        if not self.lazy:
            self.log.flush()

    def store(self, name: int, extent: int, slot: int) -> None:
        there = self.index.at(0, extent, slot)
        if there is not None:
            self.forget(there)
        self.generation += 1
        _, records = self.index.publish(SPACE, key(name), NO_PARENT, 0, [extent], [slot], [self.generation], 7)
        self.say(records)

    def forget(self, page: Page) -> None:
        self.index.remove(page)
        self.say([Record(Kind.REMOVED, page.extent, page.slot, page.generation, 7, SPACE, page.key)])

    def drop_extent(self, extent: int) -> None:
        for page in self.index.in_extent(0, extent):
            self.index.remove(page)
        self.say([Record(Kind.EXTENT_GONE, extent, time_ns=7)])

    def compact(self) -> Generator[None, None, None]:
        return self.log.compact(self.index, 0, self.lock)


class Reader:
    """Another process that tails the log."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path, ExtentFiles(DirectIo(False, 1, 1)))
        self.index = Index()
        self.restarts = 0

    def poll(self) -> bool:
        """Whether there was anything new."""
        return self.folder.poll(self.index, seconds=0)

    def catch_up(self) -> Pages:
        for _ in range(100_000):
            self.poll()
            if not self.folder.behind:
                return pages_of(self.index)
        raise AssertionError("the reader never came to the log's end")


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="own-log-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.folder = self.path / "w0"
        self.folder.mkdir()
        self.readers: list[Reader] = []
        self.dead: list[Any] = []

    @initialize()
    def begin(self) -> None:
        self.owner = Owner(self.folder, Index())
        self.readers = [Reader(self.folder), Reader(self.folder)]

    @rule(name=st.integers(1, 12), extent=st.integers(0, EXTENTS - 1), slot=st.integers(0, SLOTS - 1))
    def store(self, name: int, extent: int, slot: int) -> None:
        self.owner.store(name, extent, slot)

    @rule(names=st.lists(st.integers(1, 12), min_size=1, max_size=6), extent=st.integers(0, EXTENTS - 1))
    def store_many(self, names: list[int], extent: int) -> None:
        for slot, name in enumerate(names):
            self.owner.store(name, extent, slot % SLOTS)

    @rule(name=st.integers(1, 12))
    def remove(self, name: int) -> None:
        page = self.owner.index.get(SPACE, key(name))
        if page is not None:
            self.owner.forget(page)

    @rule(extent=st.integers(0, EXTENTS - 1))
    def extent_gone(self, extent: int) -> None:
        self.owner.drop_extent(extent)

    @rule(lazy=st.booleans())
    def wait_with_records(self, lazy: bool) -> None:
        self.owner.lazy = lazy

    @rule(which=st.integers(0, 1), times=st.integers(1, 4))
    def poll(self, which: int, times: int) -> None:
        for _ in range(times):
            self.readers[which].poll()

    @rule()
    def reopen(self) -> None:
        self.readers[1].folder.close()
        self.readers[1] = Reader(self.folder)

    @rule(steps=st.sampled_from([1, 2, 4, 50]))
    def compact(self, steps: int) -> None:
        if self.owner.compaction is None:
            self.owner.compaction = self.owner.compact()
        for _ in range(steps):
            if next(self.owner.compaction, self) is self:
                self.owner.compaction = None
                return

    @rule(
        steps=st.integers(1, 5),
        names=st.lists(st.integers(1, 12), min_size=1, max_size=3),
        slot=st.integers(0, SLOTS - 1),
    )
    def compact_under_load(self, steps: int, names: list[int], slot: int) -> None:
        self.compact(steps)
        for name in names:
            self.owner.store(name, name % EXTENTS, slot)
        self.compact(50)

    @precondition(lambda self: self.owner.compaction is not None)
    @rule()
    def stop_compacting(self) -> None:
        """Close in the middle, as a backend does."""
        assert self.owner.compaction is not None
        self.owner.compaction.close()
        self.owner.compaction = None

    @rule(cut=st.floats(0, 1))
    def crash(self, cut: float) -> None:
        """The process dies as it is; of a new file that it was writing, any part is there."""
        self.owner.log.flush()
        known = pages_of(self.owner.index)
        self.dead.append((self.owner, self.owner.compaction))  # nothing of it may run any more
        fresh = self.folder / "residency.new"
        if fresh.exists():
            os.truncate(fresh, int(cut * fresh.stat().st_size))
        self.owner = Owner(self.folder, Index())
        assert pages_of(self.owner.index) == known, "one sound log, at any moment"
        assert not self.owner.folder.damaged

    def teardown(self) -> None:
        try:
            if self.owner.compaction is not None:
                drain(self.owner.compaction)
            self.owner.log.flush()
            known = pages_of(self.owner.index)
            for reader in self.readers:
                assert reader.catch_up() == known
                assert not reader.poll(), "and stays there"
            assert Reader(self.folder).catch_up() == known
        finally:
            shutil.rmtree(self.path)
            for owner, compaction in self.dead:
                owner.log._closed = True
                if compaction is not None:
                    compaction.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens within few records."""
    monkeypatch.setattr(own_log, "_PIECE", 2)
    monkeypatch.setattr(own_log, "_REST", RECORD_BYTES)
    monkeypatch.setattr(folder_module, "_PIECE_RECORDS", 2)
    monkeypatch.setattr(own_log.os, "fsync", lambda fd: None)


def run_machine(max_examples: int = 60, **options: Any) -> None:
    run_state_machine_as_test(
        LogMachine,
        settings=settings(max_examples=max_examples, stateful_step_count=40, deadline=None, database=None, **options),
    )


def test_every_reader_has_what_the_writer_has(small_pieces: None) -> None:
    run_machine()


@pytest.mark.parametrize("off", ["news", "since"])
def test_a_compaction_that_says_the_wrong_place_would_be_found(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    """The negative control: readers that go on one record too late miss something."""
    real = Head

    def wrong(own: bytes, before: bytes, since: int, news: int) -> Head:
        return real(own, before, since - RECORD_BYTES * (off == "since"), news + RECORD_BYTES * (off == "news"))

    monkeypatch.setattr(own_log, "Head", wrong)
    with pytest.raises(AssertionError):
        run_machine(2000, phases=[Phase.generate], report_multiple_bugs=False)  # ends at the first


# -- one at a time -------------------------------------------------------------------------------------------------


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    (tmp_path / "w0").mkdir()
    return Owner(tmp_path / "w0", open_index("lru"))


def fill(owner: Owner, pages: int, turns: int = 1) -> None:
    for _, name in itertools.product(range(turns), range(pages)):
        owner.store(name + 1, name // SLOTS, name % SLOTS)


def test_a_compacted_log_has_a_record_per_page_in_the_order_of_eviction(owner: Owner) -> None:
    fill(owner, 20, turns=50)
    for name in (3, 1):
        owner.index.touch(SPACE, [key(name)])
    before = owner.log.size
    drain(owner.compact())
    assert (owner.log.records, owner.log.compactions) == (20, 1)
    assert owner.log.size < before // 20
    reader = LogReader(owner.log.path)
    keys = [int.from_bytes(record.key, "big") for record in reader.read()]
    reader.close()
    assert keys[-2:] == [3, 1]
    assert sorted(keys) == list(range(1, 21))


def test_a_reader_that_follows_drops_nothing(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(owner, 20, turns=3)
    followers, newcomer = [Reader(owner.folder.path) for _ in range(2)], Reader(owner.folder.path)
    followers[0].catch_up()
    for follower in followers:
        follower.poll()
    compaction = owner.compact()
    next(compaction)
    owner.store(30, 7, 0)
    drain(compaction)
    owner.store(31, 7, 1)
    dropped: list[Any] = []
    monkeypatch.setattr(Index, "trim", lambda *arguments: dropped.append(arguments))
    for reader in (*followers, newcomer):
        assert reader.catch_up() == pages_of(owner.index)
    assert dropped == []


def test_a_reader_of_a_log_two_compactions_ago_starts_anew(owner: Owner) -> None:
    fill(owner, 20)
    reader = Reader(owner.folder.path)
    reader.catch_up()
    drain(owner.compact())
    owner.forget(owner.index.get(SPACE, key(4)))
    drain(owner.compact())
    assert reader.catch_up() == pages_of(owner.index)
    assert len(pages_of(owner.index)) == 19


def test_compaction_is_due_when_records_outnumber_pages(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_log, "_FLOOR", 100)
    fill(owner, 20)
    assert not owner.log.due(20)
    fill(owner, 20, turns=10)
    assert owner.log.due(20)
    drain(owner.compact())
    assert not owner.log.due(20)


def test_a_failed_append_is_healed_for_everyone(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(owner, 8)
    reader = Reader(owner.folder.path)
    reader.catch_up()
    real = os.pwrite
    with monkeypatch.context() as patch:

        def refuse(fd: int, data: Any, offset: int) -> int:
            real(fd, bytes(data)[:40], offset)  # something reached the disk
            raise OSError(28, "No space left on device")

        patch.setattr("storage_backends.local.residency.os.pwrite", refuse)
        owner.store(100, 9, 0)
        owner.forget(owner.index.get(SPACE, key(3)))
    assert owner.log.errors >= 1
    assert reader.catch_up() != pages_of(owner.index)
    assert owner.log.due(8)
    drain(owner.compact())
    assert reader.catch_up() == pages_of(owner.index)
    assert not owner.log.due(8)


def test_a_compaction_that_fails_leaves_the_log(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(owner, 8, turns=4)
    for what in ("fsync", "replace"):

        def refuse(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(own_log.os, what, refuse)
            drain(owner.compact())
        owner.store(50, 9, 0)
        assert sorted(os.listdir(owner.folder.path)) == [NAME]
        assert Reader(owner.folder.path).catch_up() == pages_of(owner.index)
    assert owner.log.compactions == 0


def test_heads_of_before_there_was_compaction_are_read(tmp_path: Path) -> None:
    old = b"HICRLOG1" + (1).to_bytes(4, "little") + (128).to_bytes(4, "little") + b"i" * 16 + bytes(96)
    assert Head.decode(old) == Head(b"i" * 16)
    assert Head(b"i" * 16).encode() == old, "and what reads those reads ours"
    record = Record(Kind.STORED, 0, 0, 1, 1, SPACE, key(1))
    (tmp_path / "w0").mkdir()
    (tmp_path / "w0" / NAME).write_bytes(old + record.encode())
    assert Reader(tmp_path / "w0").catch_up() == {(key(1), 0, 0, 1)}


@pytest.mark.parametrize("at", range(16, 68))
def test_a_damaged_continuation_is_none(at: int) -> None:
    whole = Head(b"i" * 16, b"b" * 16, 256, 512)
    assert Head.decode(whole.encode()) == whole
    raw = bytearray(whole.encode())
    raw[at] ^= 4
    assert Head.decode(bytes(raw)) == Head(bytes(raw[16:32]))


def test_what_is_no_log_is_replaced(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(os.urandom(1000))
    with pytest.raises(NotALog):
        Head.decode((tmp_path / NAME).read_bytes())
    log = OwnLog(tmp_path)
    log.append([Record(Kind.STORED, 0, 0, 1, 1, SPACE, key(1))])
    log.close()
    again = LogWriter(tmp_path / NAME)
    assert again.head is not None
    assert again.records == 1
    again.close()

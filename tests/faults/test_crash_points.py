"""A kill or a power cut at any of a thousand moments: nothing wrong is served, and what was acknowledged is there.

A tier runs on a file system that records every write as the kernel gave it (tests.fuse): pages, headers and log, with
many in flight and answered out of order. For each of the moments, drawn at random, the directory is made as a crash
would leave it: what was answered is there, and of each write in flight nothing, all, its first sectors, or any of its
sectors of 512 bytes; an append to the log breaks off at any byte. Then a tier is opened on it.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hicache_ext.page import KEY_BYTES, Namespace
from storage_backends.base import Outcome
from storage_backends.format import FormatError, SlotShape
from storage_backends.local import LocalBackend, slot_transfers
from storage_backends.local.residency import NAME, RECORD_BYTES, Kind, Record
from storage_backends.local.slots import Verdict
from tests import fuse
from tests.fuse import Disk, Event, events, fuse_disk
from tests.pages import HostPool, chain, content, key_batch, namespace
from tests.tiers import Open, local_tiers

MIB = 1 << 20
CAPACITY = 8 * MIB
SECTOR = 512
SPACES = [namespace((8192, 8192)), namespace((4096,), model="model-b")]
POINTS = 500  # for each of the engines that write
_MARKS, _GIVEN_UP = "marks", "given-up"

Page = tuple[bytes, bytes]
"""(namespace digest, key)"""


@cache
def bytes_of(space: Namespace, key: bytes) -> np.ndarray:
    return content(space, key)


# ---------------------------------------------------------------- the run that is recorded


def write(backend: LocalBackend, space: Namespace, name: str, pages: int, marks: int) -> None:
    """Store a chain, and leave a mark in the record once it is acknowledged."""
    keys = chain(name, pages)
    outcomes = backend.write(HostPool(space, pages).write_batch(keys)).result(30)
    there = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == Outcome.HIT]
    os.pwrite(marks, space.digest + b"".join(there), 0)


def run(disk: Disk, tier: Open, marks: int) -> list[Page]:
    """A tier that fills up, evicts, removes, quarantines, restarts, and changes to pages of another size."""
    tried: list[tuple[Namespace, str, int]] = []

    def writer(backend: LocalBackend, name: str) -> None:
        for turn in range(40):
            # Every fifth is a chain that was stored before, and partly evicted since.
            tried.append((SPACES[0], f"{name}/{turn - 9 if turn % 5 == 4 and turn > 9 else turn}", 12))
            write(backend, *tried[-1], marks)

    for start in range(2):
        backend = tier(capacity=CAPACITY)
        threads = [threading.Thread(target=writer, args=(backend, f"{start}/{i}")) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disk.plan.write_text('{"seed": 1, "read": [{"fault": "flip", "probability": 0.2}]}')
        keys = chain(f"{start}/1/38", 12) + chain(f"{start}/0/38", 12)
        outcomes = backend.read(HostPool(SPACES[0], len(keys)).batch(keys)).result(30)
        assert Outcome.CORRUPT in outcomes, "some are quarantined"
        disk.plan.write_text("{}")
        keys = chain(f"{start}/1/37", 12)
        (disk.path / _GIVEN_UP).write_bytes(SPACES[0].digest + b"".join(keys))  # from here on nobody owes them
        assert backend.remove(key_batch(SPACES[0], keys))
        backend.close()
    backend = tier(capacity=CAPACITY)
    for turn in range(12):
        tried.append((SPACES[1], f"b/{turn}", 40))
        write(backend, *tried[-1], marks)
    backend.close()
    return [(space.digest, key) for space, name, pages in tried for key in chain(name, pages)]


@dataclass
class Recording:
    events: list[Event]
    pages: dict[Namespace, list[bytes]] = field(default_factory=dict)  # all that were ever written


@pytest.fixture(scope="module", params=["native", "threads"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    if request.param == "native":
        pytest.importorskip("hicache_ext._io", reason="not built")
    with fuse_disk(tmp_path_factory.mktemp("recorded")) as disk:
        marks = os.open(disk.path / _MARKS, os.O_WRONLY | os.O_CREAT)
        with local_tiers(disk.path / "tier", request.param) as tier:
            pages = dict.fromkeys(run(disk, tier, marks))
        os.close(marks)
        seen = Recording(events(disk.record))
    for space in SPACES:
        seen.pages[space] = [key for digest, key in pages if digest == space.digest]
    return seen


# ---------------------------------------------------------------- what a crash leaves


class Directory:
    """The tier's files after some of the events, the writes in flight, and the pages that a restart owes."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self.flying: dict[int, Event] = {}
        self.owed: set[Page] = set()
        self._extents: dict[Page, int] = {}  # of every page that the log names by now
        self.torn = 0

    def apply(self, event: Event) -> None:
        match event.kind:
            case fuse.Kind.CREATE:
                self.files[event.path] = bytearray()
            case fuse.Kind.BEGIN:
                self.flying[event.number] = event
                self._read(event)
            case fuse.Kind.END:
                begun = self.flying.pop(event.number)
                self._put(begun.path, begun.offset, begun.data)
            case fuse.Kind.RESIZE:
                data = self.files[event.path]
                del data[event.offset :]
                data.extend(bytes(event.offset - len(data)))
            case fuse.Kind.RENAME:
                self.files[event.data.decode()] = self.files.pop(event.path)
            case fuse.Kind.UNLINK:
                self.files.pop(event.path, None)

    def _put(self, path: str, offset: int, data: bytes) -> None:
        if (file := self.files.get(path)) is not None:
            file.extend(bytes(max(0, offset + len(data) - len(file))))
            file[offset : offset + len(data)] = data

    def _read(self, event: Event) -> None:
        """Who is acknowledged, and who was given up again: that the log says so is enough."""
        if event.path in (_MARKS, _GIVEN_UP):
            digest = event.data[:16]
            pages = [(digest, event.data[at : at + KEY_BYTES]) for at in range(16, len(event.data), KEY_BYTES)]
            if event.path == _MARKS:
                self.owed.update(page for page in pages if page in self._extents)
            else:
                self.owed.difference_update(pages)
        elif event.path.endswith(NAME):
            for at in range(0, len(event.data), RECORD_BYTES):
                try:
                    record = Record.decode(event.data[at : at + RECORD_BYTES])
                except FormatError:
                    continue  # the log's head
                page = (record.namespace, record.key)
                if record.kind == Kind.STORED:
                    self._extents[page] = record.extent
                gone = {page} if record.kind == Kind.REMOVED else set()
                if record.kind == Kind.EXTENT_GONE:
                    gone = {page for page, extent in self._extents.items() if extent == record.extent}
                self.owed -= gone
                for page in gone:
                    self._extents.pop(page, None)

    def crash(self, target: Path, chance: random.Random, lost: int = 0) -> None:
        """Make it as files. lost: bytes of the log that never left the page cache (a power cut)."""
        for path, data in self.files.items():
            if path.startswith("tier/"):
                file = target / path.removeprefix("tier/")
                file.parent.mkdir(parents=True, exist_ok=True)
                end = len(data) - lost if path.endswith(NAME) else len(data)
                file.write_bytes(memoryview(data)[: max(0, end)])
        for event in self.flying.values():
            file = target / event.path.removeprefix("tier/")
            if not event.path.startswith("tier/") or event.path not in self.files or (lost and file.name == NAME):
                continue
            with file.open("r+b", buffering=0) as image:
                for at, data in _reached(event, chance):
                    image.seek(event.offset + at)
                    image.write(data)
                    self.torn += len(data) < len(event.data)


def _reached(event: Event, chance: random.Random) -> Iterator[tuple[int, bytes]]:
    """The parts of a write in flight that reached the disk."""
    size = len(event.data)
    if event.path.endswith(NAME):
        yield 0, event.data[: chance.randrange(size + 1)]
        return
    match chance.choice(["nothing", "all", "first", "some"]):
        case "all":
            yield 0, event.data
        case "first":
            yield 0, event.data[: chance.randrange(0, size + 1, SECTOR)]
        case "some":
            for at in range(0, size, SECTOR):
                if chance.random() < 0.5:
                    yield at, event.data[at : at + SECTOR]


# ---------------------------------------------------------------- what a restart makes of it


@dataclass
class Found:
    served: set[Page] = field(default_factory=set)
    wrong: list[Page] = field(default_factory=list)
    stats: dict[str, object] = field(default_factory=dict)


class Restart:
    """Opens tiers on directories, and reads everything that they offer."""

    def __init__(self, recording: Recording, tier: Open) -> None:
        self.tier = tier
        self.pages = recording.pages
        self._pools = {space: HostPool(space, len(keys)) for space, keys in self.pages.items()}
        self._one = HostPool(SPACES[0], 1)

    def look(self, directory: Path, engine: str, owed: set[Page]) -> Found:
        found = Found()
        # Larger than it was, so that what is written here evicts nothing.
        backend = self.tier(path=directory, capacity=2 * CAPACITY, engine=engine)
        after, pool = chain("after", 1), self._one
        assert backend.write(pool.write_batch(after)).result(30) == [Outcome.HIT]
        deadline = time.monotonic() + 30
        while "recovered_by_scan" not in backend.stats():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        deadline = time.monotonic() + 1  # the log of a folder that nobody claimed is read in the background
        while True:
            for space, keys in self.pages.items():
                self._read(backend, space, keys, found)
            if len(owed - found.served) <= len(owed) // 100 or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        pool.poison()
        assert backend.read(pool.batch(after)).result(30) == [Outcome.HIT]
        assert pool.right(0, after[0]), "the tier goes on working"
        found.stats = dict(backend.stats())
        backend.close()
        return found

    def _read(self, backend: LocalBackend, space: Namespace, keys: list[bytes], found: Found) -> None:
        offered = backend.lookup(key_batch(space, keys))
        keys = [key for key, there in zip(keys, offered, strict=True) if there]
        pool = self._pools[space]
        pool.bytes[: len(keys) * space.layout.payload_bytes] = 0xEE
        for page, outcome in enumerate(backend.read(pool.batch(keys)).result(30)):
            if outcome == Outcome.HIT:
                found.served.add((space.digest, keys[page]))
                if not np.array_equal(pool.get(page), bytes_of(space, keys[page])):
                    found.wrong.append((space.digest, keys[page]))


@pytest.fixture
def images() -> Iterator[Callable[[], Path]]:
    """Empty directories, each in place of the one before; in memory where there is such a place."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as made:
        place = Path(made) / "tier"

        def one() -> Path:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            return place

        yield one


@pytest.fixture
def restart(recording: Recording, tmp_path: Path) -> Iterator[Restart]:
    with local_tiers(tmp_path, "threads") as tier:
        yield Restart(recording, tier)


def moments(recording: Recording, points: int, seed: int) -> Iterator[tuple[Directory, random.Random]]:
    """The directory at `points` moments in the run, in their order, each after at least one acknowledgement."""
    chance = random.Random(seed)
    first = next(i for i, event in enumerate(recording.events) if event.path == _MARKS and event.data)
    chosen = sorted(chance.choices(range(first, len(recording.events)), k=points))
    directory = Directory()
    for before, until in pairwise([0, *chosen]):
        for event in recording.events[before:until]:
            directory.apply(event)
        yield directory, chance


def check(directory: Directory, found: Found, share: float = 0.99, lost: int = 0) -> None:
    """What must hold after any crash. lost: pages that may be lost beside."""
    assert found.wrong == []
    missing = directory.owed - found.served
    assert len(missing) <= (1 - share) * len(directory.owed) + lost, f"{len(missing)} of {len(directory.owed)} lost"


def engines() -> list[str]:
    try:
        import hicache_ext._io  # noqa: F401
    except ImportError:
        return ["threads"]
    return ["threads", "native"]


@pytest.mark.slow
def test_killed_at_any_write(recording: Recording, restart: Restart, images: Callable[[], Path]) -> None:
    owed = flying = torn = 0
    for turn, (directory, chance) in enumerate(moments(recording, POINTS, 1)):
        directory.crash(image := images(), chance)
        check(directory, restart.look(image, engines()[turn % len(engines())], directory.owed))
        owed += len(directory.owed)
        flying += len(directory.flying)
        torn = directory.torn
    assert owed > 200 * POINTS, "the crashes had something to lose"
    assert flying > 2 * POINTS, "and hit writes that were not alone"
    assert torn > 5 * POINTS


@pytest.mark.slow
def test_the_end_of_the_log_never_left_the_page_cache(
    recording: Recording, restart: Restart, images: Callable[[], Path]
) -> None:
    """A power cut beside the kill: what it costs is what the lost records named, and never a wrong page."""
    lost_some = 0
    for turn, (directory, chance) in enumerate(moments(recording, POINTS // 10, 2)):
        bytes_lost = chance.randrange(1, 32 * RECORD_BYTES)
        directory.crash(image := images(), chance, bytes_lost)
        found = restart.look(image, engines()[turn % len(engines())], directory.owed)
        # One more for the record that was cut through, one for the slot that the tier's next page took.
        check(directory, found, share=1.0, lost=bytes_lost // RECORD_BYTES + 2)
        lost_some += not directory.owed <= found.served
    assert lost_some, "the log did lose its end"


def test_the_check_sees_wrong_and_lost_pages(
    recording: Recording, restart: Restart, images: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: damage that verification finds, the same damage without it, and pages that are gone."""
    (directory, chance) = list(moments(recording, 20, 3))[10]
    shape, space = SlotShape.of_namespace(SPACES[0]), SPACES[0].digest
    slots = {
        (space, bytes(data[at + 32 : at + 64])): (path, at)
        for path, data in directory.files.items()
        if path.endswith(".ext")
        for at in range(4096, len(data) - shape.slot_bytes + 1, shape.slot_bytes)
        if data[at : at + 8] == b"HICSLOT1"
    }
    owed = sorted(directory.owed & slots.keys())
    victim = owed[len(owed) // 2]
    path, at = slots[victim]
    directory.files[path][at + shape.header_bytes + 5000] ^= 1

    directory.crash(image := images(), chance)
    found = restart.look(image, "threads", directory.owed)
    check(directory, found)
    assert victim not in found.served
    assert found.stats["corrupt"]

    monkeypatch.setattr(slot_transfers, "judge", lambda *_: Verdict.VALID)
    directory.crash(image := images(), chance)
    found = restart.look(image, "threads", directory.owed)
    assert victim in found.wrong
    with pytest.raises(AssertionError):
        check(directory, found)
    monkeypatch.undo()

    for path, at in (slots[page] for page in owed[::20]):
        directory.files[path][at : at + 8] = bytes(8)
    directory.crash(image := images(), chance)
    with pytest.raises(AssertionError, match="lost"):
        check(directory, restart.look(image, "threads", directory.owed))

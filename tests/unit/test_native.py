"""The native engine beyond moving bytes: slots sealed and judged as Python does, registration, refusal, limits.

What every engine must do with transfers is test_engines' business, what a tier makes of it the contract suite's.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_ext.page import Namespace
from storage_backends.base import Dispatcher, Outcome
from storage_backends.buffers import OwnedMemory
from storage_backends.direct_io import DirectIo
from storage_backends.format import BLOCK, ExtentHeader, SlotHeader, SlotHeaders, SlotShape
from storage_backends.local import LocalBackend
from storage_backends.local.engine import Transfer, open_engine
from storage_backends.local.engine_threads import ThreadsEngine
from storage_backends.local.extents import Extent
from storage_backends.local.slot_transfers import TransferSlots, judge
from storage_backends.local.slots import CancelFlag, SlotEngine, SlotGroup, SlotIo, Verdict
from tests.pages import HostPool, chain, namespace
from tests.tiers import local_tiers

_io = pytest.importorskip("hicache_ext._io", reason="not built")
from storage_backends.local.engine_native import (  # noqa: E402 - only where it is built
    NativeEngine,
    polling_refused,
    rings_for,
)

PATIENCE = 30.0
SHAPES = [(8192, 8192), (4096,), (65536 + 4096, 4096), (70272,), (1 << 20, 1 << 20)]


@pytest.fixture
def engine() -> Iterator[NativeEngine]:
    opened = NativeEngine(rings=2, depth=8)
    yield opened
    assert opened.close(PATIENCE)


class Ends:
    """Collects the ends of one group."""

    def __init__(self) -> None:
        self.moved: dict[int, int] = {}
        self.verdicts: dict[int, Verdict] = {}
        self.changed = threading.Condition()

    def __call__(self, pages: Sequence[int], moved: Sequence[int], verdicts: bytes) -> None:
        with self.changed:
            for page, result, verdict in zip(pages, moved, verdicts, strict=True):
                assert page not in self.moved, "a page ended twice"
                self.moved[page], self.verdicts[page] = result, Verdict(verdict)
            self.changed.notify_all()

    def wait(self, count: int) -> list[Verdict]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.moved) == count, PATIENCE)
        return [self.verdicts[page] for page in range(count)]


class Slots:
    """An extent of slots in a file, written and read through a slot engine."""

    def __init__(self, path: Path, space: Namespace, count: int, skew: int = 0) -> None:
        self.space, self.count = space, count
        layout = space.layout
        self.shape = SlotShape.of_namespace(space)
        self.io = SlotIo(layout.buffer_lengths, layout.page_size, 4096, lambda address, length: None)
        self.path = path
        size = BLOCK + count * self.shape.slot_bytes
        header = ExtentHeader(1, self.shape.slot_bytes, size, count, 0, space.digest, 0)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        except OSError:
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.truncate(fd, size)
        self.extent = Extent(path, 0, header, fd)
        self.pool = HostPool(space, count, skew)

    def run(self, engine: SlotEngine, keys: list[bytes], write: bool, cancelled: CancelFlag | None = None) -> Ends:
        batch = self.pool.write_batch(keys) if write else self.pool.batch(keys)
        bounced = self.io.must_bounce(batch)
        ends, at, count = Ends(), 0, len(keys)
        while at < count:
            left = list(range(at, count))
            group = self.io.group(
                batch, left, write, bounced, [self.extent] * len(left), left, cancelled or CancelFlag(),
                partial(self._ended, ends, at, holder := []),
            )  # fmt: skip
            holder.append(group)
            if write:
                self.io.write_headers(group, batch, left[: len(group)], [7 + p for p in left[: len(group)]], 99)
            at += len(group)
            engine.submit_slots(group)
        return ends

    def _ended(
        self, ends: Ends, first: int, holder: list[SlotGroup], pages: Sequence[int], moved: Sequence[int], v: bytes
    ) -> None:
        self.io.give(holder[0], pages)
        ends([first + page for page in pages], moved, v)


@pytest.mark.parametrize("skew", [0, 72])
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_native_and_python_read_what_the_other_wrote(
    engine: NativeEngine, tmp_path: Path, lengths: tuple[int, ...], skew: int
) -> None:
    python_engine = ThreadsEngine(workers=2)
    python, count = TransferSlots(python_engine), 40 if sum(lengths) < 1 << 20 else 10
    keys = chain("a", count)
    files = []
    for name, writer, reader in (("n", engine, python), ("p", python, engine)):
        slots = Slots(tmp_path / name, namespace(lengths), count, skew)
        if skew == 0:
            engine.register_memory(slots.pool.memory.address, slots.pool.memory.size)
        ends = slots.run(writer, keys, True)
        ends.wait(count)
        bounced = slots.io.must_bounce(slots.pool.batch(keys))
        whole = slots.shape.slot_bytes if bounced else slots.shape.header_bytes + sum(lengths)
        assert set(ends.moved.values()) == {whole}
        for who in (reader, writer):
            slots.pool.poison()
            assert slots.run(who, keys, False).wait(count) == [Verdict.VALID] * count
            assert all(slots.pool.right(page, key) for page, key in enumerate(keys))
        assert slots.run(engine, keys[1:], False).wait(count - 1) == [Verdict.OTHER_PAGE] * (count - 1)
        files.append(slots.path.read_bytes())
    assert files[0] == files[1], "both wrote the same bytes"
    assert python_engine.close(PATIENCE)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200_000), min_size=1, max_size=6).map(tuple),
    salt=st.text(max_size=20),
    tokens=st.booleans(),
    events=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_headers_of_many_are_headers_of_one(
    lengths: tuple[int, ...], salt: str, tokens: bool, events: bool, seed: int
) -> None:
    space = namespace(lengths)
    shape, chance = SlotShape.of_namespace(space), np.random.default_rng(seed)
    keys, parents, count = b"".join(chain("k", 3)), b"".join(chain("p", 3)), 3
    ids = chance.integers(0, 1 << 32, (count, 16), np.uint32) if tokens else None
    hashes = chance.integers(-5, 5, (count, 2), np.int64) if events else None
    rows = chance.integers(0, 256, (8, shape.slot_bytes), np.uint8)
    which = np.array([5, 0, 6])
    generations = np.array([1 << 40, 2, 3], np.uint64)
    many = SlotHeaders(space, shape, 16 if tokens else None, salt, "adapter")
    many.write(rows, which, keys, parents, generations, 1234, ids, hashes)
    for page, row in enumerate(which):
        one = SlotHeader(
            space.digest, keys[32 * page : 32 * page + 32], parents[32 * page : 32 * page + 32],
            int(generations[page]), 1234, lengths, np.zeros(shape.chunks, np.uint32), "kv",
            None if ids is None else ids[page], *((0, 0) if hashes is None else hashes[page].tolist()), salt, "adapter",
        )  # fmt: skip
        raw = bytearray(shape.header_bytes)
        one.encode_into(memoryview(raw))
        raw[140:144] = bytes(4)
        assert bytes(rows[row, : shape.header_bytes]) == bytes(raw)


def test_both_judge_random_damage_alike(tmp_path: Path) -> None:
    """A slot in memory, damaged in every way that disks and bugs know, resealed or not: the same verdict from both."""
    chance = random.Random(11)
    seen: dict[Verdict, int] = dict.fromkeys(Verdict, 0)
    for lengths in SHAPES[:4]:
        space, key = namespace(lengths), chain("a", 1)[0]
        shape = SlotShape.of_namespace(space)
        room = OwnedMemory(shape.slot_bytes)
        start = np.cumsum([shape.header_bytes, *lengths[:-1]]).astype(np.uint64)
        addresses, sizes = start + np.uint64(room.address), np.array(lengths, np.uint64)
        whole = _sealed_slot(space, key)
        for _ in range(2500):
            raw = bytearray(whole)
            moved = len(raw)
            for _ in range(chance.choice([0, 1, 1, 2])):
                moved = min(moved, _damage(raw, shape, chance))
            if chance.random() < 0.5:
                _reseal(raw, chance)
            room.view[: len(raw)] = raw
            asked = chance.choice([key, key, key, b"x" * 32])
            header = room.view[: shape.header_bytes]
            expected = judge(shape, space.digest, asked, header, addresses, sizes, moved)
            got = _io.verify(space.digest, asked, room.address, shape.header_bytes, addresses, sizes, max(moved, 0))
            assert Verdict(got) == expected
            seen[expected] += 1
    assert min(seen[verdict] for verdict in Verdict if verdict is not Verdict.UNCHECKED) > 300


def _sealed_slot(space: Namespace, key: bytes) -> bytes:
    from storage_backends.checksum import chunk_crcs
    from tests.pages import content

    shape, payload = SlotShape.of_namespace(space), np.ascontiguousarray(content(space, key))
    lengths = np.array(space.layout.buffer_lengths, np.uint64)
    starts = np.cumsum([0, *lengths[:-1].tolist()]).astype(np.uint64)
    crcs = chunk_crcs(starts + np.uint64(payload.ctypes.data), lengths)
    raw = bytearray(shape.header_bytes)
    tokens = np.arange(16, dtype=np.uint32)
    SlotHeader(space.digest, key, bytes(32), 5, 6, space.layout.buffer_lengths, crcs, "kv", tokens).encode_into(
        memoryview(raw)
    )
    return bytes(raw) + payload.tobytes()


#: Every field of the header, by offset and size (format.py).
_FIELDS = [
    (0, 8), (8, 2), (10, 2), (12, 4), (16, 16), (32, 32), (64, 32), (96, 8), (104, 8), (112, 8), (120, 4), (124, 4),
    (128, 4), (132, 2), (134, 2), (136, 4), (140, 4), (144, 8), (160, 2), (162, 2), (164, 28), (192, 8), (200, 4),
]  # fmt: skip


def _damage(raw: bytearray, shape: SlotShape, chance: random.Random) -> int:
    """Damage in place; how many bytes are said to have arrived."""
    match chance.choice(["bit", "field", "small", "short", "payload", "zero"]):
        case "bit":
            at = chance.randrange(300)
            raw[at] ^= 1 << chance.randrange(8)
        case "field":
            at, size = chance.choice(_FIELDS)
            raw[at : at + size] = chance.randbytes(size)
        case "small":  # a plausible number in a field of sizes
            at, size = chance.choice([(12, 4), (112, 8), (120, 4), (124, 4), (134, 2), (136, 4), (160, 2), (192, 8)])
            value = chance.choice([0, 1, 2, 3, 4096, 8192, 16384, 65536, 1 << (8 * size - 1), (1 << (8 * size)) - 1])
            raw[at : at + size] = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        case "short":
            return chance.choice([0, 100, shape.header_bytes, len(raw) - 1, len(raw) // 2])
        case "payload":
            at = chance.randrange(shape.header_bytes, len(raw))
            raw[at] ^= 1 << chance.randrange(8)
        case "zero":
            at = chance.randrange(0, len(raw), 512)
            raw[at : at + 512] = bytes(len(raw[at : at + 512]))
    return len(raw)


def _reseal(raw: bytearray, chance: random.Random) -> None:
    """A header that was wrong before it was sealed: what a bug would write."""
    from storage_backends.checksum import crc32c

    size = int.from_bytes(raw[12:16], "little")
    if not BLOCK <= size <= len(raw):
        return
    raw[140:144] = bytes(4)
    raw[140:144] = crc32c(raw[:size]).to_bytes(4, "little")


def test_a_buffer_may_lie_in_two_registered_pieces_or_in_none(engine: NativeEngine, tmp_path: Path) -> None:
    slots, keys = Slots(tmp_path / "file", namespace((1 << 20, 1 << 20)), 8), chain("a", 8)
    memory = slots.pool.memory
    cut = memory.address + (3 << 19)  # in the middle of a buffer
    engine.register_memory(memory.address, cut - memory.address)
    engine.register_memory(cut, 4 << 20)
    assert engine._io.registered_bytes == cut - memory.address + (4 << 20)
    slots.run(engine, keys, True).wait(8)
    slots.pool.poison()
    assert slots.run(engine, keys, False).wait(8) == [Verdict.VALID] * 8
    assert all(slots.pool.right(page, key) for page, key in enumerate(keys))


def test_memory_that_comes_back_elsewhere_is_registered_anew(engine: NativeEngine, tmp_path: Path) -> None:
    """The table names pages, not addresses: after another mapping took the place, the old pages must not be used."""
    import mmap

    slots, keys = Slots(tmp_path / "file", namespace((1 << 20, 1 << 20)), 8), chain("a", 8)
    memory = slots.pool.memory
    engine.register_memory(memory.address, memory.size)
    slots.run(engine, keys, True).wait(8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    got = libc.mmap(
        ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.size), mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0
    )
    assert got == memory.address
    engine.register_memory(memory.address, memory.size)
    assert engine._io.registered_bytes == memory.size
    assert slots.run(engine, keys, False).wait(8) == [Verdict.VALID] * 8
    assert all(slots.pool.right(page, key) for page, key in enumerate(keys))


def test_files_are_let_go_of(engine: NativeEngine, tmp_path: Path) -> None:
    """A registered file is held by the ring: until it is let go of, a deleted file keeps its space."""
    slots, keys = Slots(tmp_path / "file", namespace(), 8), chain("a", 8)
    slots.run(engine, keys, True).wait(8)
    reader, writer = os.pipe()
    pipe = Extent(tmp_path, 0, slots.extent.header, writer)
    other = Slots(tmp_path / "other", namespace(), 1)
    real, other.extent = other.extent, pipe
    other.run(engine, keys[:1], True).wait(1)  # registers the pipe, which takes it as bytes
    os.close(writer)
    os.set_blocking(reader, False)
    os.read(reader, 1 << 20)
    engine.retain_files([slots.extent.serial, real.serial])
    deadline = time.monotonic() + PATIENCE
    end = None
    while end != b"" and time.monotonic() < deadline:
        try:
            end = os.read(reader, 1 << 20)  # b"" once nobody has the other end
        except BlockingIOError:
            time.sleep(0.01)
    assert end == b""
    os.close(reader)


def test_cancelled_pages_do_not_begin(engine: NativeEngine, tmp_path: Path) -> None:
    slots, keys, flag = Slots(tmp_path / "file", namespace(), 20), chain("a", 20), CancelFlag()
    flag.set()
    ends = slots.run(engine, keys, False, flag)
    assert ends.wait(20) == [Verdict.UNCHECKED] * 20
    assert set(ends.moved.values()) == {-errno.ECANCELED}


def test_close_recalls_what_the_kernel_can_still_recall() -> None:
    engine, memory = NativeEngine(), OwnedMemory(4096)
    reader, writer = os.pipe()
    results: list[int] = []
    iov = np.array([[memory.address, 4]], np.uint64)
    engine.submit([Transfer(reader, 0, iov, False, results.append)])
    time.sleep(0.05)
    assert engine.close(PATIENCE)
    assert results == [-errno.ECANCELED]
    os.close(reader)
    os.close(writer)


def test_slots_after_close_and_in_a_child_are_refused(tmp_path: Path) -> None:
    engine, slots, keys = NativeEngine(), Slots(tmp_path / "file", namespace(), 4), chain("a", 4)
    slots.run(engine, keys, True).wait(4)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ends = slots.run(engine, keys, False)
            ends.wait(4)
            code = 0 if set(ends.moved.values()) == {-errno.ECANCELED} and engine.close(1.0) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert slots.run(engine, keys, False).wait(4) == [Verdict.VALID] * 4
    assert engine.close(PATIENCE)
    ends = slots.run(engine, keys, False)
    ends.wait(4)
    assert set(ends.moved.values()) == {-errno.ECANCELED}


def test_groups_from_many_threads_under_close(tmp_path: Path) -> None:
    engine, keys = NativeEngine(), chain("a", 32)
    slots = [Slots(tmp_path / f"{t}", namespace((65536, 65536)), 32) for t in range(4)]
    for one in slots:
        one.run(engine, keys, True).wait(32)
    wrong: list[object] = []

    def work(one: Slots) -> None:
        for _ in range(200):
            ends = one.run(engine, keys, False)
            ends.wait(32)
            results = set(zip(ends.moved.values(), ends.verdicts.values(), strict=True))
            whole = (one.shape.header_bytes + 131072, Verdict.VALID)
            wrong.extend(results - {whole, (-errno.ECANCELED, Verdict.UNCHECKED)})

    threads = [threading.Thread(target=work, args=(one,)) for one in slots]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert engine.close(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert wrong == []


def test_a_batch_that_is_not_its_namespaces_is_a_mistake(tmp_path: Path) -> None:
    slots = Slots(tmp_path / "file", namespace((8192, 8192)), 2)
    other = HostPool(namespace((8192, 4096)), 2)
    with pytest.raises(ValueError, match="not those of its namespace"):
        slots.io.must_bounce(other.batch(chain("a", 2)))


def test_rings_follow_the_machine() -> None:
    assert [rings_for(processors) for processors in (1, 2, 8, 16, 24, 256)] == [2, 2, 2, 4, 6, 6]


@pytest.mark.parametrize("options", [{"rings": 0}, {"depth": 0}, {"rings": 65}, {"depth": 5000}])
def test_absurd_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="depth"):
        NativeEngine(**options)


def test_sqpoll_works_where_it_is_allowed(tmp_path: Path) -> None:
    engine, slots, keys = NativeEngine(rings=1, sqpoll=True), Slots(tmp_path / "f", namespace(), 40), chain("a", 40)
    slots.run(engine, keys, True).wait(40)
    slots.pool.poison()
    assert slots.run(engine, keys, False).wait(40) == [Verdict.VALID] * 40
    assert all(slots.pool.right(page, key) for page, key in enumerate(keys))
    assert engine.close(PATIENCE)


@pytest.mark.parametrize(
    "engine_options", [{"sqpoll": True}, {"iopoll": True}, {"sqpoll": True, "iopoll": True}], ids=str
)
def test_polling_works_or_is_left_off_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, engine_options: dict[str, bool]
) -> None:
    """A device without polled queues refuses each request, not the ring: that must show before a page depends on it."""
    with caplog.at_level(logging.WARNING):
        engine = open_engine("native", directory=tmp_path, **engine_options)
    assert isinstance(engine, NativeEngine)
    refused = polling_refused(tmp_path) if "iopoll" in engine_options else ""
    assert [f"completions are not polled: {refused}" in record.message for record in caplog.records] == [True] * bool(
        refused
    )
    assert ("SQPOLL" in engine.description) == ("sqpoll" in engine_options)
    assert ("IOPOLL" in engine.description) == ("iopoll" in engine_options and not refused)
    assert list(tmp_path.iterdir()) == [], "the probe's file is gone"
    slots, keys = Slots(tmp_path / "f", namespace(), 40), chain("a", 40)
    slots.run(engine, keys, True).wait(40)
    slots.pool.poison()
    assert slots.run(engine, keys, False).wait(40) == [Verdict.VALID] * 40
    assert all(slots.pool.right(page, key) for page, key in enumerate(keys))
    assert engine.close(PATIENCE)


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_a_tier_with_sqpoll_serves_pages(tmp_path: Path, engine: str) -> None:
    with local_tiers(tmp_path / "tier", engine) as open_one:
        backend = open_one(sqpoll=True, iopoll=True)
        opened = backend._tier.disks.bays[0].disk
        assert opened is not None
        if engine == "auto" and not opened.direct.works:
            pytest.skip("auto takes the native engine for direct I/O only")
        assert isinstance(opened.engine, NativeEngine)
        assert "SQPOLL" in opened.engine.description
        assert ("IOPOLL" in opened.engine.description) == (not polling_refused(tmp_path))
        pool, keys = HostPool(namespace(), 40), chain("a", 40)
        assert backend.write(pool.write_batch(keys)).result(PATIENCE) == [Outcome.HIT] * 40
        pool.poison()
        assert backend.read(pool.batch(keys)).result(PATIENCE) == [Outcome.HIT] * 40
        assert all(pool.right(page, key) for page, key in enumerate(keys))


def test_polling_that_another_engine_lacks_is_left_off_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("storage_backends.local.engine.PREFERENCE", ("threads",))
    with caplog.at_level(logging.WARNING), local_tiers(tmp_path / "tier", "auto") as open_one:
        open_one(sqpoll=True)
    lines = [record.getMessage() for record in caplog.records if "I/O engine" in record.getMessage()]
    assert lines == ["I/O engine threads has no sqpoll: left off"]
    with pytest.raises(ValueError, match="use engine: native or auto, not threads"):
        LocalBackend.Options.model_validate(
            {"path": tmp_path, "capacity": 16 << 20, "engine": "threads", "iopoll": True}
        )


_LITTLE_MEMLOCK = """
    import logging, os, resource, sys
    import numpy as np
    logging.basicConfig(level=logging.WARNING)
    from storage_backends.buffers import OwnedMemory
    from storage_backends.local.engine import Transfer, open_engine
    import storage_backends.local.engine_native  # while this user may still read the file
    fd = os.open(sys.argv[1], os.O_RDWR)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    if os.getuid() == 0:
        os.setuid(65534)  # root has no limit
    engine = open_engine("native")
    memory = OwnedMemory(8 << 20)
    engine.register_memory(memory.address, memory.size)
    engine.register_memory(memory.address, memory.size)
    import threading
    ended, results = threading.Event(), []
    iov = np.array([[memory.address, 4 << 20]], np.uint64)
    engine.submit([Transfer(fd, 0, iov, True, lambda n: (results.append(n), ended.set()))])
    assert ended.wait(30)
    print(results, engine._io.registered_bytes, engine.close(30))
"""


def test_a_low_limit_of_locked_memory_is_said_once_and_lived_with(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_LITTLE_MEMLOCK), str(file)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if "native" in done.stderr and "OptionError" in done.stderr:
        pytest.skip(f"no ring at all under such a limit: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"[{4 << 20}] 0 True"
    assert done.stderr.count("limit of locked memory") == 1


def test_a_file_system_without_direct_io_gets_the_next_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = DirectIo(False, 1, 1, "refused on purpose")
    monkeypatch.setattr("storage_backends.local.disk.probe_direct", lambda path: refused)
    dispatcher = Dispatcher()
    for choice, passed_over in (("auto", "native: the file system does no direct I/O"), ("native", "")):
        options = {"path": tmp_path / choice, "capacity": 16 << 20, "engine": choice}
        backend = LocalBackend(LocalBackend.Options.model_validate(options), dispatcher)
        stats = backend.stats()
        assert (stats["engine"] == "native") == (choice == "native")
        assert str(stats["engines_passed_over"]).startswith(passed_over)
        pool, keys = HostPool(namespace(), 8), chain("a", 8)
        assert backend.write(pool.write_batch(keys)).result(30) == [Outcome.HIT] * 8
        pool.poison()
        assert backend.read(pool.batch(keys)).result(30) == [Outcome.HIT] * 8
        assert all(pool.right(page, key) for page, key in enumerate(keys))
        backend.close()
    dispatcher.close()


def test_where_io_uring_is_forbidden_the_reason_is_told() -> None:
    program = "from storage_backends.local.engine import open_engine; e = open_engine(); print(e.name, e.passed_over)"
    done = subprocess.run(
        [sys.executable, "-m", "tests.seccomp", "errno", sys.executable, "-c", program],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.startswith("threads {'native': 'io_uring is forbidden here"), done.stdout + done.stderr


def test_the_interpreter_ends_with_an_engine_open_and_busy(tmp_path: Path) -> None:
    program = """
        import os, sys, numpy as np
        from storage_backends.buffers import OwnedMemory
        from storage_backends.local.engine import Transfer, open_engine
        from storage_backends.local.engine_native import NativeEngine
        memory = OwnedMemory(4 << 20)
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 4 << 20)
        engine = NativeEngine()
        iov = np.array([[memory.address, 4 << 20]], np.uint64)
        engine.submit([Transfer(fd, 0, iov, False, lambda n: None) for _ in range(500)])
        print("out")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "f")],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")

"""I/O engines: every engine through one suite, on a real file (O_DIRECT where the file system has it).

Belongs here: moving bytes, errors, close, fork. The choice of an engine is test_engine_choice's.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_backends.buffers import OwnedMemory
from storage_backends.local.engine import EngineUnavailable, IoEngine, Transfer
from storage_backends.local.engine_liburing import LiburingEngine
from storage_backends.local.engine_threads import ThreadsEngine
from storage_backends.vectored import STALLS, outcome, rest_of

BLOCK = 4096
ROOM = 4 << 20
PATIENCE = 30.0


class Results:
    """Collects what `done` was given, by transfer."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.threads: set[int] = set()
        self._changed = threading.Condition()

    def slot(self, number: int) -> Callable[[int], None]:
        def done(result: int) -> None:
            with self._changed:
                assert number not in self.values, "done was called twice"
                self.values[number] = result
                self.threads.add(threading.get_ident())
                self._changed.notify_all()

        return done

    def wait(self, count: int) -> list[int]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.values) >= count, PATIENCE), f"{len(self.values)} of {count}"
            return [self.values[i] for i in sorted(self.values)]


def make(name: str) -> IoEngine:
    try:
        if name == "native":
            from storage_backends.local.engine_native import NativeEngine

            return NativeEngine()
        return {"threads": ThreadsEngine, "liburing": LiburingEngine}[name]()
    except ModuleNotFoundError:
        pytest.skip(f"{name}: not built")
    except EngineUnavailable as error:
        pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="module", params=["threads", "liburing", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[IoEngine]:
    opened = make(request.param)
    yield opened
    assert opened.close(PATIENCE)


@pytest.fixture(scope="module")
def memory() -> OwnedMemory:
    return OwnedMemory(2 * ROOM)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("engines") / "file"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:  # a file system without O_DIRECT
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, ROOM)
    yield fd
    os.close(fd)


def iov(*buffers: tuple[int, int]) -> np.ndarray:
    return np.array(buffers, np.uint64).reshape(-1, 2)


def run(engine: IoEngine, fd: int, offset: int, buffers: np.ndarray, write: bool) -> int:
    results = Results()
    engine.submit([Transfer(fd, offset, buffers, write, results.slot(0))])
    return results.wait(1)[0]


def split(address: int, sizes: list[int]) -> np.ndarray:
    starts = np.cumsum([0, *sizes[:-1]])
    return iov(*[(address + int(start), size) for start, size in zip(starts, sizes, strict=True)])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    write=st.lists(st.integers(1, 24), min_size=1, max_size=12),
    read=st.lists(st.integers(1, 24), min_size=1, max_size=12),
    first=st.integers(0, 64),
    seed=st.integers(0, 1 << 30),
)
def test_vectored_round_trip(
    engine: IoEngine, memory: OwnedMemory, file: int, write: list[int], read: list[int], first: int, seed: int
) -> None:
    total = sum(write)
    data = np.frombuffer(memory.view, np.uint8)
    data[: total * BLOCK] = np.random.default_rng(seed).integers(0, 256, total * BLOCK, np.uint8)
    data[ROOM:] = 0
    out = split(memory.address, [n * BLOCK for n in write])
    assert run(engine, file, first * BLOCK, out, True) == total * BLOCK
    # Read the same span, split differently, with the buffers in the reverse order of their addresses.
    sizes: list[int] = []
    for n in read:
        sizes.append(min(n, total - sum(sizes)))
    sizes = [n * BLOCK for n in [*sizes, total - sum(sizes)] if n]
    back = iov(*[(memory.address + ROOM + sum(sizes[i + 1 :]), sizes[i]) for i in range(len(sizes))])
    assert run(engine, file, first * BLOCK, back, False) == total * BLOCK
    got = b"".join(bytes(data[int(a) - memory.address :][: int(n)]) for a, n in back)
    assert got == bytes(data[: total * BLOCK])


def test_more_buffers_than_one_call_takes(engine: IoEngine, memory: OwnedMemory, tmp_path: Path) -> None:
    data = np.frombuffer(memory.view, np.uint8)
    data[:25000] = np.random.default_rng(5).integers(0, 256, 25000, np.uint8)
    fd = os.open(tmp_path / "many", os.O_RDWR | os.O_CREAT)
    assert run(engine, fd, 0, split(memory.address, [10] * 2500), True) == 25000
    assert run(engine, fd, 0, split(memory.address + ROOM, [10] * 2500), False) == 25000
    assert bytes(data[:25000]) == bytes(data[ROOM : ROOM + 25000])
    os.close(fd)


@pytest.mark.parametrize("tail", [0, BLOCK, 1000])
def test_read_at_the_end_of_the_file_gives_what_is_there(
    engine: IoEngine, memory: OwnedMemory, tmp_path: Path, tail: int
) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * (BLOCK + tail))
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT):
        try:
            fd = os.open(path, flags)
        except OSError:
            continue
        assert (
            run(engine, fd, 0, iov((memory.address, BLOCK), (memory.address + ROOM, 4 * BLOCK)), False) == BLOCK + tail
        )
        assert run(engine, fd, 16 * BLOCK, iov((memory.address, BLOCK)), False) == 0
        os.close(fd)


def test_errors_are_numbers(engine: IoEngine, memory: OwnedMemory, file: int, tmp_path: Path) -> None:
    one = iov((memory.address, BLOCK))
    closed = os.dup(file)
    os.close(closed)
    assert run(engine, closed, 0, one, False) == -errno.EBADF
    assert run(engine, -1, 0, one, True) == -errno.EBADF
    (tmp_path / "readonly").write_bytes(b"y" * BLOCK)
    fd = os.open(tmp_path / "readonly", os.O_RDONLY)
    assert run(engine, fd, 0, one, True) == -errno.EBADF
    assert run(engine, fd, 0, iov((16, BLOCK)), False) == -errno.EFAULT
    os.close(fd)
    full = os.open("/dev/full", os.O_WRONLY)
    assert run(engine, full, 0, one, True) == -errno.ENOSPC
    os.close(full)


def test_empty_transfers_and_batches(engine: IoEngine, file: int) -> None:
    engine.submit([])
    assert run(engine, file, 0, np.empty((0, 2), np.uint64), False) == 0


def test_wrong_arrays_are_the_callers_error(engine: IoEngine, file: int) -> None:
    for wrong in (np.zeros((1, 2), np.int64), np.zeros(2, np.uint64), np.zeros((2, 3), np.uint64)):
        with pytest.raises(TypeError, match="iov"):
            engine.submit([Transfer(file, 0, wrong, False, lambda _: None)])


def test_done_that_raises_stops_nothing(engine: IoEngine, memory: OwnedMemory, file: int) -> None:
    def broken(_: int) -> None:
        raise ValueError("broken on purpose")

    one = iov((memory.address, BLOCK))
    engine.submit([Transfer(file, 0, one, False, broken) for _ in range(40)])
    assert run(engine, file, 0, one, False) == BLOCK


def test_batches_from_many_threads(engine: IoEngine, memory: OwnedMemory, file: int) -> None:
    results = Results()
    threads, batches, size = 4, 10, 20
    data = np.frombuffer(memory.view, np.uint64)
    data[: ROOM // 8] = np.arange(ROOM // 8)
    assert run(engine, file, 0, iov((memory.address, ROOM)), True) == ROOM
    blocks = ROOM // BLOCK

    def caller(t: int) -> None:
        for b in range(batches):
            first = (t * batches + b) * size
            engine.submit(
                [
                    Transfer(file, i * BLOCK, iov((memory.address + ROOM + i * BLOCK, BLOCK)), False, results.slot(i))
                    for i in range(first, first + size)
                ]
            )

    callers = [threading.Thread(target=caller, args=(t,)) for t in range(threads)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    count = threads * batches * size
    assert count <= blocks
    assert results.wait(count) == [BLOCK] * count
    assert np.array_equal(data[: count * BLOCK // 8], data[ROOM // 8 :][: count * BLOCK // 8])
    assert not results.threads & {thread.ident for thread in [*callers, threading.current_thread()]}


@pytest.mark.parametrize("name", ["threads", "liburing", "native"])
def test_close_under_load(name: str, memory: OwnedMemory, file: int) -> None:
    engine, results = make(name), Results()
    count = 2000
    engine.submit([Transfer(file, 0, iov((memory.address, 64 * BLOCK)), False, results.slot(i)) for i in range(count)])
    assert engine.close(PATIENCE)
    values = results.wait(count)
    assert set(values) <= {64 * BLOCK, -errno.ECANCELED}
    assert values.count(-errno.ECANCELED) > 0
    assert engine.close(1.0)
    assert run(engine, file, 0, iov((memory.address, BLOCK)), False) == -errno.ECANCELED


def test_close_says_when_a_transfer_did_not_end(memory: OwnedMemory) -> None:
    engine = make("liburing")
    reader, writer = os.pipe()
    results = Results()
    engine.submit([Transfer(reader, 0, iov((memory.address, 4)), False, results.slot(0))])
    time.sleep(0.05)
    assert not engine.close(0.05)
    assert not results.values, "an outcome while the kernel can still write the buffer"
    os.write(writer, b"late")
    assert results.wait(1) == [4]
    assert engine.close(PATIENCE)
    os.close(reader)
    os.close(writer)


def test_cancel_before_it_begins(engine: IoEngine, memory: OwnedMemory, file: int) -> None:
    results, cancelled = Results(), threading.Event()
    cancelled.set()
    one = iov((memory.address, BLOCK))
    engine.submit([Transfer(file, 0, one, i % 2 == 0, results.slot(i), cancelled) for i in range(4)])
    assert results.wait(4) == [-errno.ECANCELED] * 4


def test_forked_child_is_refused_and_parent_goes_on(engine: IoEngine, memory: OwnedMemory, file: int) -> None:
    one = iov((memory.address, BLOCK))
    assert run(engine, file, 0, one, False) == BLOCK
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if run(engine, file, 0, one, False) == -errno.ECANCELED and engine.close(1.0) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run(engine, file, 0, one, False) == BLOCK


@pytest.mark.parametrize("name", ["liburing", "native"])
def test_waiting_leaves_the_interpreter_to_others(name: str, memory: OwnedMemory) -> None:
    engine = make(name)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    reader, writer = os.pipe()
    results = Results()
    engine.submit([Transfer(reader, 0, iov((memory.address, 4)), False, results.slot(0))])
    while ticks[0] < 20 and not results.values:
        time.sleep(0.01)
    assert not results.values
    os.write(writer, b"done")
    assert results.wait(1) == [4]
    stop.set()
    ticker.join()
    assert engine.close(PATIENCE)
    os.close(reader)
    os.close(writer)


def test_transfers_leave_the_interpreter_to_others(engine: IoEngine, memory: OwnedMemory, file: int) -> None:
    ticks, busy = 0, threading.Event()
    results = Results()
    engine.submit([Transfer(file, 0, iov((memory.address, ROOM)), False, results.slot(i)) for i in range(60)])
    while len(results.values) < 60 and not busy.wait(0.001):
        ticks += 1
    assert ticks > 0
    assert results.wait(60) == [ROOM] * 60


@pytest.mark.parametrize("name", ["threads", "liburing", "native"])
def test_nothing_is_kept_after_transfers(name: str, memory: OwnedMemory, file: int) -> None:
    engine = make(name)

    def some() -> None:
        results = Results()
        engine.submit(
            [Transfer(file, 0, split(memory.address, [BLOCK] * 16), False, results.slot(i)) for i in range(100)]
        )
        results.wait(100)

    some()
    tracemalloc.start()
    try:
        some()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(5):
            some()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert engine.close(PATIENCE)
    assert grown < 50_000, f"{grown} bytes stay after 8,000 buffers"


# The parts, as tables.


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        (0, [(100, 10), (200, 0), (300, 20)]),
        (3, [(103, 7), (200, 0), (300, 20)]),
        (10, [(300, 20)]),
        (29, [(319, 1)]),
    ],
)
def test_rest_of(moved: int, expected: list[tuple[int, int]]) -> None:
    buffers = iov((100, 10), (200, 0), (300, 20))
    assert rest_of(buffers, moved).tolist() == [list(pair) for pair in expected]
    assert buffers.tolist() == [[100, 10], [200, 0], [300, 20]]


@pytest.mark.parametrize(
    ("result", "moved", "write", "expected"),
    [
        (8192, 0, False, 8192),
        (4096, 4096, False, 8192),
        (4096, 0, False, None),
        (0, 4096, False, 4096),
        (0, 0, True, 0),
        (-errno.EINTR, 0, False, None),
        (-errno.EAGAIN, 4096, True, None),
        (-errno.EIO, 4096, False, -errno.EIO),
        (-errno.EINVAL, 0, False, -errno.EINVAL),
        (-errno.EINVAL, 4096, False, -errno.EINVAL),
        (-errno.EINVAL, 1000, False, 1000),
        (-errno.EINVAL, 1000, True, -errno.EINVAL),
    ],
)
def test_outcome(result: int, moved: int, write: bool, expected: int | None) -> None:
    assert outcome(result, moved, 8192, write) == expected


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
def test_what_moves_nothing_is_not_repeated_for_ever(number: int) -> None:
    assert outcome(-number, 0, 8192, True, STALLS - 1) is None
    assert outcome(-number, 0, 8192, True, STALLS) == -number
    assert outcome(4096, 0, 8192, True, STALLS) is None, "this call did move something"

"""The memory tier's way past the host on a GPU: real copies, streams, pinning and checksum kernels.

The same cases over a driver that stands in, and its faults: tests/unit/test_memory_device.py.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from storage_backends.base import Completion, Dispatcher, Outcome
from storage_backends.memory import MemoryBackend
from tests import memory_cases
from tests.gds_cases import read
from tests.memory_cases import MIB, opened, write
from tests.pages import HostPool, chain, namespace

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
from tests.gpu.pool import GpuPool  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _context() -> None:
    torch.zeros(1, device="cuda")


def test_both_routes_read_what_either_wrote() -> None:
    memory_cases.both_routes_read_what_either_wrote(GpuPool)


def test_regions_are_shared_with_who_reaches_no_device(tmp_path: Path) -> None:
    memory_cases.regions_are_shared_with_who_reaches_no_device(GpuPool, tmp_path / "regions")


def test_bytes_around_a_page_are_left_alone() -> None:
    memory_cases.bytes_around_a_page_are_left_alone(GpuPool)


def test_a_flipped_byte_is_never_served() -> None:
    memory_cases.a_flipped_byte_is_never_served(GpuPool)


def test_memory_that_begins_anywhere() -> None:
    space, keys = namespace((70_272, 5_000)), chain("skewed", 5)
    with opened() as backend:
        pool = GpuPool(space, 5, skew=208)
        assert write(backend, pool, keys) == [Outcome.HIT] * 5
        assert read(backend, pool, keys) == read(backend, HostPool(space, 5), keys) == [Outcome.HIT] * 5


def test_pages_that_go_while_they_are_read() -> None:
    print(dict(memory_cases.pages_that_go_while_they_are_read(GpuPool, 8)))


def test_bytes_that_change_while_they_are_copied() -> None:
    print(dict(memory_cases.bytes_that_change_while_they_are_copied(GpuPool, 5)))


@pytest.mark.parametrize("page", [256 << 10, 2 << 20])
def test_many_batches_at_a_time(page: int) -> None:
    """Loads and saves of both kinds of memory, all under way at once, and more of each than there are lanes."""
    space, pages = namespace((page,)), (48 << 20) // page
    with opened(capacity=1024 * MIB) as backend:
        pools = [(HostPool if i % 4 == 0 else GpuPool)(space, pages) for i in range(8)]
        for turn in range(2):
            chains = [chain(f"{turn} {i}", pages) for i in range(8)]
            writes = [backend.write(pool.write_batch(keys)) for pool, keys in zip(pools, chains, strict=True)]
            assert all(done.result(60) == [Outcome.HIT] * pages for done in writes)
            for pool in pools:
                pool.poison()
            again: list[Completion] = []
            for i, pool in enumerate(pools):  # the next one's pages, while their own are stored once more elsewhere
                again.append(backend.read(pool.batch(chains[(i + 1) % 8])))
            assert all(done.result(60) == [Outcome.HIT] * pages for done in again)
            for i, pool in enumerate(pools):
                assert all(pool.right(page, key) for page, key in enumerate(chains[(i + 1) % 8]))


def test_while_others_compute_and_capture() -> None:
    """A captured graph of somebody else's is not disturbed, nor are kernels on other streams."""
    space, keys = namespace((1 << 20,)), chain("one", 32)
    over, captured, wrong = threading.Event(), [0], list[BaseException]()

    def capturing() -> None:
        try:
            stream = torch.cuda.Stream()
            a = torch.rand((512, 512), device="cuda")
            with torch.cuda.stream(stream):
                wanted = (a @ a).sum()
                stream.synchronize()
                while not over.is_set():
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        b = (a @ a).sum()
                    graph.replay()
                    stream.synchronize()
                    assert torch.allclose(b, wanted)
                    captured[0] += 1
        except BaseException as error:
            wrong.append(error)

    with opened(capacity=128 * MIB) as backend:
        pool = GpuPool(space, 32)
        batch, source = pool.write_batch(keys), pool.batch(keys)
        assert backend.write(batch).result(30) == [Outcome.HIT] * 32
        thread = threading.Thread(target=capturing)
        thread.start()
        until = time.monotonic() + 2
        while time.monotonic() < until or (captured[0] < 5 and not wrong and time.monotonic() < until + 30):
            assert backend.read(source).result(30) == [Outcome.HIT] * 32
        over.set()
        thread.join(60)
        assert not wrong, wrong[0]
        assert captured[0] >= 5
        assert read(backend, pool, keys) == [Outcome.HIT] * 32


def test_memory_is_unpinned_when_it_goes() -> None:
    """What is not unpinned stays the driver's: the next memory at the same addresses could not be pinned."""
    for turn in range(4):
        with opened(capacity=64 * MIB) as backend:
            assert backend._memory is not None
            pages, keys = GpuPool(namespace((1 << 20,)), 4), chain(f"turn {turn}", 4)
            assert write(backend, pages, keys) == read(backend, pages, keys) == [Outcome.HIT] * 4
            assert backend._reach is not None
            data = backend._memory.address + (2 << 20)
            assert backend._reach.device.memory_kind(data + (4 << 20), 32 << 20) == "pinned"
    dropped = MemoryBackend(MemoryBackend.Options.model_validate({"capacity": 64 * MIB}), Dispatcher())
    dropped.reach_device(0)
    assert "pinned" in str(dropped.stats()["device"])
    del dropped
    gc.collect()
    with opened(capacity=64 * MIB):
        pass


def test_a_context_that_is_lost_costs_pages_and_nothing_else(tmp_path: Path) -> None:
    """A kernel that faults takes the context with it. The tier answers, goes on with host memory, and closes."""
    script = f"""
        import numpy as np, torch, time
        from hicache_ext.cuda import open_device
        from storage_backends.base import Outcome
        from tests.gds_cases import read
        from tests.gpu.pool import GpuPool
        from tests.memory_cases import opened, write
        from tests.pages import HostPool, chain, namespace
        torch.zeros(1, device="cuda")
        space, keys = namespace((1 << 20,)), chain("one", 4)
        with opened() as backend:
            pool, host = GpuPool(space, 4), HostPool(space, 4)
            assert write(backend, pool, keys) == [Outcome.HIT] * 4
            batch = pool.batch(keys)
            try:
                sums = np.zeros(1, np.uint32)
                open_device().crc32c(np.array([64], np.uint64), np.array([65536], np.uint32), sums, 0, 1)
            except Exception as error:
                print("lost:", error)
            for _ in range(5):
                assert backend.read(batch).result(30) == [Outcome.FAILED] * 4
            assert backend.capabilities.memory == ("host",)
            assert read(backend, host, keys) == [Outcome.HIT] * 4
            assert write(backend, host, chain("two", 4)) == [Outcome.HIT] * 4
            print(backend.stats()["device"])
            since = time.monotonic()
        assert time.monotonic() - since < 8
        print("done", {str(tmp_path)!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    print(done.stdout, done.stderr[-2000:])
    assert "done" in done.stdout

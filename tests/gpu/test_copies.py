"""Block copies on a GPU: every layout, way, direction and dtype against torch, and every fault that can be made.

Outputs are poisoned: each byte outside the target must be as it was. Pages come in random order on both sides.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hicache_ext.cuda import BlockShape, Copier, CopyError, Way, open_device
from tests.blocks import PAGES, POOLS, SHAPES, filled

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

POISON = 0xA5
IN_POOLS, IN_PAGES, MOVED = 40, 36, 33
#: Pages enough for several launches of the kernel, and several pieces of the stage.
MANY = 600
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


def empty(device: str, poisoned: bool, seed: int = 0, pinned: bool = True) -> Any:
    def make(dims: tuple[int, ...]) -> Any:
        generator = torch.Generator().manual_seed(seed)
        values = (
            torch.full(dims, POISON, dtype=torch.uint8)
            if poisoned
            else torch.randint(0, 256, dims, dtype=torch.uint8, generator=generator)
        )
        if device == "cpu":
            return values.pin_memory() if pinned else values
        return values.to(device)

    return make


class Case:
    """A pool, pages, and what the target must hold once `numbers` have been moved."""

    def __init__(
        self, pools: str, pages: str, shape: BlockShape, load: bool, count: int = MOVED, where: str = "cpu",
        pinned: bool = True,
    ) -> None:  # fmt: skip
        in_pools, in_pages = (count + 7, count + 3) if count > MOVED else (IN_POOLS, IN_PAGES)
        self.load = load
        self.pool_buffer, self.pool_view, a = filled(pools, shape, in_pools, empty("cuda", load, 1))
        self.page_buffer, self.page_view, b = filled(pages, shape, in_pages, empty(where, not load, 2, pinned))
        draw = np.random.default_rng(count)
        self.in_pools = draw.permutation(in_pools)[:count]
        self.in_pages = draw.permutation(in_pages)[:count]
        self.copier = Copier(shape, a, b)
        name, number = (pools, in_pools) if load else (pages, in_pages)
        self.expected_buffer, expected, _ = filled(name, shape, number, empty("cpu", True))
        source, from_, to = (
            (self.page_view, self.in_pages, self.in_pools) if load else (self.pool_view, self.in_pools, self.in_pages)
        )
        expected[torch.from_numpy(to)] = source.cpu()[torch.from_numpy(from_)]

    def go(self, way: Way | None = None, stream: int | None = None, **options: Any) -> Way:
        stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
        if self.load:
            return self.copier.load(self.in_pages, self.in_pools, stream, way, **options)
        return self.copier.store(self.in_pools, self.in_pages, stream, way, **options)

    def check(self) -> None:
        torch.cuda.synchronize()
        target = self.pool_buffer.cpu() if self.load else self.page_buffer.cpu()
        assert torch.equal(target, self.expected_buffer), "a byte outside the target, or a wrong one"

    def untouched(self) -> bool:
        torch.cuda.synchronize()
        return bool(((self.pool_buffer if self.load else self.page_buffer) == POISON).all())


@pytest.fixture
def side_stream() -> Iterator[Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("pools", POOLS)
def test_every_way_of_every_pair_of_layouts(
    pools: str, pages: str, shape: BlockShape, load: bool, side_stream: Any
) -> None:
    taken = set()
    for way in (*Way, None):
        case = Case(pools, pages, shape, load)
        assert case.untouched()
        if way is Way.stage and not case.copier._span_bytes:
            with pytest.raises(CopyError, match="scattered"):
                case.go(way)
            assert case.untouched()
            continue
        taken.add(case.go(way))
        case.check()
    assert {Way.engine, Way.kernel} <= taken


@pytest.mark.parametrize("way", [*Way, None])
@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
def test_many_pages_on_the_default_stream(load: bool, way: Way | None) -> None:
    case = Case("paged", "page_first", BlockShape(4, 2, 8, 1, 1024), load, count=MANY)
    case.go(way, stream=0)
    case.check()


@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_every_dtype(dtype: Any, load: bool) -> None:
    """Bytes only: what torch reads as `dtype` on one side it reads on the other, NaNs and all."""
    shape = BlockShape(2, 2, 16, 2, 64 * dtype.itemsize)
    for way in Way:
        case = Case("paged", "page_first", shape, load)
        case.go(way)
        torch.cuda.synchronize()
        pools = case.pool_view[torch.from_numpy(case.in_pools).cuda()].contiguous().view(dtype)
        pages = case.page_view[torch.from_numpy(case.in_pages)].contiguous().view(dtype)
        assert pools.shape == pages.shape
        assert torch.equal(pools.cpu().view(torch.uint8), pages.view(torch.uint8))


@pytest.mark.parametrize("way", [Way.kernel, Way.engine, Way.stage])
def test_page_buffers_on_the_device(way: Way) -> None:
    case = Case("paged", "canonical", SHAPES["wide"], True, where="cuda")
    assert case.copier.memory == "device"
    case.go(way)
    case.check()


def test_unaligned_addresses() -> None:
    shape = BlockShape(2, 2, 3, 1, 48)

    def shifted(dims: tuple[int, ...]) -> Any:
        size = int(np.prod(dims))
        return torch.randint(0, 256, (size + 3,), dtype=torch.uint8).pin_memory()[3:].view(dims)

    _, view, b = filled("canonical", shape, 4, shifted)
    pool_buffer, pool_view, a = filled("paged", shape, 4, empty("cuda", True))
    Copier(shape, a, b).load([3, 1], [0, 2], 0, Way.kernel)
    torch.cuda.synchronize()
    assert torch.equal(pool_view[[0, 2]].cpu(), view[[3, 1]])
    assert (pool_view[[1, 3]] == POISON).all()
    assert pool_buffer.data_ptr() % 16 == 0


def test_a_round_trip_with_concurrent_streams() -> None:
    """Loads and stores by every way on several streams at once, sharing one stage."""
    shape = BlockShape(4, 2, 16, 1, 1024)
    count = 256
    pool_buffer, pool_view, a = filled("paged", shape, count, empty("cuda", False, 3))
    page_buffer, page_view, b = filled("page_first", shape, count, empty("cpu", True))
    before = pool_view.clone()
    copier = Copier(shape, a, b, stage_bytes=4 << 20)
    streams = [torch.cuda.Stream() for _ in range(4)]
    parts = np.random.default_rng(5).permutation(count).reshape(4, -1)
    for ways in ((Way.stage, Way.kernel, Way.stage, Way.engine), (Way.kernel, Way.stage, Way.stage, Way.stage)):
        for stream, part, way in zip(streams, parts, ways, strict=True):
            copier.store(part, part[::-1].copy(), stream.cuda_stream, way)
        torch.cuda.synchronize()
        pool_buffer.fill_(POISON)
        torch.cuda.synchronize()
        for stream, part, way in zip(streams, parts, ways[::-1], strict=True):
            copier.load(part[::-1].copy(), part, stream.cuda_stream, way)
        torch.cuda.synchronize()
        assert torch.equal(pool_view, before)
    assert (page_buffer.shape, page_view.shape[0]) == (page_buffer.shape, count)


@pytest.mark.parametrize("way", [Way.kernel, Way.stage])
def test_the_first_kernel_finds_its_tables(way: Way, side_stream: Any) -> None:
    """A copier is used as soon as it is made, while the way to the device is full: the kernel's tables take it too.

    Two pools in turn, since device memory that was freed by one copier may still hold its tables.
    """
    shape, count = BlockShape(16, 2, 16, 1, 512), 32
    pools = [filled("paged", shape, count, empty("cuda", False, seed)) for seed in (6, 7)]
    wanted = [view.cpu() for _, view, _ in pools]
    page_buffer, page_view, b = filled("page_first", shape, count, empty("cpu", True))
    load, busy = torch.empty(64 << 20, dtype=torch.uint8).pin_memory(), torch.cuda.Stream()
    target = torch.empty_like(load, device="cuda")
    numbers = np.arange(count)
    torch.cuda.synchronize()
    for turn in range(60):
        with torch.cuda.stream(busy):
            for _ in range(2):
                target.copy_(load, non_blocking=True)
        page_buffer.fill_(POISON)
        Copier(shape, pools[turn % 2][2], b).store(numbers, numbers, side_stream.cuda_stream, way)
        side_stream.synchronize()
        assert torch.equal(page_view, wanted[turn % 2]), f"turn {turn}"


@pytest.mark.parametrize("way", [Way.kernel, Way.engine, None])
def test_a_layer_that_has_ended_has_arrived_and_later_ones_may_not(way: Way | None, side_stream: Any) -> None:
    """The reader waits for layer after layer on another stream, and sees each whole."""
    shape = BlockShape(8, 2, 16, 1, 1024)
    case = Case("paged", "page_first_direct", shape, True)
    events = case.copier.events()
    reader = torch.cuda.Stream()
    seen = torch.empty_like(case.pool_view)
    with pytest.raises(CopyError, match="has not been issued"):
        events.wait(reader.cuda_stream, 0)
    # Held back, so that a reader that does not wait sees poison.
    torch.cuda._sleep(50_000_000)
    case.copier.load_layers(case.in_pages, case.in_pools, side_stream.cuda_stream, events, way)
    assert not events.done(0)
    with torch.cuda.stream(reader):
        early = case.pool_view[:, 0].clone()
        for layer in range(shape.layers):
            events.wait(reader.cuda_stream, layer)
            seen[:, layer] = case.pool_view[:, layer]
    reader.synchronize()
    assert (early == POISON).all(), "the negative control: without waiting there is nothing yet"
    assert events.done(shape.layers - 1)
    case.check()
    assert torch.equal(seen, case.pool_view)
    events.synchronize(shape.layers - 1)


def test_layers_end_in_order(side_stream: Any) -> None:
    """With a later layer's copies held back by a full queue, an earlier one's event has long been passed."""
    shape = BlockShape(64, 2, 16, 1, 1024)
    case = Case("paged", "page_first", shape, True)
    events = case.copier.events()
    case.copier.load_layers(case.in_pages, case.in_pools, side_stream.cuda_stream, events)
    for layer in reversed(range(shape.layers)):
        if events.done(layer):
            assert all(events.done(earlier) for earlier in range(layer))
    case.check()
    with pytest.raises(CopyError, match="all layers at once"):
        case.copier.load_layers(case.in_pages, case.in_pools, side_stream.cuda_stream, events, Way.stage)


def test_page_buffers_that_are_not_pinned() -> None:
    for load in (True, False):
        case = Case("paged", "page_first", SHAPES["wide"], load, pinned=False)
        assert case.copier.memory == "pageable"
        with pytest.raises(CopyError, match="not pinned"):
            case.go(Way.kernel)
        assert case.untouched()
        assert case.go() in (Way.engine, Way.stage)
        case.check()
        again = Case("paged", "page_first", SHAPES["wide"], load, pinned=False)
        again.go(Way.stage)
        again.check()


def test_memory_that_is_pinned_in_part_is_not_pinned() -> None:
    half = torch.empty(8 << 20, dtype=torch.uint8)
    start = -(-half.data_ptr() // 4096) * 4096
    assert int(torch.cuda.cudart().cudaHostRegister(start, 2 << 20, 0)) == 0
    try:
        device = open_device()
        assert device.memory_kind(start, 2 << 20) == "pinned"
        assert device.memory_kind(start, 4 << 20) == "pageable"
        assert device.memory_kind(start + (4 << 20), 1 << 20) == "pageable"
        assert device.memory_kind(torch.empty(8, device="cuda").data_ptr(), 8) == "device"
    finally:
        torch.cuda.cudart().cudaHostUnregister(start)


def test_pools_on_the_host_are_refused() -> None:
    shape = SHAPES["wide"]
    _, _, a = filled("paged", shape, 4, empty("cpu", True))
    _, _, b = filled("canonical", shape, 4, empty("cpu", True))
    with pytest.raises(CopyError, match="device memory"):
        Copier(shape, a, b)


def test_too_little_device_memory_for_a_stage_takes_another_way(caplog: pytest.LogCaptureFixture) -> None:
    case = Case("paged", "page_first", BlockShape(32, 2, 64, 1, 1024), True)
    case.copier._stage_half = 1 << 45
    assert case.copier.order(MOVED)[0] is Way.stage
    with pytest.raises(CopyError, match="out of device memory"):
        case.go(Way.stage)
    assert case.untouched()
    assert case.go() is Way.kernel
    assert "out of device memory" in caplog.text
    case.check()


def test_a_copier_that_is_gone_has_given_its_memory_back() -> None:
    shape = BlockShape(8, 2, 64, 1, 1024)
    _, _, a = filled("paged", shape, 4, empty("cuda", True))
    _, _, b = filled("page_first", shape, 4, empty("cpu", False))
    for _ in range(60):  # 2 GiB each
        copier = Copier(shape, a, b, stage_bytes=2 << 30)
        assert copier.load([0, 1], [2, 3], 0, Way.stage) is Way.stage
        del copier


@pytest.mark.parametrize("way", [Way.kernel, Way.engine])
def test_a_captured_copy_is_replayed(way: Way) -> None:
    shape = BlockShape(4, 2, 16, 1, 1024)
    case = Case("paged", "page_first_direct", shape, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.go(way)
    assert case.untouched(), "captured, not run"
    graph.replay()
    case.check()
    fresh = torch.randint(0, 256, case.page_buffer.shape, dtype=torch.uint8)
    case.page_buffer.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    pools, pages = torch.from_numpy(case.in_pools), torch.from_numpy(case.in_pages)
    assert torch.equal(case.pool_view.cpu()[pools], case.page_view[pages])


def test_what_cannot_be_captured_is_refused_and_the_capture_lives() -> None:
    shape = BlockShape(4, 2, 64, 1, 1024)
    staged = Case("paged", "page_first", shape, True)
    pageable = Case("paged", "page_first", shape, True, pinned=False)
    kernel = Case("paged", "page_first", shape, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(CopyError, match="captured"):
            staged.go(Way.stage)
        with pytest.raises(CopyError, match="CUDA graph"):
            pageable.go()
        assert kernel.go() is Way.kernel
    graph.replay()
    kernel.check()
    assert staged.untouched()
    assert pageable.untouched()


def test_copies_on_another_stream_during_a_capture() -> None:
    """Opening, checking and copying elsewhere does not break a capture in its strictest mode."""
    shape = BlockShape(4, 2, 64, 1, 1024)
    case = Case("paged", "page_first", shape, True)
    other = torch.cuda.Stream()
    x = torch.ones(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        y = x * 2
        case.go(Way.stage, stream=other.cuda_stream)
        y += 1
    graph.replay()
    case.check()
    assert (y == 3).all()


IN_ANOTHER_PROCESS = {
    "a stream in error": (
        """
        import ctypes
        case = Case("paged", "page_first", BlockShape(4, 2, 64, 1, 1024), True)
        # A kernel of another library that runs into an illegal address poisons the context for good.
        from hicache_ext import _cuda
        import numpy as np
        wild = np.array([0xDEAD0000], np.uint64)
        try:
            open_device().crc32c(wild, np.array([65536], np.uint32), np.zeros(1, np.uint32), 0, 1)
        except _cuda.Failed as error:
            print("first:", error)
        for way in (*Way, None):
            try:
                case.go(way)
                print("copied")
            except CopyError as error:
                print(way, error)
        """,
        ["first: ", "ILLEGAL_ADDRESS"],
        ["copied"],
    ),
    "a forked process": (
        """
        import os, time
        case = Case("paged", "page_first", BlockShape(4, 2, 64, 1, 1024), True)
        case.go(); case.check()
        events = case.copier.events()
        child = os.fork()
        if child == 0:
            try:
                case.go(stream=0)
                print("copied", flush=True)
            except CopyError as error:
                print("child:", error, flush=True)
            try:
                open_device()
                print("it has a device", flush=True)
            except CudaUnavailable as error:
                print("child:", error, flush=True)
            del case, events
            import gc; gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        case.go(); case.check()
        print("the parent goes on")
        """,
        ["child: this process was forked", "spawn", "the parent goes on"],
        ["copied", "it has a device"],
    ),
    "opened in a forked process": (
        """
        import os
        from hicache_ext.cuda import CudaUnavailable
        torch.zeros(1, device="cuda")
        child = os.fork()
        if child == 0:
            try:
                open_device()
                print("it has a device", flush=True)
            except CudaUnavailable as error:
                print("child:", error, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        ["child: "],
        ["it has a device"],
    ),
    "no device": (
        """
        """,
        ["no usable device"],
        [],
    ),
}


@pytest.mark.parametrize("name", IN_ANOTHER_PROCESS)
def test_in_another_process(name: str) -> None:
    script, wanted, unwanted = IN_ANOTHER_PROCESS[name]
    head = """
    import torch
    from hicache_ext.cuda import *
    from tests.gpu.test_copies import Case
    """
    if name == "no device":
        head = """
        import os
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from hicache_ext.cuda import *
        try:
            open_device()
        except CudaUnavailable as error:
            print(error)
        """
    text = textwrap.dedent(head) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for part in wanted:
        assert part in done.stdout, done.stdout + done.stderr
    for part in unwanted:
        assert part not in done.stdout

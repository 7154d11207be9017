"""Layouts as addresses, without a GPU: every pair of layouts against named axes, and what is said where CUDA is not.

A copy is made here by the addresses that the kernel computes (csrc/cuda/shape.hpp), a run at a time, on memory of this
process; and the lists of copies that the engines would be given are carried out as they are.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hicache_ext.cuda import CudaUnavailable, Way, layouts, open_device
from hicache_ext.cuda.layouts import Blocks, BlockShape
from hicache_ext.cuda.ways import ways
from tests.blocks import PAGES, POOLS, SHAPES, filled

POISON = 0xA5
IN_POOLS, IN_PAGES = 7, 5


def poisoned(dims: tuple[int, ...]) -> np.ndarray:
    return np.full(dims, POISON, np.uint8)


def random(dims: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, dims, np.uint8)


def by_addresses(blocks: Blocks, to_b: bool, a_pages: np.ndarray, b_pages: np.ndarray) -> None:
    for a_page, b_page in zip(a_pages.tolist(), b_pages.tolist(), strict=True):
        for a_plane, b_plane in zip(blocks.a_planes, blocks.b_planes, strict=True):
            for token in range(blocks.tokens):
                for head in range(blocks.heads):
                    a = a_plane + a_page + token * blocks.a_token + head * blocks.a_head
                    b = b_plane + b_page + token * blocks.b_token + head * blocks.b_head
                    ctypes.memmove(b if to_b else a, a if to_b else b, blocks.run)


def native_runs(blocks: Blocks, to_b: bool, a_pages: np.ndarray, b_pages: np.ndarray) -> list[tuple[int, int, int]]:
    _cuda = pytest.importorskip("hicache_ext._cuda", reason="not built")
    return _cuda.runs(
        np.array(blocks.a_planes, np.uint64), np.array(blocks.b_planes, np.uint64), blocks.tokens, blocks.heads,
        blocks.run, blocks.a_token, blocks.a_head, blocks.b_token, blocks.b_head, to_b, a_pages, b_pages, 0,
        len(blocks.a_planes),
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("load", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("by", ["addresses", "runs"])
def test_every_pair_of_layouts(pools: str, pages: str, shape: BlockShape, load: bool, by: str) -> None:
    a_buffer, a_view, a = filled(pools, shape, IN_POOLS, poisoned if load else random)
    b_buffer, b_view, b = filled(pages, shape, IN_PAGES, random if load else poisoned)
    source, target, target_buffer = (b_view, a_view, a_buffer) if load else (a_view, b_view, b_buffer)
    in_pools, in_pages = [6, 0, 3, 4], [1, 4, 2, 3]
    numbers = list(zip(in_pages, in_pools, strict=True) if load else zip(in_pools, in_pages, strict=True))
    expected_buffer, expected, _ = filled(pools if load else pages, shape, len(target), poisoned)
    for one, other in numbers:
        expected[other] = source[one]
    assert not (target_buffer != POISON).any()

    blocks = layouts.reduce(shape, a, b)
    a_pages, b_pages = a.offsets(in_pools), b.offsets(in_pages)
    if by == "addresses":
        by_addresses(blocks, not load, a_pages, b_pages)
    else:
        for from_, to, length in native_runs(blocks, not load, a_pages, b_pages):
            ctypes.memmove(to, from_, length)
    assert np.array_equal(target_buffer, expected_buffer), "a byte outside the target, or a wrong one"
    assert (target[[other for _, other in numbers]] == source[[one for one, _ in numbers]]).all()


def test_runs_that_touch_are_one_copy() -> None:
    shape = BlockShape(2, 2, 4, 2, 32)
    _, _, a = filled("paged", shape, 8, random)
    _, _, b = filled("layer_first", shape, 8, poisoned)
    blocks = layouts.reduce(shape, a, b)
    assert (blocks.tokens, blocks.heads, blocks.run) == (1, 1, 4 * 64)
    together = native_runs(blocks, True, a.offsets([2, 3, 4]), b.offsets([5, 6, 7]))
    assert [length for *_, length in together] == [3 * 256] * 4
    apart = native_runs(blocks, True, a.offsets([2, 4]), b.offsets([5, 6]))
    assert len(apart) == 8


@pytest.mark.parametrize(
    ("pages", "bytes_"),
    [("page_first", 3 * 4 * 64), ("page_first_direct", 3 * 4 * 64), ("canonical", 2 * 3 * 4 * 64), ("layer_first", 0)],
)
def test_the_stretches_of_a_page(pages: str, bytes_: int) -> None:
    shape = SHAPES["heads"]
    _, _, a = filled("paged", shape, 4, random)
    _, _, b = filled(pages, shape, 4, random)
    found = layouts.spans(layouts.reduce(shape, a, b))
    assert (found.bytes if found else 0) == bytes_
    if found:
        assert found.bytes * len(found.starts) == shape.page_bytes
        assert all(at < found.bytes for at in found.at)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_stage_holds_what_a_page_does(data: Any) -> None:
    """To a stage that keeps stretches together, and from there by whole stretches: what a direct copy gives."""
    draw = data.draw
    shape = BlockShape(*(draw(st.integers(1, most)) for most in (4, 2, 5, 3, 40)))
    pages, pools = draw(st.sampled_from(list(PAGES))), draw(st.sampled_from(list(POOLS)))
    _, a_view, a = filled(pools, shape, 3, random)
    b_buffer, b_view, b = filled(pages, shape, 3, poisoned)
    blocks = layouts.reduce(shape, a, b)
    found = layouts.spans(blocks)
    if found is None:
        return
    region = 3 * found.bytes
    stage = poisoned((len(found.starts) * region,))
    planes = tuple(stage.ctypes.data + of * region + at for of, at in zip(found.of, found.at, strict=True))
    staged = Blocks(
        blocks.a_planes, planes, blocks.tokens, blocks.heads, blocks.run, blocks.a_token, blocks.a_head,
        blocks.b_token, blocks.b_head,
    )  # fmt: skip
    by_addresses(staged, True, a.offsets([2, 0, 1]), np.arange(3, dtype=np.uint64) * np.uint64(found.bytes))
    for number, page in enumerate(b.offsets([0, 1, 2]).tolist()):
        for span, start in enumerate(found.starts):
            from_ = stage.ctypes.data + span * region + number * found.bytes
            ctypes.memmove(start + page, from_, found.bytes)
    assert (b_view == a_view[[2, 0, 1]]).all()
    assert b_buffer.nbytes == 3 * shape.page_bytes


def test_pages_that_a_side_does_not_have() -> None:
    _, _, side = filled("canonical", SHAPES["heads"], 4, random)
    for wrong in ([4], [-1], [0, 1 << 40]):
        with pytest.raises(IndexError, match="there are 4"):
            side.offsets(wrong)
    assert side.offsets([]).tolist() == []


def test_sides_that_do_not_fit_are_refused() -> None:
    shape = SHAPES["heads"]
    with pytest.raises(ValueError, match="6 planes"):
        layouts.paged([0], shape, 1)
    with pytest.raises(ValueError, match="one buffer for each of 2"):
        layouts.page_first([0], shape, 1)
    with pytest.raises(ValueError, match="bytes apart"):
        layouts.paged([0] * 6, shape, 1, token=8)
    with pytest.raises(ValueError, match="at least 1"):
        BlockShape(0, 1, 1, 1, 1)


def test_the_memory_that_a_side_lies_in() -> None:
    shape = SHAPES["heads"]
    for name in (*POOLS, *PAGES):
        buffer, _, side = filled(name, shape, 4, random)
        extents = side.extents(shape)
        assert extents[0][0] == buffer.ctypes.data
        padding = 48 if name == "strided" else 0
        assert sum(extents[-1]) == buffer.ctypes.data + buffer.nbytes - padding
        whole = 1 if name != "strided" else 6
        assert len(extents) == whole, name


@pytest.mark.parametrize(
    ("run", "span", "layer_wise", "large", "first"),
    [
        (1 << 10, 2 << 20, False, True, Way.stage),
        (64 << 10, 2 << 20, False, True, Way.stage),
        (64 << 10, 0, False, True, Way.engine),
        (1 << 10, 0, False, True, Way.kernel),
        (1 << 10, 32 << 10, False, True, Way.kernel),
        (1 << 10, 2 << 20, False, False, Way.kernel),
        (1 << 20, 2 << 20, False, False, Way.kernel),
        (64 << 10, 0, True, False, Way.engine),
        (1 << 10, 2 << 20, True, True, Way.kernel),
    ],
)
def test_the_way_that_is_tried_first(run: int, span: int, layer_wise: bool, large: bool, first: Way) -> None:
    order = ways(run, span, layer_wise, large)
    assert order[0] is first
    assert set(order) == set(Way)


def test_without_a_driver_one_line_says_so() -> None:
    # In a process of its own: this one may have a GPU. Nothing is found where the loader may look nowhere.
    script = """
import ctypes, hicache_ext.cuda as cuda
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    try:
        cuda.open_device()
        print("opened")
    except cuda.CudaUnavailable as error:
        print(error)
else:
    print("has a driver")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    if line == "has a driver":
        pytest.skip("this machine has a CUDA driver")
    assert "\n" not in line
    assert "libcuda.so.1" in line or "not in this install" in line


def test_an_install_without_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import hicache_ext

    monkeypatch.delattr(hicache_ext, "_cuda", raising=False)
    monkeypatch.setitem(sys.modules, "hicache_ext._cuda", None)
    with pytest.raises(CudaUnavailable, match="not in this install"):
        open_device(99)

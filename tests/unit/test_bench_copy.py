"""`bench copy` where there is no GPU: one line and the exit code of a missing part; its goals and its file by rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from hicache_ext import cuda
from hicache_ext.bench import copy
from hicache_ext.cli import bench, bench_copy


def row(subject: str, speed: float, page: int = 256 << 10, pages: int = 64, way: str = "kernel") -> dict[str, Any]:
    return {
        "subject": subject, "op": "h2d", "layout": "page_first", "page": page, "pages": pages, "gb_per_s": speed,
        "spread": [speed, speed], "way": way, "multiprocessors": 4, "rounds": 1,
    }  # fmt: skip


def test_without_a_gpu_one_line_and_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int = 0) -> None:
        raise cuda.CudaUnavailable("no CUDA driver: libcuda.so.1 cannot be loaded")

    monkeypatch.setattr(copy, "open_device", none)
    done = CliRunner().invoke(bench.app, ["copy", "--quick"])
    assert done.exit_code == 2
    assert done.output.strip() == "bench copy needs a GPU: no CUDA driver: libcuda.so.1 cannot be loaded"


def test_an_unknown_layout_is_named() -> None:
    done = CliRunner().invoke(bench.app, ["copy", "--layout", "sideways"])
    assert done.exit_code == 2
    assert "page_first_direct" in done.output


def test_the_goals() -> None:
    rows = [row("ours", 50), row("memcpy", 55), row("sgl-kernel", 49), row("sgl-kernel", 20, way="direct")]
    rows += [row("ours", 40, 64 << 10), row("memcpy", 55, 64 << 10), row("sgl-kernel", 41, 64 << 10)]
    rows += [row("ours", 40, pages=512), row("memcpy", 55, pages=512), row("ours", 1, pages=8)]
    near, small, many = copy.limits(rows)
    assert near["met"]
    assert (near["of_memcpy"], near["of_sgl_kernel"]) == (0.909, 1.02)
    assert (small["goal"], small["met"]) == (0.7, False), "sgl-kernel is faster"
    assert (many["goal"], many["met"], many["of_sgl_kernel"]) == (0.9, False, None)


def test_a_row_a_line() -> None:
    written = {"machine": {"gpu": "x"}, "rows": [row("ours", 1.5), row("memcpy", 2)], "decode": []}
    text = bench_copy.lines(written)
    assert json.loads(text) == written
    assert len(text.splitlines()) == 2 + 1 + 2 + 2 + 1


def test_pages_are_whole_tokens() -> None:
    done = CliRunner().invoke(bench.app, ["copy", "--page", "96KiB"])
    assert done.exit_code == 2
    assert "is not a multiple of 64 KiB" in done.output

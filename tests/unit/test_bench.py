"""`bench io` without SGLang: medians, ratios, the facts of the machine, and whether a file is in the page cache."""

from __future__ import annotations

import os
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hicache_ext.bench import index, io, machine
from hicache_ext.cli import bench
from storage_backends.buffers import HUGE_PAGE, OwnedMemory

BLOCK = 1 << 20


def row(subject: str, seconds: list[float], cpu: float, case: str = "cold") -> dict[str, object]:
    op = "read" if case in ("cold", "warm") else "write"
    taken = io.Samples(seconds, [cpu] * len(seconds))
    return io._row(io.Case(subject, "threads", op, case, BLOCK, 16), taken)


def test_a_row_has_median_and_spread() -> None:
    gigabytes = io.PAGES * BLOCK / 1e9
    got = row("ours", [gigabytes, gigabytes / 4, gigabytes / 2], 0.5 * gigabytes)
    assert (got["gb_per_s"], got["spread"], got["cpu_s_per_gb"]) == (2.0, [1.0, 4.0], 0.5)
    assert {"subject", "engine", "op", "block", "depth", "gb_per_s", "spread", "cpu_s_per_gb"} <= got.keys()


def test_the_table_compares_like_with_like() -> None:
    rows = [row("ours", [1.0], 1.0), row("stock-file", [3.0], 10.0), row("stock-file-warm", [0.5], 1.0, "warm")]
    text = StringIO()
    Console(width=110, file=text).print(bench._table(rows, "here"))
    lines = [line.split() for line in text.getvalue().splitlines()]
    ours = next(line for line in lines if "(threads)" in line)
    assert ours[:6] == ["1", "MiB", "cold", "read", "ours", "(threads)"]
    assert ours[-2:] == ["3.00", "0.10"]
    warm = next(line for line in lines if "stock-file-warm" in line)
    assert len(warm) == len(ours) - 3, "no ratios where there is nothing like it"


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 << 10))
    fd = os.open(path, os.O_RDONLY)
    assert io._cached_bytes(fd) == 64 << 10
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert io._cached_bytes(fd) in (0, 64 << 10)  # tmpfs keeps it: there is no other place
    os.close(fd)


def test_the_machine_has_facts(tmp_path: Path) -> None:
    facts = machine.facts(tmp_path)
    assert facts["cpu"]
    assert facts["cores"]
    assert " on " in str(facts["file_system"])
    assert machine.file_system(Path("/proc")).startswith("proc on")


def test_the_kind_of_pages_is_seen() -> None:
    memory = OwnedMemory(2 * HUGE_PAGE)
    assert machine.page_kind(memory.address) in ("4 KiB", "2 MiB (transparent)")
    assert machine.page_kind(OwnedMemory(4096).address) == "4 KiB"


def test_without_sglang_the_command_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    done = CliRunner().invoke(bench.app, ["io", "--quick"])
    assert done.exit_code == 2
    assert "hicache-ext[sglang]" in done.output


def test_the_index_bench_measures_all_of_it(tmp_path: Path) -> None:
    rows = index.run(tmp_path, 2000, 200, lambda what: None)
    assert all(row["value"] > 0 for row in rows if row["what"] != "memory")
    assert {"publish", "lookup, without parents", "scan without a log, 200 pages"} <= {row["what"] for row in rows}

"""`bench io`: rows, ratios and goals, fio's JSON, the ticker; and both yardsticks and ours for real on small files."""

from __future__ import annotations

import json
import os
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hicache_ext.bench import index, io_engine, io_fio, io_goals, io_nixl, io_stock, io_ticker, machine
from hicache_ext.bench.io_memory import Memory, VerifiedPass
from hicache_ext.bench.io_rounds import Case, Samples, Setup, Timing, measure, row
from hicache_ext.cli import bench, bench_io
from storage_backends.buffers import HUGE_PAGE, OwnedMemory
from storage_backends.direct_io import probe_direct

BLOCK = 2 << 20
GIGABYTE = 1_000_000_000


def made(
    subject: str, speed: float = 1.0, cpu: float = 1.0, case: str = "cold", depth: int = 32, **other: Any
) -> dict[str, Any]:
    """A row as if measured."""
    name = other.pop("engine", "native" if subject == "ours" else "x")
    taken = Samples([Timing(1 / speed, cpu, GIGABYTE)])
    block, pages = other.pop("block", BLOCK), other.pop("pages", "huge")
    return row(Case(subject, name, case, block, depth, pages), taken, 0.1, other.pop("late", 0.2))


def test_a_row_has_median_and_spread() -> None:
    taken = Samples([Timing(1, 0.5, GIGABYTE), Timing(4, 0.4, GIGABYTE), Timing(2, 0.9, GIGABYTE)])
    got = row(Case("ours", "native", "overwrite", BLOCK, 8, "huge"), taken, 0.1, 1.25)
    assert (got["gb_per_s"], got["spread"], got["cpu_s_per_gb"]) == (0.5, [0.25, 1.0], 0.5)
    assert (got["op"], got["case"], got["pages"], got["depth"]) == ("write", "overwrite", "huge", 8)
    assert got["ticker_p99_ms"] == {"idle": 0.1, "load": 1.25}
    assert json.loads(json.dumps(got)) == got


def test_ratios_compare_like_with_like() -> None:
    ours = made("ours", 3.0)
    rows = [ours, made("fio", 4.0), made("fio", 1.0, pages="4k"), made("fio", 1.0, depth=1), made("fio", case="mixed")]
    assert io_goals.ratio(ours, rows, "fio") == pytest.approx(0.75)
    assert io_goals.ratio(ours, rows, "nixl-posix") is None
    assert io_goals.ratio(ours, [made("fio", depth=1), made("fio", depth=8)], "fio") is None, "at another depth"
    stock = made("stock-file", 0.5, 20.0, depth=1)
    assert io_goals.ratio(ours, [stock], "stock-file") == pytest.approx(6.0), "stock knows no depth"
    assert io_goals.ratio(ours, [stock], "stock-file", "cpu_s_per_gb") == pytest.approx(0.05)


def test_the_engine_suite_is_judged_by_fio() -> None:
    rows = [made("ours", 0.97), made("ours", 0.5, engine="threads"), made("fio")]
    rows += [made("ours", 0.9, case="overwrite"), made("fio", case="overwrite")]
    rows += [made("ours", 0.1, depth=1), made("fio", depth=1), made("ours", 0.1, pages="4k"), made("fio", pages="4k")]
    read, overwrite, ticker = io_goals.verdicts(rows, "engine")
    assert read.line() == "read 2 MiB depth 32: 0.97 of fio (goal: at least 0.95): met"
    assert not overwrite.met
    assert ticker.met


def test_the_adapter_suite_is_judged_by_stock_nixl_and_what_checking_costs() -> None:
    rows = [made("ours", 6.0, 0.02, depth=64, late=2.5), made("stock-file", 1.0, 1.0, depth=1)]
    rows += [made("nixl-posix", 5.5, depth=128), made("fio", 7, 0.01, depth=64)]
    rows += [made("verified_pass", cpu=0.01, depth=1)]
    speed, nixl, cpu, floor, ticker = io_goals.verdicts(rows, "adapter")
    assert [verdict.met for verdict in (speed, nixl, cpu, floor, ticker)] == [True, False, True, True, False]
    assert floor.limit == pytest.approx(0.023)
    assert nixl.row()["value"] == pytest.approx(1.0909, abs=1e-4)


def test_the_table_shows_ratios_for_ours() -> None:
    rows = [made("ours", 3.0, 0.1), made("fio", 4.0), made("stock-file", 1.0, depth=1)]
    text = StringIO()
    Console(width=120, file=text).print(bench_io.table(rows, "here"))
    lines = [line.split() for line in text.getvalue().splitlines()]
    ours = next(line for line in lines if "(native)" in line)
    assert ours[:7] == ["2", "MiB", "32", "cold", "read", "ours", "(native)"]
    assert ours[-3:] == ["0.75", "3.00", "0.10"]
    assert next(line for line in lines if "fio" in line and "cold" in line)[-1] == "(0.1)"


def test_the_99th_percentile() -> None:
    assert io_ticker.p99([float(i) for i in range(1, 101)]) == 99
    assert io_ticker.p99([float(i) for i in range(1, 201)]) == 198
    assert io_ticker.p99([3.0, 1.0]) == 3.0
    assert io_ticker.p99([]) == 0


def test_the_ticker_sees_a_held_interpreter() -> None:
    ticker = io_ticker.Ticker()
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.05)
    try:
        with ticker:
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                pass
    finally:
        sys.setswitchinterval(before)
    assert max(ticker.late_ms) > 20
    ticks = len(ticker.late_ms)
    time.sleep(0.02)
    assert len(ticker.late_ms) == ticks, "it ticks only while it is entered"


FIO_JSON = {
    "jobs": [
        {
            "error": 0, "job_runtime": 500, "usr_cpu": 1.0, "sys_cpu": 3.0,
            "read": {"io_bytes": 300 << 20, "runtime": 490}, "write": {"io_bytes": 100 << 20, "runtime": 480},
        }
    ]
}  # fmt: skip


def test_fios_answer_is_understood() -> None:
    got = io_fio.parse("fio: a warning\n" + json.dumps(FIO_JSON))
    assert (got.bytes, got.seconds, got.cpu) == (400 << 20, 0.49, pytest.approx(0.02))
    broken = json.loads(json.dumps(FIO_JSON))
    broken["jobs"][0]["error"] = 28
    with pytest.raises(RuntimeError, match="error 28"):
        io_fio.parse(json.dumps(broken))
    broken["jobs"][0] |= {"error": 0, "read": {"io_bytes": 0, "runtime": 0}, "write": {"io_bytes": 0, "runtime": 0}}
    with pytest.raises(RuntimeError, match="too little"):
        io_fio.parse(json.dumps(broken))


def test_fio_is_asked_for_the_same_conditions() -> None:
    asked = io_fio.arguments(Path("/x/f"), "read", BLOCK, 8, 64 << 20, huge=False)
    assert {"--direct=1", "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1", "--iodepth=8"} <= set(asked)


def test_an_absent_yardstick_is_said_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_fio, "available", lambda: False)
    monkeypatch.setattr(io_nixl, "installed", lambda: "")
    said: list[str] = []
    assert io_engine._yardsticks(said.append)[:2] == (False, False)
    assert "apt-get install -y fio" in said[0]
    assert "nixl" in said[1]
    monkeypatch.setattr(io_nixl, "installed", lambda: "1.4.2")
    assert "short reads" in io_nixl.unavailable()


@pytest.mark.parametrize("huge", [True, False])
def test_memory_says_what_it_lies_in(huge: bool) -> None:
    memory = Memory(64 << 10, 64, huge)
    assert memory.pages in (("huge", "4k") if huge else ("4k",))
    assert not memory.arrived()
    memory.target[:] = memory.source
    assert memory.arrived()
    assert memory.address_of(65, True) == memory.address + memory.size // 2 + (64 << 10)


def test_the_cells_of_a_plan() -> None:
    plan = io_engine.Plan((64 << 10, BLOCK), (1, 32), 1 << 20)
    assert len(plan.cells()) == 6
    assert (BLOCK, 32, False) in plan.cells()
    assert (BLOCK, 1, False) not in plan.cells()


def test_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 << 10))
    fd = os.open(path, os.O_RDONLY)
    assert io_stock.cached_bytes(fd) == 64 << 10
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert io_stock.cached_bytes(fd) in (0, 64 << 10)  # tmpfs keeps it: there is no other place
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


def test_a_block_size_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    for wrong in ("many", "100"):
        done = CliRunner().invoke(bench.app, ["io", "--suite", "engine", "--block", wrong, "--dir", str(tmp_path)])
        assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ours_and_fio_for_real(tmp_path: Path) -> None:
    if not probe_direct(tmp_path).works:
        pytest.skip("no direct I/O here")
    size = 4 << 20
    memory = Memory(64 << 10, size // (64 << 10), True)
    subjects: list[Any] = [io_engine.OurEngine(tmp_path / "ours", "threads", memory, 8, size, rounds=2)]
    subjects.append(VerifiedPass(64 << 10, True))
    if io_fio.available():
        pages = io_fio.pages_of(tmp_path, True)
        subjects.append(io_fio.Fio(tmp_path, 64 << 10, 8, size, True, pages, mixed=True))
    try:
        rows = measure(subjects, 64 << 10, Setup(2, 0.05, lambda _: None))
    finally:
        for subject in subjects:
            subject.close()
    ours = {row["case"]: row for row in rows if row["subject"] == "ours"}
    assert set(ours) == {"first fill", "overwrite", "cold", "mixed"}
    assert all(row["rounds"] == 2 and row["gb_per_s"] > 0 for row in rows)
    assert {row["case"] for row in rows if row["subject"] == "verified_pass"} == {"cold"}
    if io_fio.available():
        assert io_goals.ratio(ours["cold"], rows, "fio")


def test_a_broken_sglang_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a torchvision that was built for another torch."""
    (tmp_path / "broken_by_another.py").write_text("raise RuntimeError('operator does not exist\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench_io, "_POOL", ("json", "broken_by_another"))
    done = CliRunner().invoke(bench.app, ["io", "--dir", str(tmp_path)])
    assert done.exit_code == 2
    assert done.exception is None or isinstance(done.exception, SystemExit)
    (line,) = done.output.splitlines()
    assert "broken_by_another does not import: RuntimeError: operator does not exist. Fix: pip install" in line

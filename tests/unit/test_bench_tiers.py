"""`bench tiers`: rows, ratios, goals, what yardsticks know; and all of it for real on small tiers."""

from __future__ import annotations

import json
import socket
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from hicache_ext.bench import io_fio, tiers_goals, tiers_redis
from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_ours import OneTier
from hicache_ext.bench.tiers_plain import yardstick
from hicache_ext.bench.tiers_rounds import Batch, Course, Plan, Role, Subject, Taken, percentile, rows, space_of
from hicache_ext.cli import bench, bench_tiers
from storage_backends.base import Dispatcher
from storage_backends.registry import backend_class
from tests.dictionary import DictionaryBackend, DictionaryOptions
from tests.redis_server import RedisServer

GIGABYTE = 1_000_000_000


class Counter(Subject):
    """Counts its calls; moves nothing."""

    def __init__(self, name: str, role: Role = Role.PLAIN, keeps: bool = False) -> None:
        self.name, self.role, self.keeps = name, role, keeps  # type: ignore[misc]
        self.there: set[str] = set()
        self.most = 0

    def write(self, batch: Batch) -> None:
        assert not self.there & set(batch.names), "a page was written twice"
        self.there |= set(batch.names)
        self.most = max(self.most, len(self.there))

    def read(self, batch: Batch) -> None:
        assert set(batch.names) <= self.there
        for at, buffer in enumerate(batch.buffers):
            number = (int(batch.pages.addresses[at]) - MEMORY.address) // MEMORY.block - MEMORY.count
            buffer[:] = MEMORY.view[number * MEMORY.block : (number + 1) * MEMORY.block]

    def lookup(self, batch: Batch) -> int:
        return len(self.there & set(batch.names))

    def remove(self, batch: Batch) -> None:
        self.there -= set(batch.names)


MEMORY = Memory(4096, 8, huge=False)
PLAN = Plan(pages=(4096,), batch=4, bytes=8 * 4096, singles=2, rounds=3)


def made(tier: str, case: str, speeds: dict[str, float], cpus: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Rows as if measured: GB/s and CPU s/GB by subject; "ours" and the names of cascades are ours."""
    plain = {"redis-py", "obstore", "local alone"}
    subjects: list[Subject] = []
    taken = {}
    for name, speed in speeds.items():
        role = Role.PLAIN if name in plain else Role.TOOL if name in ("fio", "verified pass") else Role.OURS
        subjects.append(Counter(name, role))
        cpu = (cpus or {}).get(name, 1.0)
        taken[name, case] = [Taken(1 / speed, cpu, 100, GIGABYTE, [5.0, 7.0], [1.0]) for _ in range(3)]
    return rows(tier, 1 << 20, 32, "huge", subjects, taken)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([3.0], 0.99)) == (50, 99, 3)


def test_a_row_has_medians_latencies_and_ratios_taken_round_by_round() -> None:
    slow, fast = Taken(2, 1, 10, GIGABYTE, [4, 6], [1]), Taken(1, 1, 10, GIGABYTE, [2, 2], [1])
    taken = {("ours", "read"): [slow, fast, fast], ("redis-py", "read"): [slow, fast, slow]}
    ours, plain = rows("redis", 4096, 2, "huge", [Counter("ours", Role.OURS), Counter("redis-py")], taken)
    assert (ours["gb_per_s"], ours["spread"], ours["pages_per_s"], ours["cpu_s_per_gb"]) == (1, [0.5, 1], 10, 1)
    assert (ours["batch_ms"], ours["page_ms"]) == (
        {"p50": 2, "p99": 6, "count": 6},
        {"p50": 1, "p99": 1, "count": 3},
    )
    assert ours["beside"]["redis-py"] == {"speed": 1, "speed_spread": [1, 2], "cpu": 1, "cpu_spread": [1, 1]}
    assert plain["beside"] == {}
    assert json.loads(json.dumps(ours)) == ours
    assert {*ours} == {*plain}
    lookups = rows("redis", 4096, 2, "huge", [Counter("ours", Role.OURS)], {("ours", "lookup"): [slow]})[0]
    assert (lookups["gb_per_s"], lookups["cpu_s_per_gb"], lookups["pages_per_s"]) == (None, None, 5)


def test_goals_are_judged_by_the_plain_client_else_by_the_tool_with_checksums() -> None:
    found = made("redis", "read", {"ours": 0.8, "redis-py": 1.0}, {"ours": 1.1})
    found += made("checksums", "write", {"verified pass": 10}, {"verified pass": 0.5})
    found += made("local", "read", {"ours": 0.95, "fio": 1.0}, {"ours": 1.0, "fio": 0.5})
    lines = [verdict.line() for verdict in tiers_goals.verdicts(found)]
    assert lines == [
        "redis, read of 1 MiB: 0.8 of redis-py's speed (goal: at least 0.9): MISSED",
        "redis, read of 1 MiB: 1.1 of redis-py's CPU (goal: at most 1.2): met",
        "redis, read of 1 MiB: 0.733 of redis-py's CPU and one pass of checksums (goal: at most 1.2): met",
        "local, read of 1 MiB: 0.95 of fio's speed (goal: at least 0.9): met",
        "local, read of 1 MiB: 1 of fio's CPU and one pass of checksums (goal: at most 1.2): met",
    ]
    tiers_goals.add_passes(found)
    assert [row["beside"][name]["cpu_with_pass"] for row in found for name in row["beside"]] == [0.73333, 1.0]
    found = made("cascade", "read", {"local alone": 1.0, "all tiers": 0.975, "redis hangs": 0.975})
    found += made("cascade", "write", {"local alone": 1.0, "all tiers": 0.1})
    assert [verdict.met for verdict in tiers_goals.verdicts(found)] == [True, False]


def test_rounds_write_new_pages_read_them_back_and_remove_them() -> None:
    one, two = Counter("one"), Counter("two", keeps=True)
    taken = Course(PLAN, MEMORY, space_of(4096, "t")).run("test", [one, two])
    assert {case for _, case in taken} == {"write", "read", "lookup"}
    assert all(len(rounds) == 3 for rounds in taken.values())
    assert [len(each) for each in (taken["one", "read"][0].batch_ms, taken["one", "read"][0].page_ms)] == [2, 2]
    assert (one.most, len(one.there)) == (10, 0)
    assert len(two.there) == 30


def test_a_read_that_brings_other_bytes_is_no_result() -> None:
    class Liar(Counter):
        def read(self, batch: Batch) -> None:
            super().read(batch)
            batch.buffers[0][7] ^= 1

    with pytest.raises(RuntimeError, match=r"liar: a read brought other bytes"):
        Course(PLAN, MEMORY, space_of(4096, "t")).run("test", [Liar("liar")])


def test_a_batch_is_divided_among_threads_without_loss() -> None:
    batch = Course(PLAN, MEMORY, space_of(4096, "t"))._batch("x", range(8), target=False)
    for number in (1, 3, 8, 20):
        parts = list(batch.parts(number))
        assert len(parts) <= number
        assert [name for part in parts for name in part.names] == batch.names
        assert b"".join(part.pages.keys for part in parts) == batch.pages.keys


def test_redis_benchmarks_answer_is_understood() -> None:
    text = 'xxx","1234.50","0.1","0.2","0.3","0.4","0.5","0.6"\n'
    assert tiers_redis.requests_per_second(text) == 1234.5
    assert tiers_redis.requests_per_second("Could not connect") is None
    assert tiers_redis.requests_per_second('"GET","0.00"\n') is None


def test_tiers_can_be_told_that_their_server_is_elsewhere() -> None:
    redis, s3 = yardstick(backend_class("redis")), yardstick(backend_class("s3"))
    given = {"url": "rediss://cache:6379/1", "tls_ca": "/x", "password_env": "P", "sentinels": ["a:1"], "service": "m"}
    moved = redis.moved(given, 7)
    assert moved is not None
    assert moved.items() >= {"url": "redis://127.0.0.1:7", "password_env": "P", "service": ""}.items()
    assert not moved.keys() & {"tls_ca", "sentinels"}
    assert (s3.moved({"bucket": "b"}, 7) or {})["endpoint"] == "http://127.0.0.1:7"
    assert yardstick(backend_class("local")).moved({"path": "/x"}, 7) is None


def test_a_local_tier_is_measured_beside_the_users_pages(tmp_path: Path) -> None:
    local = yardstick(backend_class("local"))
    options = local.apart({"path": str(tmp_path), "capacity": "1TiB", "ttl": "1h"}, "ab12", 100 << 20)
    assert options["path"] == [str(tmp_path / "hicache-bench-ab12" / "tier")]
    assert (100 << 20) < options["capacity"] < (110 << 20)
    Path(options["path"][0]).mkdir(parents=True)
    local.clean(options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "device").touch()
    with pytest.raises(ValueError, match="is no folder"):
        local.apart({"path": str(tmp_path / "device"), "capacity": 1}, "ab12", 1)


def test_the_table_shows_ratios_for_ours() -> None:
    found = made("redis", "read", {"ours": 3.0, "redis-py": 4.0}) + made("redis", "lookup", {"ours": 1.0})
    text = StringIO()
    Console(width=170, file=text).print(bench_tiers.table(found, "here"))
    lines = [line.split() for line in text.getvalue().splitlines()]
    ours = next(line for line in lines if "ours" in line and "read" in line)
    assert ours[:5] == ["redis", "1", "MiB", "read", "ours"]
    assert ours[-4:] == ["redis-py", "0.75", "(0.75-0.75),", "1.00"]
    assert any("pages/s" in line for line in lines)


# ---- for real


def run(folder: Path, tiers: list[dict[str, Any]], *arguments: str) -> tuple[int, dict[str, Any], str]:
    file, written = folder / "config.yaml", folder / "out.json"
    file.write_text(yaml.safe_dump({"tiers": tiers}))
    small = ["--page", "64KiB", "--bytes", "1MiB", "--batch", "4", "--rounds", "2", "--quick"]
    command = ["tiers", "--config", str(file), "--json", str(written), *small, *arguments]
    done = CliRunner().invoke(bench.app, command)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(written.read_text()) if written.exists() else {}, done.output


def test_a_cascade_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_fio, "available", lambda: False)  # moves 256 MiB a round
    pages = tmp_path / "pages"
    with RedisServer() as server:
        tiers = [
            {"type": "local", "path": str(pages), "capacity": "64MiB"},
            {"type": "redis", "url": f"redis://127.0.0.1:{server.port}", "timeout": 1},
            {"type": "memory"},
        ]
        code, told, text = run(tmp_path, tiers)
        assert server.client().dbsize() == 0, "what was written is removed"
    assert code == 0, text
    subjects = {(row["tier"], row["subject"], row["case"]) for row in told["rows"]}
    for case in ("write", "read", "lookup"):
        assert {("local", "ours", case), ("redis", "ours", case), ("redis", "redis-py", case)} <= subjects
        assert {("cascade", name, case) for name in ("local alone", "all tiers", "redis refuses", "redis hangs")} <= (
            subjects
        )
    assert {("local", "ours", "overwrite"), ("memory", "memmove", "read")} <= subjects
    assert all(row["pages_per_s"] > 0 and row["rounds"] == 2 for row in told["rows"])
    assert sum("cascade, read" in goal["goal"] for goal in told["goals"]) == 3
    assert any("fio" in line for line in told["left_out"])
    assert list(pages.iterdir()) == []
    assert "ours compute and check checksums" in " ".join(text.split())


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}"
        tiers = [{"type": "memory"}, {"type": "redis", "url": url, "timeout": 1}]
        code, told, text = run(tmp_path, tiers, "--tier", "memory", "--tier", "redis")
    assert code == 1
    assert {row["tier"] for row in told["rows"]} == {"checksums", "memory"}
    assert "redis, 64 KiB: ours: write: a page ended as FAILED" in told["failed"][0]
    assert "refused" in told["failed"][0]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("tiers", "arguments", "said"),
    [
        ([{"type": "memory", "capacty": 1}], (), "tiers[0].capacty"),
        ([{"type": "memory"}], ("--tier", "redis"), "'redis' is no tier of this file. Fix: use one of memory"),
        ([{"type": "memory"}, {"type": "memory", "name": "b"}], ("--dead", "memory"), "is the first tier"),
        ([{"type": "memory"}], ("--page", "100"), "multiple of 4 KiB"),
        ([{"type": "memory"}], ("--page", "much"), "no size"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, tiers: list[dict[str, Any]], arguments: Any, said: str) -> None:
    code, told, text = run(tmp_path, tiers, *arguments)
    assert (code, told) == (2, {})
    assert said in " ".join(text.replace("│", " ").split())
    assert "Traceback" not in text


def test_nothing_is_left_running() -> None:
    before = threading.active_count()
    dispatcher = Dispatcher()
    subject = OneTier(DictionaryBackend(DictionaryOptions(), dispatcher), dispatcher, ("write", "read"), False)
    Course(PLAN, MEMORY, space_of(4096, "t")).run("test", [subject])
    subject.close()
    assert threading.active_count() <= before

"""Several real processes on one directory, and what is left when they die."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.worker import Worker

MIB = 1 << 20
Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    workers: list[Worker] = []

    def one(capacity: int = 64 * MIB, **options: str) -> Worker:
        workers.append(Worker(tmp_path / "tier", capacity, **options))
        return workers[-1]

    yield one
    for worker in workers:
        worker.stop()


def test_one_rank_writes_and_all_read(start: Start, tmp_path: Path) -> None:
    """MLA with tensor parallelism: the ranks share a namespace, only rank 0 writes, every rank must find the pages."""
    rank0, rank1 = start(), start()
    assert rank0.ask("store", chain="a", pages=12) == ["HIT"] * 12
    for rank in (rank1, rank0):
        assert rank.ask("found", chain="a", pages=12) == [1] * 12
        assert rank.ask("served", chain="a", pages=12) == ["HIT"] * 12
    assert [p.name for p in (tmp_path / "tier").glob("w*")] == ["w0"], "who never writes owns no folder"


def test_ranks_with_the_same_shard_both_write(start: Start) -> None:
    """DP attention: several processes have the same tensor-parallel rank, so the same namespace, and all write."""
    ranks = [start(), start()]
    for turn in range(5):
        for i, rank in enumerate(ranks):
            rank.tell("store", chain=f"r{i}/{turn}", pages=8)
        for rank in ranks:
            assert rank.answer() == ["HIT"] * 8
    for rank in ranks:
        for turn in range(5):
            for i in range(2):
                assert rank.ask("served", chain=f"r{i}/{turn}", pages=8) == ["HIT"] * 8


def test_two_servers_of_one_model_write_each_page_once(start: Start) -> None:
    one, two = start(), start()
    one.ask("store", chain="shared", pages=16)
    assert two.ask("store", chain="shared", pages=16) == ["HIT"] * 16
    assert two.ask("stats").get("stored", 0) == 0
    one.stop()
    assert two.ask("served", chain="shared", pages=16) == ["HIT"] * 16


def test_two_servers_of_different_models_never_meet(start: Start) -> None:
    one, two = start(model="model-a"), start(model="model-b")
    one.ask("store", chain="same prompt", pages=8)
    two.ask("store", chain="same prompt", pages=8)
    assert one.ask("served", chain="same prompt", pages=8) == ["HIT"] * 8
    assert two.ask("served", chain="same prompt", pages=8) == ["HIT"] * 8
    assert one.ask("clear") == "cleared"
    assert one.ask("found", chain="same prompt", pages=8) == [0] * 8
    assert two.ask("served", chain="same prompt", pages=8) == ["HIT"] * 8


def test_writers_share_the_capacity(start: Start, tmp_path: Path) -> None:
    workers = [start(capacity=32 * MIB), start(capacity=32 * MIB)]
    for turn in range(12):
        for i, worker in enumerate(workers):
            worker.ask("store", chain=f"{i}/{turn}", pages=32)
    deadline = time.monotonic() + 15
    while (used := sum(f.stat().st_size for f in (tmp_path / "tier").rglob("*.ext"))) > 32 * MIB:
        assert time.monotonic() < deadline, f"{used} bytes on disk"
        time.sleep(0.1)
    for i, worker in enumerate(workers):
        outcomes = worker.ask("served", chain=f"{i}/11", pages=32)
        assert "wrong" not in outcomes
        assert "HIT" in outcomes


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_pages_outlive_the_process(start: Start, how: signal.Signals) -> None:
    first = start()
    first.ask("store", chain="a", pages=20)
    first.process.send_signal(how)
    first.process.wait()
    again = start()
    assert again.ask("found", chain="a", pages=20) == [1] * 20
    assert again.ask("served", chain="a", pages=20) == ["HIT"] * 20


def test_killed_while_writing_again_and_again(start: Start, tmp_path: Path) -> None:
    """SIGKILL at random moments under load: the next start needs no help and serves what was acknowledged."""
    chance = random.Random(5)
    acknowledged: list[str] = []
    for turn in range(20):
        worker = start(capacity=2048 * MIB, engine="liburing" if turn % 2 else "threads")
        worker.tell("write_forever", chain=f"k{turn}")
        until = time.monotonic() + chance.uniform(0.02, 0.25)
        while time.monotonic() < until:
            acknowledged.append(worker.answer())
        worker.process.kill()
        worker.stop()
    last = start(capacity=2048 * MIB)
    usable = 0
    for name in acknowledged:
        outcomes = last.ask("served", chain=name, pages=8)
        assert "wrong" not in outcomes
        usable += outcomes.count("HIT")
    assert len(acknowledged) > 20
    assert usable >= 0.99 * 8 * len(acknowledged)
    assert last.ask("store", chain="after", pages=8) == ["HIT"] * 8
    left = {p.relative_to(tmp_path / "tier").as_posix() for p in (tmp_path / "tier").rglob("*") if p.is_file()}
    strange = [name for name in left if not re.fullmatch(r"FORMAT|w\d+/(lock|use|residency\.log|e\d{10}\.ext)", name)]
    assert strange == [], "no orphan of a temporary is left, however often a writer dies"

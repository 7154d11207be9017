"""The fault injector: each fault does what it says and is counted; the plan file is followed while it changes."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from storage_backends.buffers import OwnedMemory
from storage_backends.local.engine import FAULTS_VARIABLE, IoEngine, Transfer, open_engine
from storage_backends.local.engine_threads import ThreadsEngine
from storage_backends.local.inject import FaultEngine, FaultPlan, fired_counts

SIZE = 64 << 10
PATIENCE = 30.0


@pytest.fixture(scope="module")
def memory() -> OwnedMemory:
    return OwnedMemory(2 * SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, SIZE)
    yield fd
    os.close(fd)


def submit(engine: IoEngine, fd: int, memory: OwnedMemory, count: int = 1, write: bool = False) -> list[int]:
    results: list[int] = []
    ended = threading.Semaphore(0)

    def done(result: int) -> None:
        results.append(result)
        ended.release()

    iov = np.array([[memory.address, SIZE // 4], [memory.address + SIZE // 4, SIZE - SIZE // 4]], np.uint64)
    engine.submit([Transfer(fd, 0, iov, write, done) for _ in range(count)])
    for _ in range(count):
        assert ended.acquire(timeout=PATIENCE)
    return results


def wrapped(**rules: Any) -> FaultEngine:
    return FaultEngine(ThreadsEngine(workers=2), FaultPlan(rules))


def test_an_empty_plan_changes_nothing(file: int, memory: OwnedMemory) -> None:
    engine = wrapped()
    assert submit(engine, file, memory, 3) == [SIZE] * 3
    assert not engine.plan.fired
    assert engine.name == "threads+faults"
    assert engine.close(PATIENCE)


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EROFS"])
def test_errno_exactly_so_often_and_only_in_its_direction(file: int, memory: OwnedMemory, name: str) -> None:
    engine = wrapped(write=[{"fault": "errno", "errno": name, "count": 2, "after": 1}])
    assert submit(engine, file, memory, 1, write=True) == [SIZE]
    assert sorted(submit(engine, file, memory, 4, write=True)) == [-getattr(errno, name)] * 2 + [SIZE] * 2
    assert submit(engine, file, memory, 3) == [SIZE] * 3
    assert engine.plan.fired == Counter({f"write.{name}": 2})
    assert engine.close(PATIENCE)


def test_probability_is_about_right_and_seeded(file: int, memory: OwnedMemory) -> None:
    seen = []
    for _ in range(2):
        plan = FaultPlan({"seed": 7, "read": [{"fault": "errno", "probability": 0.2}]})
        seen.append([plan.decide(False).error for _ in range(1000)])
        assert 130 < plan.fired["read.EIO"] < 270
    assert seen[0] == seen[1]


def test_short_and_torn(file: int, memory: OwnedMemory) -> None:
    data = np.frombuffer(memory.view, np.uint8)
    data[:SIZE] = 1
    engine = wrapped(write=[{"fault": "short", "count": 1}])
    assert submit(engine, file, memory, write=True) == [SIZE // 2]
    assert os.pread(file, SIZE, 0) == b"\1" * (SIZE // 2) + bytes(SIZE // 2)
    assert engine.close(PATIENCE)
    data[:SIZE] = 2
    engine = wrapped(write=[{"fault": "torn", "count": 1}], read=[{"fault": "short", "count": 1}])
    assert submit(engine, file, memory, write=True) == [SIZE], "a power cut says nothing"
    assert os.pread(file, SIZE, 0) == b"\2" * (SIZE // 2) + bytes(SIZE // 2)
    assert submit(engine, file, memory) == [SIZE // 2]
    assert engine.plan.fired == Counter({"write.torn": 1, "read.short": 1})
    assert engine.close(PATIENCE)


def test_flip_turns_one_bit(file: int, memory: OwnedMemory) -> None:
    engine = wrapped(read=[{"fault": "flip", "count": 1}])
    data = np.frombuffer(memory.view, np.uint8)
    data[:SIZE] = 255
    assert submit(engine, file, memory) == [SIZE]
    assert int(np.unpackbits(data[:SIZE]).sum()) == 1
    assert submit(engine, file, memory) == [SIZE]
    assert not data[:SIZE].any()
    assert engine.close(PATIENCE)


def test_delay_comes_before_the_transfer_and_blocks_nobody(file: int, memory: OwnedMemory) -> None:
    engine = wrapped(read=[{"fault": "delay", "seconds": 0.3, "count": 1}])
    data = np.frombuffer(memory.view, np.uint8)
    data[:] = 9
    late = threading.Event()
    far = np.array([[memory.address + SIZE, SIZE]], np.uint64)
    started = time.monotonic()
    engine.submit([Transfer(file, 0, far, False, lambda _: late.set())])
    assert submit(engine, file, memory) == [SIZE], "the next transfer does not wait"
    assert data[SIZE] == 9, "memory is touched late, as by a slow device"
    assert late.wait(PATIENCE)
    assert time.monotonic() - started >= 0.3
    assert data[SIZE] == 0
    assert engine.close(PATIENCE)


def test_close_ends_what_is_delayed(file: int, memory: OwnedMemory) -> None:
    engine = wrapped(read=[{"fault": "delay", "seconds": [60, 90]}])
    results: list[int] = []
    iov = np.array([[memory.address, SIZE]], np.uint64)
    engine.submit([Transfer(file, 0, iov, False, results.append) for _ in range(3)])
    assert engine.close(PATIENCE)
    assert results == [-errno.ECANCELED] * 3
    assert submit(engine, file, memory) == [-errno.ECANCELED]


def test_mistakes_in_a_plan_are_named() -> None:
    for wrong in ({"fault": "bang"}, {"fault": "errno", "errno": "EWHAT"}, {"fault": "flip", "chance": 1}):
        with pytest.raises(ValidationError):
            FaultPlan({"read": [wrong]})


def test_a_running_process_follows_its_file(
    file: int, memory: OwnedMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "faults.json"
    monkeypatch.setenv(FAULTS_VARIABLE, str(path))
    with caplog.at_level(logging.WARNING):
        engine = open_engine("threads", workers=2)
    assert FAULTS_VARIABLE in caplog.text
    assert submit(engine, file, memory) == [SIZE], "no file: no faults"
    path.write_text(json.dumps({"read": [{"fault": "errno", "errno": "EIO"}]}))
    assert submit(engine, file, memory) == [-errno.EIO]
    path.write_text('{"read": [')
    assert submit(engine, file, memory) == [-errno.EIO], "a half written plan leaves the last one in force"
    path.write_text("{}")
    assert submit(engine, file, memory) == [SIZE]
    path.unlink()
    assert submit(engine, file, memory) == [SIZE]
    assert fired_counts(path) == Counter({"read.EIO": 2})
    assert engine.close(PATIENCE)


def test_without_the_variable_nothing_is_in_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULTS_VARIABLE, raising=False)
    engine = open_engine("threads", workers=1)
    assert type(engine) is ThreadsEngine
    assert engine.close(PATIENCE)

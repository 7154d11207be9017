"""Several real processes in one region of shared memory, stopped and killed at any moment."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_backends.base import Dispatcher, Outcome
from storage_backends.memory import MemoryBackend, backend
from tests.pages import HostPool, chain, content, key_batch, namespace, served
from tests.worker import LENGTHS, Worker

MIB = 1 << 20
SPACE = namespace((65536, 65536))
Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    workers: list[Worker] = []

    def one(capacity: int = 64 * MIB, **options: str) -> Worker:
        workers.append(Worker(tmp_path / "region", capacity, engine="memory", **options))
        return workers[-1]

    yield one
    for worker in workers:
        worker.stop()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Callable[[int], MemoryBackend]]:
    """This process's own end of the region."""
    opened: list[MemoryBackend] = []
    dispatcher = Dispatcher()

    def one(capacity: int = 64 * MIB) -> MemoryBackend:
        values: dict[str, Any] = {"region": "test", "directory": tmp_path / "region", "capacity": capacity}
        opened.append(MemoryBackend(MemoryBackend.Options.model_validate(values), dispatcher))
        return opened[-1]

    yield one
    for tier in opened:
        tier.close()
    dispatcher.close()


def _kill(worker: Worker) -> None:
    worker.process.kill()
    worker.stop()


@pytest.mark.parametrize("capacity", [8 * MIB, 256 * MIB], ids=["evicting", "roomy"])
def test_three_processes_at_once(start: Start, capacity: int) -> None:
    workers = [start(capacity) for _ in range(3)]
    for seed, worker in enumerate(workers):
        worker.tell("churn", seed=seed, turns=150, chains=12)
    counts = [worker.answer() for worker in workers]
    assert [count.get("read wrong", 0) for count in counts] == [0, 0, 0]
    assert all(count["read HIT"] > 0 for count in counts)
    for outcome in ("read CORRUPT", "read FAILED", "write FAILED", "write REJECTED"):
        assert not any(outcome in count for count in counts), counts
    evicted = sum(int(worker.ask("stats")["evicted"]) for worker in workers)
    assert (evicted > 100) == (capacity == 8 * MIB)


def test_the_first_process_is_killed(start: Start) -> None:
    first, second = start(), start()
    first.ask("store", chain="a", pages=12)
    _kill(first)
    assert second.ask("served", chain="a", pages=12) == ["HIT"] * 12
    third = start()
    assert third.ask("served", chain="a", pages=12) == ["HIT"] * 12
    assert third.ask("store", chain="b", pages=12) == ["HIT"] * 12
    _kill(second)
    assert third.ask("served", chain="b", pages=12) == ["HIT"] * 12
    assert third.ask("stats")["processes"] == 1
    _kill(third)
    assert start().ask("found", chain="a", pages=12) == [0] * 12, "with the last process the memory has gone"


def test_killed_in_the_middle_of_writes_again_and_again(start: Start, here: Callable[[int], MemoryBackend]) -> None:
    """Forty writers die at random moments in a region that two others use: no wrong page, no lost room, no waiting."""
    lengths = (400_000, 300_000)
    parent, tier = start(64 * MIB, **{LENGTHS: str(list(lengths))}), here(64 * MIB)
    space, chance = namespace(lengths), random.Random(3)
    pool = HostPool(space, 4)
    for turn in range(40):
        parent.tell("die_writing", chain=f"dying/{turn}", after=chance.uniform(0, 0.01))
        keys = chain(f"mine/{turn}", 4)
        assert tier.write(pool.write_batch(keys)).result(10) == [Outcome.HIT] * 4
        assert parent.answer() == "dead"
        assert served(tier, space, keys, 10) == [Outcome.HIT] * 4
        assert not {Outcome.CORRUPT, Outcome.FAILED} & set(served(tier, space, chain(f"dying/{turn}", 4), 10))
    assert int(tier.stats()["takeovers"]) > 5
    names = [f"after/{turn}" for turn in range(12)]
    for name in names:
        assert tier.write(pool.write_batch(chain(name, 4))).result(10) == [Outcome.HIT] * 4
        assert served(tier, space, chain(name, 4), 10) == [Outcome.HIT] * 4
    # What the dead held is room again: nearly all of it is full of pages, used ones of before among them.
    assert int(tier.stats()["pages"]) * sum(lengths) > 40 * MIB


def _read_that_is_overtaken(start: Start, tier: MemoryBackend, file: Path, capacity: int) -> tuple[str, bool]:
    """A process is stopped in the middle of copying a page out; meanwhile the page's room is given to others.

    The outcome, and whether the bytes are the page's.
    """
    size = 7 * MIB
    space = namespace((size,))
    reader = start(capacity, **{LENGTHS: str([size])})
    pool, key = HostPool(space, 4), chain("a", 1)
    rest = HostPool(space, 4)  # pages of other bytes than the key's
    rest.poison()
    for turn in range(60):
        assert tier.write(pool.write_batch(key)).result(10) == [Outcome.HIT]
        file.write_bytes(b"\xee" * size)
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
            page = np.frombuffer(memory, np.uint8)
            expected = content(space, key[0])
            first, last = 0x00 if expected[0] == 0xEE else int(expected[0]), size - 1
            reader.tell("read_into", chain="a", pages=1, file=str(file))
            until = time.monotonic() + 10
            while page[0] != first and time.monotonic() < until:
                pass
            os.kill(reader.process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, reader.process.pid, os.WSTOPPED | os.WNOWAIT)
            stopped_inside = (page[last - 65536 :] == 0xEE).all()
            filler = 0
            while stopped_inside and tier.lookup_local(key_batch(space, key)).any():
                others = chain(f"other/{turn}/{filler}", 4)
                assert set(tier.write(rest.batch(others)).result(10)) == {Outcome.HIT}
                filler += 1
            if stopped_inside:  # and once more round, so that the very bytes are others'
                for more in range(8):
                    tier.write(rest.batch(chain(f"more/{turn}/{more}", 4))).result(10)
            os.kill(reader.process.pid, signal.SIGCONT)
            outcome, right = reader.answer(), bool(np.array_equal(page, expected))
            del page
            if stopped_inside:
                return outcome, right
            assert (outcome, right) == ("HIT", True)
    raise AssertionError("the reader was never stopped in the middle")


def test_a_page_that_goes_while_it_is_read_is_a_miss(
    start: Start, here: Callable[[int], MemoryBackend], tmp_path: Path
) -> None:
    tier = here(128 * MIB)
    assert _read_that_is_overtaken(start, tier, tmp_path / "page", 128 * MIB) == ("MISS", False)


def test_a_reader_that_does_not_look_again_serves_what_is_not_the_page(
    start: Start, here: Callable[[int], MemoryBackend], tmp_path: Path
) -> None:
    """The test above can fail: with the verdict believed, what was copied counts as a hit, and is not the page."""
    tier = here(128 * MIB)
    trusting = "from storage_backends.memory.backend import OUTCOMES, Verdict; OUTCOMES[Verdict.CHANGED] = 1"
    (tmp_path / "trusting.py").write_text(trusting)

    def untrue(capacity: int, **options: str) -> Worker:
        return start(capacity, HICACHE_EXT_TEST_FIRST="trusting", PYTHONPATH=str(tmp_path), **options)

    assert _read_that_is_overtaken(untrue, tier, tmp_path / "page", 128 * MIB) == ("HIT", False)
    assert backend.OUTCOMES[backend.Verdict.CHANGED] is Outcome.MISS


def test_a_stopped_process_holds_nobody_up_who_has_the_region(
    start: Start, here: Callable[[int], MemoryBackend]
) -> None:
    """Who comes meanwhile is told, in seconds, and gets the same region when the process goes on."""
    first = start()
    first.ask("store", chain="a", pages=4)
    tier = here(64 * MIB)
    first.tell("write_forever", chain="w")
    first.answer()
    os.kill(first.process.pid, signal.SIGSTOP)
    for turn in range(40):
        keys = chain(f"mine/{turn}", 16)
        assert tier.write(HostPool(SPACE, 16).write_batch(keys)).result(5) == [Outcome.HIT] * 16
        assert served(tier, SPACE, keys, 5) == [Outcome.HIT] * 16
    tier.close()
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="do not answer"):
        here(64 * MIB)
    assert time.monotonic() - began < 10
    os.kill(first.process.pid, signal.SIGCONT)
    assert served(here(64 * MIB), SPACE, chain("mine/39", 16)).count(Outcome.HIT) > 0

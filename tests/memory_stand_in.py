"""Cases of the memory tier's way past the host over a driver that stands in for CUDA's, and faults of that driver:
`python -m tests.memory_stand_in`, where the loader finds that driver.

Belongs here: what one process does, and asserts. Does not belong here: where the driver is
(unit/test_memory_device.py), or what must be so on a GPU as well (memory_cases.py). Every case runs in a fork of its
own, which loads the driver for itself, and prints "NAME: ok" or a traceback.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hicache_ext.cli.main import app
from hicache_ext.store import TieredStore
from hicache_ext.store.tier import Tier
from storage_backends.base import Dispatcher, Outcome
from storage_backends.memory import MemoryBackend, backend, device
from storage_backends.memory.region import Room
from tests import memory_cases, past_blocks
from tests.gds_cases import read
from tests.gds_linker import Linked
from tests.memory_cases import MIB, opened, write
from tests.pages import HostPool, chain, namespace
from tests.stand_ins import OnDevice, library, set_number

CASES: dict[str, Callable[[], None]] = {}
SPACE = namespace((8192, 8192))


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


for shared in (
    memory_cases.both_routes_read_what_either_wrote,
    memory_cases.bytes_around_a_page_are_left_alone,
    memory_cases.a_flipped_byte_is_never_served,
):
    CASES[shared.__name__] = partial(shared, OnDevice)


def _spoil(case: Any, key: bytes, begin: bytes) -> None:
    memory = case.store.tiers[0].backend._memory.map
    start = memory.find(begin)
    assert start > 0
    memory[start + 77] ^= 0x40


REACHED = past_blocks.Reached(
    lambda: [{"type": "memory", "capacity": 64 * MIB}],
    lambda: [{"type": "tests.dictionary:DictionaryBackend"}], _spoil,
    lambda case: case.store.tiers[0].backend._device_out(), past_blocks.EVERY,
)  # fmt: skip
for name, blocks in past_blocks.CASES.items():
    CASES[f"vllm_{name}"] = partial(blocks, REACHED)


@case
def pages_that_go_while_they_are_read() -> None:
    memory_cases.pages_that_go_while_they_are_read(OnDevice, 2)


@case
def bytes_that_change_while_they_are_copied() -> None:
    memory_cases.bytes_that_change_while_they_are_copied(OnDevice, 1)


@case
def regions_are_shared_with_who_reaches_no_device() -> None:
    with tempfile.TemporaryDirectory() as folder:
        memory_cases.regions_are_shared_with_who_reaches_no_device(OnDevice, Path(folder) / "regions")
    assert pinned() == 0


def pinned() -> int:
    return library("cuda").stand_in_pinned()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextmanager
def while_waiting(call: Callable[[], None]) -> Iterator[None]:
    """What happens once, in a thread that waits for the device: its copies are done by then, and not looked at yet."""
    calls = [call]
    hook = ctypes.CFUNCTYPE(None)(lambda: calls.pop()() if calls else None)
    pointer = ctypes.c_void_p.in_dll(library("cuda"), "stand_in_while_waiting")
    pointer.value = ctypes.cast(hook, ctypes.c_void_p).value
    try:
        yield
    finally:
        pointer.value = None


def overtaken() -> list[Outcome]:
    """Pages whose room is given to others between their copy and the look at what they are then."""
    keys, pool = chain("one", 3), OnDevice(SPACE, 3)
    with opened(capacity=2 * MIB) as tier:
        assert write(tier, pool, keys) == [Outcome.HIT] * 3
        others = HostPool(SPACE, 8)

        def evict() -> None:
            for turn in range(40):
                tier.write(others.write_batch(chain(f"other {turn}", 8))).result(30)

        with while_waiting(evict):
            outcomes = read(tier, pool, keys)
        assert tier.stats()["corrupt"] == 0, "a lost race is nobody's damage"
        assert tier.stats()["changed"] == 3
        assert read(tier, pool, keys) == [Outcome.MISS] * 3
    return outcomes


@case
def a_page_that_goes_before_its_copy_counts_is_a_miss() -> None:
    assert overtaken() == [Outcome.MISS] * 3


@case
def two_who_write_one_page() -> None:
    keys, pool, host = chain("one", 3), OnDevice(SPACE, 3), HostPool(SPACE, 3)
    with opened() as tier:
        with while_waiting(lambda: write(tier, host, keys) and None):
            assert write(tier, pool, keys) == [Outcome.HIT] * 3
        assert (tier.stats()["stored"], tier.stats()["present"], tier.stats()["from_device"]) == (3, 3, 0)
        assert read(tier, pool, keys) == [Outcome.HIT] * 3
        assert tier.stats()["pages"] == 3


@case
def more_than_there_is_room_for() -> None:
    """What has arrived makes room for the rest, though each part is given places at once."""
    keys, pool = chain("one", 200), OnDevice(SPACE, 200)
    with opened(capacity=MIB) as tier:
        assert write(tier, pool, keys) == [Outcome.HIT] * 200
        assert 10 < read(tier, pool, keys).count(Outcome.HIT) < 100


@case
def a_device_that_fails_goes_out_of_use() -> None:
    keys, pool, host = chain("one", 6), OnDevice(SPACE, 6), HostPool(SPACE, 6)
    with opened() as tier:
        store = TieredStore([Tier("memory", tier)], Dispatcher())
        assert (store.reads_to_device, store.writes_from_device) == (0, True)
        assert write(tier, pool, keys) == [Outcome.HIT] * 6
        set_number("stream_error", 1)
        assert read(tier, pool, keys) == [Outcome.FAILED] * 6
        set_number("stream_error", 0)
        assert read(tier, pool, keys) == [Outcome.HIT] * 6, "one failure is not the end"
        set_number("stream_error", 1)
        for _ in range(2):
            assert tier.capabilities.memory == ("host", "device")
            assert read(tier, pool, keys) == [Outcome.FAILED] * 6
            assert write(tier, pool, chain("two", 6)) == [Outcome.FAILED] * 6
        assert tier.capabilities.memory == ("host",)
        assert (store.reads_to_device, store.writes_from_device) == (None, False)
        assert str(tier.stats()["device"]).startswith("out of use (")
        set_number("stream_error", 0)
        assert read(tier, pool, keys) == [Outcome.FAILED] * 6
        assert read(tier, host, keys) == [Outcome.HIT] * 6, "the pages are not the device's to lose"
        assert read(tier, host, chain("two", 6)) == [Outcome.MISS] * 6, "nothing is left of a write that failed"
        assert write(tier, host, chain("two", 6)) == [Outcome.HIT] * 6
        assert tier.stats()["corrupt"] == 0
        since = time.monotonic()
    assert time.monotonic() - since < 8
    assert pinned() == 0


@case
def copies_that_the_driver_refuses() -> None:
    keys, pool = chain("one", 6), OnDevice(SPACE, 6)
    with opened() as tier:
        set_number("fails_copies", 1)
        assert write(tier, pool, keys) == [Outcome.FAILED] * 6
        set_number("fails_copies", 0)
        assert write(tier, pool, keys) == [Outcome.HIT] * 6
        assert read(tier, pool, keys) == [Outcome.HIT] * 6


def refused(why: str, **options: object) -> None:
    """The tier does not reach the device, says so, and is a host tier."""
    with opened(False, **options) as tier:
        tier.reach_device(0)
        tier.reach_device(0)
        print("device:", tier.stats()["device"])
        assert why in str(tier.stats()["device"]), tier.stats()["device"]
        assert tier.versions()["device"] == tier.stats()["device"]
        assert tier.capabilities.memory == ("host",)
        pool, keys = HostPool(SPACE, 4), chain("one", 4)
        assert write(tier, pool, keys) == read(tier, pool, keys) == [Outcome.HIT] * 4
        with pytest.raises(ValueError, match="host memory alone"):
            tier.read(OnDevice(SPACE, 4, declared=False).batch(keys))
    assert pinned() == 0


@case
def no_device() -> None:
    set_number("devices", 0)
    refused("no: the CUDA driver finds no usable device")


@case
def no_kernels() -> None:
    set_number("kernels", 0)
    refused("no: nothing verifies pages on the device: ")


@case
def pinning_refused() -> None:
    set_number("refuses_pinning", 1)
    refused("32.0MiB cannot be pinned (cuMemHostRegister: error 2). Fix: lower `capacity`, or raise")


@case
def no_memory_on_the_device() -> None:
    set_number("memory", 0)
    refused("no lanes to the device: out of memory for a list")


@case
def a_memory_limit() -> None:
    device.left = lambda: Room(10 * MIB, "the control group /pod")
    refused("pinning takes all of `capacity` at once, and the control group /pod has 10.0MiB left")


@case
def pinning_that_is_not_wanted() -> None:
    refused("no: pin: false", pin=False)


@case
def it_is_pinned_once_and_unpinned_before_it_is_unmapped() -> None:
    with opened(False) as tier:  # the stand-in ends the process where memory is unmapped first
        before = resident()
        tier.reach_device(0)
        tier.reach_device(0)
        tier.reach_device(1)
        assert pinned() == 1
        assert resident() - before >= 31 * MIB, "all of it is taken"
        assert not tier._region.prepare(32 * MIB, MIB), "so nothing is left to take ahead"
    assert pinned() == 0


@case
def who_drops_it_unpins_it() -> None:
    tier = MemoryBackend(MemoryBackend.Options.model_validate({"capacity": 8 * MIB}), Dispatcher())
    tier.reach_device(0)
    tier._memory = tier._region = tier._ahead = None
    tier._reach = None
    assert pinned() == 0


@case
def a_closed_tier_and_a_cancelled_batch() -> None:
    keys, pool = chain("one", 6), OnDevice(SPACE, 6)
    with opened() as tier:
        assert write(tier, pool, keys) == [Outcome.HIT] * 6
        entered, go_on = threading.Event(), threading.Event()

        def held() -> None:
            entered.set()
            assert go_on.wait(60)

        hold = [held] * device.READ_LANES
        hook = ctypes.CFUNCTYPE(None)(lambda: hold.pop()() if hold else None)
        pointer = ctypes.c_void_p.in_dll(library("cuda"), "stand_in_while_waiting")
        pointer.value = ctypes.cast(hook, ctypes.c_void_p).value
        running = [tier.read(pool.batch(keys)) for _ in range(device.READ_LANES)]
        until = time.monotonic() + 30
        while hold and time.monotonic() < until:
            time.sleep(0.005)
        cancelled, queued = tier.read(pool.batch(keys)), tier.read(pool.batch(keys))
        cancelled.cancel()
        closing = threading.Thread(target=tier.close)
        closing.start()
        while not tier._closing.is_set():
            time.sleep(0.005)
        assert not any(done.done for done in (*running, cancelled, queued)), "what the device may touch has no outcome"
        assert pinned() == 1
        go_on.set()
        assert all(done.result(30) == [Outcome.HIT] * 6 for done in running), "what had begun runs to its end"
        assert cancelled.result(30) == queued.result(30) == [Outcome.TIMEOUT] * 6
        closing.join(30)
        assert pinned() == 0
        assert tier.read(pool.batch(keys)).result(5) == [Outcome.MISS] * 6
        pointer.value = None


@case
def a_device_that_never_ends() -> None:
    backend.CLOSE_SECONDS = 2
    keys, pool = chain("one", 6), OnDevice(SPACE, 6)
    with opened() as tier:
        assert write(tier, pool, keys) == [Outcome.HIT] * 6
        entered, for_ever = threading.Event(), threading.Event()

        def hang() -> None:
            entered.set()
            for_ever.wait()

        pointer = ctypes.c_void_p.in_dll(library("cuda"), "stand_in_while_waiting")
        hook = ctypes.CFUNCTYPE(None)(hang)
        pointer.value = ctypes.cast(hook, ctypes.c_void_p).value
        done = tier.read(pool.batch(keys))
        assert entered.wait(30)
        since = time.monotonic()
        tier.close()
        assert time.monotonic() - since < 8
        assert not done.done
        assert pinned() == 1, "the device may yet read from there"


@case
def a_linker_s_pages_go_past_the_host() -> None:
    tier = MemoryBackend(MemoryBackend.Options.model_validate({"capacity": 32 * MIB}), Dispatcher())
    linked = Linked([Tier("memory", tier)])  # which has the tier reach the device
    keys = [key.hex() for key in chain("linked", 30)]  # hashes, as engines have them: the table relies on it
    there, back = list(range(30)), list(range(9, 39))
    wanted = linked.fill()
    assert linked.offload(keys, there)
    linked.fill(0xEE)
    assert linked.load(keys, back) is None
    assert linked.holds(wanted, there, back)
    assert (tier.stats()["from_device"], tier.stats()["to_device"]) == (30, 30)
    linked.close()


@case
def the_benchmark() -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "rows.json"
        asked = ["bench", "memory", "--page", "64KiB", "--size", "1MiB", "--rounds", "1", "--json", str(written)]
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, done.output
        assert "tier: pinned 64.0MiB, device 0 stand-in" in done.output
        rows = json.loads(written.read_text())["rows"]
    assert {(row["subject"], row["op"]) for row in rows} >= {
        (name, op) for name in ("ours", "cpu", "memcpy") for op in ("read", "write")
    }
    assert all(row["of_memcpy"] > 0 for row in rows)
    gc.collect()
    assert pinned() == 0


@case
def a_forked_process() -> None:
    for shared in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            options = {"region": "test", "directory": Path(folder) / "regions"} if shared else {}
            keys, pool = chain("one", 6), OnDevice(SPACE, 6)
            with opened(capacity=8 * MIB, **options) as tier:
                assert write(tier, pool, keys) == [Outcome.HIT] * 6
                child = os.fork()
                if child == 0:
                    wrong = 1
                    try:
                        assert tier.read(pool.batch(keys)).result(5) == [Outcome.MISS] * 6
                        assert tier.write(pool.batch(chain("two", 6))).result(5) == [Outcome.REJECTED] * 6
                        assert not tier.lookup(pool.batch(keys)).any()
                        assert tier.remove(pool.batch(keys)) == 0
                        tier.clear([SPACE])
                        assert tier.going(5) == []
                        assert tier.stats() == {"pages": 0, "bytes": 0}
                        tier.reach_device(0)
                        tier.close()
                        wrong = 0
                    finally:
                        os._exit(wrong)
                assert os.waitpid(child, 0)[1] == 0
                assert read(tier, pool, keys) == [Outcome.HIT] * 6
                assert write(tier, pool, chain("two", 6)) == [Outcome.HIT] * 6
                assert read(tier, pool, chain("two", 6)) == [Outcome.HIT] * 6


def main() -> None:
    for name, call in CASES.items():
        print(f"== {name}", flush=True)
        child = os.fork()
        if child == 0:
            logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="said: %(message)s")
            set_number("kernels", 1)
            try:
                call()
                print(f"{name}: ok", flush=True)
            except BaseException:
                print(traceback.format_exc(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()

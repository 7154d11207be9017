"""Cases of the gds tier over libraries that stand in for CUDA's driver and cuFile: `python -m tests.gds_worker NAME`.

Belongs here: what one process does, and asserts. Does not belong here: which processes there are (unit/test_gds.py).
Every case runs in a fork of its own, which loads the libraries for itself, and prints "NAME: ok" or a traceback.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage_backends.base import OptionError, Outcome
from storage_backends.gds.decision import NO_STREAM, Mode, Way
from tests import gds_cases, gds_linker, past_blocks
from tests.gds_cases import cufile_mode, disk_of, filled, flip, opened, place_of, read
from tests.pages import HostPool, chain, namespace
from tests.stand_ins import OnDevice, number, set_number

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


def ways_here() -> list[Way]:
    """That the stand-in serves; in stream order only past the CPU."""
    words = os.environ.get("STAND_IN_CUFILE", "")
    return [
        way for way in Way if f"no{way}" not in words and (way is not Way.STREAM or cufile_mode() != "compatibility")
    ]


@case
def both_routes_read_what_either_wrote(folder: Path) -> None:
    for way in ways_here():
        before = {name: number(name) for name in ("reads", "writes", "batches", "streams")}
        gds_cases.both_routes_read_what_either_wrote(folder / way, OnDevice, way=way)
        more = {name: number(name) > count for name, count in before.items()}
        assert more == {"reads": True, "writes": True, "batches": way == "batch", "streams": way == "stream"}


@case
def the_way_that_is_taken(folder: Path) -> None:
    backend = opened(folder, mode="auto")
    print("decision:", backend.decision)
    backend.close()


@case
def the_way_that_is_asked_for(folder: Path) -> None:
    backend = opened(folder, mode="compatibility")
    print("decision:", backend.decision)
    backend.close()


@case
def stream_order_is_for_true_gds_alone(folder: Path) -> None:
    for mode in ("auto", "compatibility"):
        backend = opened(folder / mode, mode=mode, way="stream")
        assert (backend.decision.mode, backend.capabilities.memory) == (Mode.STAGING, ("host",))
        assert backend.decision.why.endswith(NO_STREAM)
        backend.close()
    with pytest.raises(OptionError, match=f"^mode = 'gds': .*{re.escape(NO_STREAM)}"):
        opened(folder / "gds", mode="gds", way="stream")


for shared in (
    gds_cases.bytes_around_a_page_are_left_alone,
    gds_cases.a_flipped_byte_is_never_served,
    gds_cases.a_slot_that_is_rewritten_in_mid_read_is_a_miss,
    gds_cases.without_the_second_look_at_the_header_it_would_be_served,
):
    CASES[shared.__name__] = partial(shared, device=OnDevice)
for linked in (
    gds_linker.pages_go_past_the_host,
    gds_linker.a_bad_page_fails_its_load_alone,
    gds_linker.with_a_tier_below_pages_are_written_through_the_host,
):
    CASES[f"linker_{linked.__name__}"] = linked


def _reached(folder: Path) -> past_blocks.Reached:
    """The gds tier, for the cases of vLLM's blocks."""
    made = itertools.count()

    def tier(kind: str, **options: Any) -> list[dict[str, Any]]:
        return [{"type": kind, "path": str(folder / str(next(made))), "capacity": 256 << 20, **options}]

    def spoil(case: Any, key: bytes, begin: bytes) -> None:
        file, at = place_of(case.store.tiers[0].backend, case.space, key)
        flip(file, at + 4096 + 77)

    return past_blocks.Reached(
        lambda: tier("gds", mode=cufile_mode()), lambda: tier("local"), spoil,
        lambda case: case.store.tiers[0].backend._out("a test"),
    )  # fmt: skip


for name, blocks in past_blocks.CASES.items():
    CASES[f"vllm_{name}"] = lambda folder, blocks=blocks: blocks(_reached(folder))  # type: ignore[misc]


@case
def registered_memory_is_told_to_cufile(folder: Path) -> None:
    kept: list[OnDevice] = []  # the driver that stands in would take what lies there next for the device's too
    for way in ways_here():
        backend, space, keys, first = filled(folder / way, OnDevice, way=way)
        pool = OnDevice(space, 6)
        kept += [first, pool]
        backend.register_memory(pool.memory.address, pool.memory.size)
        host = HostPool(space, 6)
        backend.register_memory(host.memory.address, host.memory.size)
        wanted = 0 if "noregister" in os.environ.get("STAND_IN_CUFILE", "") else 1
        assert number("registered") == wanted, "device memory, and only that"
        assert bool(backend.stats()["gds_unregistered"]) != bool(wanted)
        assert read(backend, pool, keys) == [Outcome.HIT] * 6
        assert number("files"), "a file is kept known"
        backend.close()
        assert number("registered") == number("files") == 0


@case
def cufile_that_fails_goes_out_of_use(folder: Path) -> None:
    backend, space, keys, pool = filled(folder, OnDevice)
    host = HostPool(space, 6)
    set_number("read_result", -5011)
    for _ in range(4):
        assert backend.capabilities.memory == ("host", "device")
        assert read(backend, pool, keys) == [Outcome.FAILED] * 6
    assert backend.capabilities.memory == ("host",)
    assert (backend.stats()["gds_mode"], backend.stats()["gds_reason"]) == ("staging", "cuFile error 5011")
    assert read(backend, pool, keys) == [Outcome.FAILED] * 6
    assert read(backend, host, keys) == [Outcome.HIT] * 6, "the pages are not the device's to lose"
    assert disk_of(backend).errors == 0, "nor is the disk to blame"
    backend.close()


@case
def a_disk_that_fails_is_the_disk_s_trouble(folder: Path) -> None:
    backend, _, keys, pool = filled(folder, OnDevice)
    set_number("read_result", -5044)
    assert read(backend, pool, keys) == [Outcome.FAILED] * 6
    assert disk_of(backend).errors == 6
    set_number("read_result", 0)
    assert read(backend, pool, keys) == [Outcome.HIT] * 6
    assert backend.capabilities.memory == ("host", "device")
    backend.close()


@case
def a_stream_in_error(folder: Path) -> None:
    backend, space, keys, pool = filled(folder, OnDevice)
    set_number("stream_error", 1)
    assert read(backend, pool, keys) == [Outcome.FAILED] * 6
    assert backend.write(pool.write_batch(chain("two", 6))).result(30) == [Outcome.FAILED] * 6
    assert backend.capabilities.memory == ("host",)
    assert read(backend, HostPool(space, 6), keys) == [Outcome.HIT] * 6
    since = time.monotonic()
    backend.close()
    assert time.monotonic() - since < 8


@case
def out_of_device_memory(folder: Path) -> None:
    backend = opened(folder)
    space, keys = namespace((8192, 8192)), chain("one", 6)
    pool, host = OnDevice(space, 6), HostPool(space, 6)
    set_number("memory", 0)
    assert backend.write(pool.write_batch(keys)).result(30) == [Outcome.FAILED] * 6
    assert backend.write(host.write_batch(keys)).result(30) == [Outcome.HIT] * 6
    assert read(backend, pool, keys) == [Outcome.FAILED] * 6
    set_number("memory", 1 << 30)
    assert read(backend, pool, keys) == [Outcome.HIT] * 6, "and goes on"
    assert backend.stats().get("corrupt", 0) == 0
    backend.close()


@case
def a_forked_process(folder: Path) -> None:
    backend, space, keys, pool = filled(folder, OnDevice)
    child = os.fork()
    if child == 0:
        try:
            assert backend.read(pool.batch(keys)).result(5) == [Outcome.MISS] * 6
            assert backend.write(pool.batch(chain("two", 6))).result(5) == [Outcome.REJECTED] * 6
            backend.register_memory(pool.memory.address, pool.memory.size)
            assert backend.stats() == {"state": "forked"}
            backend.close()
            own = opened(folder.parent / "child")  # the driver was opened by the parent
            assert own.capabilities.memory == ("host",)
            assert "forked" in own.decision.why, own.decision
            assert own.write(HostPool(space, 6).write_batch(keys)).result(30) == [Outcome.HIT] * 6
            own.close()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert read(backend, pool, keys) == [Outcome.HIT] * 6
    backend.close()


@case
def a_closed_tier_and_a_cancelled_batch(folder: Path) -> None:
    backend, _, keys, pool = filled(folder, OnDevice)
    slots = disk_of(backend).slots
    held = slots._queue
    threads = list(slots._threads)
    for _ in threads:  # nobody takes a part now
        held.put(None)
    for thread in threads:
        thread.join(10)
    done = backend.read(pool.batch(keys))
    done.cancel()
    slots._threads = []
    slots._start()
    assert done.result(30) == [Outcome.TIMEOUT] * 6
    assert slots.stop(5)
    assert backend.read(pool.batch(keys)).result(30) == [Outcome.TIMEOUT] * 6
    backend.close()


@case
def a_file_that_goes_is_let_go_of(folder: Path) -> None:
    backend, _, _, _ = filled(folder, OnDevice)
    slots = disk_of(backend).slots
    assert number("files") == 1
    slots.retain_files([])
    assert number("files") == 0
    backend.close()


def fallen_back(folder: Path, why: str) -> None:
    backend = opened(folder)
    print("decision:", backend.decision)
    assert backend.capabilities.memory == ("host",)
    assert why in backend.decision.why, backend.decision
    assert backend.stats()["gds_mode"] == "staging"
    space, keys = namespace((8192, 8192)), chain("one", 6)
    pool = HostPool(space, 6)
    assert backend.write(pool.write_batch(keys)).result(30) == [Outcome.HIT] * 6
    assert read(backend, pool, keys) == [Outcome.HIT] * 6
    with pytest.raises(ValueError, match="host memory alone"):
        backend.read(OnDevice(space, 6, declared=False).batch(keys))
    backend.close()
    with pytest.raises(OptionError, match=f"^mode = 'gds': .*{re.escape(why)}"):
        opened(folder, mode="gds")


@case
def no_driver(folder: Path) -> None:
    fallen_back(folder, "no CUDA driver: libcuda.so.1 cannot be loaded")


@case
def no_device(folder: Path) -> None:
    fallen_back(folder, "the CUDA driver finds no usable device")


@case
def no_kernels(folder: Path) -> None:
    fallen_back(folder, "nothing verifies pages on the device")


@case
def no_cufile(folder: Path) -> None:
    from storage_backends.gds import decision

    decision.libraries = lambda: [decision.LIBRARY]
    fallen_back(folder, "cuFile cannot be loaded: libcufile.so.0")


@case
def cufile_hangs(folder: Path) -> None:
    from storage_backends.gds import decision

    decision.SECONDS = 1.0
    fallen_back(folder, "cuFile did not answer within 1 s")


@case
def cufile_refuses(folder: Path) -> None:
    fallen_back(folder, "cuFile's driver does not open: cuFile error 5001")


@case
def cufile_does_not_take_the_file(folder: Path) -> None:
    """Without udev's database, or on tmpfs: the reason ends with what to do."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        fallen_back(Path(there) / "tier", "cuFile does not take the file: cuFile error 5027: ")
        assert "is not on a block device" in opened(Path(there) / "tier").decision.why


@case
def modes_that_are_asked_for(folder: Path) -> None:
    staged = opened(folder, mode="staging")
    assert (staged.capabilities.memory, staged.decision.why) == (("host",), "mode: staging")
    staged.close()
    chosen = opened(folder, mode="compatibility")
    assert (str(chosen.decision.mode), chosen.decision.why) == ("compatibility", "mode: compatibility")
    chosen.close()
    backend = opened(folder, mode="gds")
    assert (str(backend.decision.mode), backend.decision.why) == ("gds", "")
    backend.close()


@case
def peer_to_peer_that_does_not_reach_this_disk(folder: Path) -> None:
    backend = opened(folder, mode="auto")
    assert str(backend.decision.mode) == "staging"
    assert "cuFile error 5001" in backend.decision.why
    assert backend.capabilities.memory == ("host",)
    backend.close()


def main(names: list[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="said: %(message)s")
                try:
                    CASES[name](Path(folder) / "tier")
                    print(f"{name}: ok", flush=True)
                except BaseException:
                    print(f"{name}: {traceback.format_exc()}", flush=True)
                os._exit(0)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))

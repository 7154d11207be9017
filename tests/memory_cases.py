"""Cases of the memory tier, for pages in whatever memory a test takes for a device's.

Belongs here: what must be so on a GPU (gpu/test_memory_device.py) and over a driver that stands in for one
(memory_stand_in.py). Does not belong here: either kind of device memory.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from storage_backends.base import Dispatcher, Outcome
from storage_backends.memory import MemoryBackend
from tests.gds_cases import LENGTHS, OnDevice, leaves_bytes_around_a_page_alone, read
from tests.pages import HostPool, chain, content, namespace

MIB = 1 << 20


@contextmanager
def opened(reach: bool = True, **options: Any) -> Iterator[MemoryBackend]:
    values = {"capacity": 32 * MIB, **options}
    dispatcher = Dispatcher()
    backend = MemoryBackend(MemoryBackend.Options.model_validate(values), dispatcher)
    try:
        if reach:
            backend.reach_device(0)
            assert backend.capabilities.memory == ("host", "device"), backend.stats()["device"]
        yield backend
    finally:
        backend.close()
        dispatcher.close()


def write(backend: MemoryBackend, pool: HostPool, keys: list[bytes]) -> list[Outcome]:
    return backend.write(pool.write_batch(keys)).result(60)


def flip(backend: MemoryBackend, space: Any, key: bytes, at: int) -> None:
    """Change a byte of a stored page, counted from its payload's first, where it lies."""
    assert backend._memory is not None
    start = backend._memory.map.find(content(space, key)[:64].tobytes())
    assert start > 0
    backend._memory.map[start + at] ^= 0x40


def both_routes_read_what_either_wrote(device: OnDevice) -> None:
    with opened(capacity=256 * MIB) as backend:
        for lengths in LENGTHS:
            space = namespace(lengths)
            ours, theirs = chain("by the device", 5), chain("by the host", 5)
            there, host = device(space, 5), HostPool(space, 5)
            assert write(backend, there, ours) == write(backend, host, theirs) == [Outcome.HIT] * 5
            for keys in (ours, theirs):
                assert read(backend, there, keys) == read(backend, host, keys) == [Outcome.HIT] * 5
        stats = backend.stats()
        assert (stats["to_device"], stats["from_device"]) == (50, 25)
        assert "pinned 256" in str(stats["device"])


def regions_are_shared_with_who_reaches_no_device(device: OnDevice, folder: Any) -> None:
    shared = {"region": "test", "directory": folder, "capacity": 32 * MIB}
    space, keys = namespace((100_000, 4096)), chain("one", 8)
    with opened(**shared) as ours, opened(False, **shared) as theirs, opened(**shared) as third:
        assert write(ours, device(space, 8), keys[:4]) == [Outcome.HIT] * 4
        assert write(theirs, HostPool(space, 8), keys) == [Outcome.HIT] * 8, "four of them are there"
        assert theirs.stats()["stored"] == 4
        assert read(theirs, HostPool(space, 8), keys) == read(ours, device(space, 8), keys) == [Outcome.HIT] * 8
        assert read(third, device(space, 8), keys) == [Outcome.HIT] * 8


def bytes_around_a_page_are_left_alone(device: OnDevice) -> None:
    with opened() as backend:
        leaves_bytes_around_a_page_alone(backend, device)


def a_flipped_byte_is_never_served(device: OnDevice) -> None:
    space, keys = namespace((100_000, 4096)), chain("one", 8)
    pool = device(space, 8)
    with opened() as backend:
        assert write(backend, pool, keys) == [Outcome.HIT] * 8
        for key, at in zip(keys, [0, 65535, 65536, 104_095, 64 - 4096, 200 - 4096], strict=False):
            flip(backend, space, key, at)
        assert read(backend, pool, keys) == [Outcome.CORRUPT] * 6 + [Outcome.HIT] * 2
        assert read(backend, pool, keys) == [Outcome.MISS] * 6 + [Outcome.HIT] * 2, "it is out of the table"
        assert write(backend, pool, keys) == [Outcome.HIT] * 8
        assert read(backend, pool, keys) == [Outcome.HIT] * 8, "the next write heals it"
        assert backend.stats()["corrupt"] == 6


def bytes_that_change_while_they_are_copied(device: OnDevice, seconds: float) -> Counter[Outcome]:
    """Somebody writes where he should not, in pages that are read all the time: each is right, or damaged and gone."""
    space, keys = namespace((1 << 20, 300)), chain("one", 4)
    pool, over = device(space, 4), threading.Event()
    said: Counter[Outcome] = Counter()
    with opened() as backend:
        assert write(backend, pool, keys) == [Outcome.HIT] * 4
        assert backend._memory is not None
        memory = backend._memory.map
        starts = [memory.find(content(space, key)[:64].tobytes()) for key in keys]

        def toggle() -> None:
            draw = random.Random(1)
            while not over.is_set():
                at = draw.choice(starts) + draw.randrange(1 << 20)
                was = memory[at]
                memory[at] = was ^ 0x10
                memory[at] = was

        thread = threading.Thread(target=toggle, daemon=True)
        thread.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            said.update(read(backend, pool, keys))
            # Written again where it was damaged: elsewhere. What was read stays right there, whoever toggles it.
            if said[Outcome.CORRUPT] > 40:
                break
            write(backend, pool, keys)
        over.set()
        thread.join(30)
    assert set(said) <= {Outcome.HIT, Outcome.CORRUPT}, said
    return said


def pages_that_go_while_they_are_read(device: OnDevice, seconds: float) -> Counter[Outcome]:
    """Host and device write into a small region, whose pages go all the time, while both read. What reads from the
    device said."""
    space = namespace((60_000, 300))
    over, newest, lock = threading.Event(), [0], threading.Lock()
    said: Counter[Outcome] = Counter()
    wrong: list[BaseException] = []

    def keys_of(first: int) -> list[bytes]:
        return [chain(str(number), 1)[0] for number in range(first, first + 4)]

    def writing(backend: MemoryBackend, pool: HostPool, by: Any) -> None:
        while not over.is_set():
            with lock:
                first = newest[0] = newest[0] + 4
            assert set(by(backend, pool, keys_of(first))) <= {Outcome.HIT, Outcome.REJECTED}

    def reading(backend: MemoryBackend, pool: HostPool, by: Any) -> None:
        draw = random.Random(id(pool))
        while not over.is_set():
            outcomes = by(backend, pool, keys_of(4 * max(1, newest[0] // 4 - draw.randrange(10))))
            assert set(outcomes) <= {Outcome.HIT, Outcome.MISS}, outcomes
            if type(pool) is not HostPool:
                with lock:
                    said.update(outcomes)

    def guarded(*arguments: Any) -> None:
        call, *rest = arguments
        try:
            call(*rest)
        except BaseException as error:
            wrong.append(error)
            over.set()

    with opened(capacity=2 * MIB) as backend:
        pools = [HostPool(space, 4), device(space, 4), HostPool(space, 4), device(space, 4), device(space, 4)]
        calls = [(writing, write)] * 2 + [(reading, read)] * 3
        threads = [
            threading.Thread(target=guarded, args=(call, backend, pool, by), daemon=True)
            for (call, by), pool in zip(calls, pools, strict=True)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + seconds
        while not over.wait(0.05) and (time.monotonic() < until or min(said[Outcome.HIT], said[Outcome.MISS]) < 20):
            assert time.monotonic() < until + 60, said
        over.set()
        for thread in threads:
            thread.join(60)
        assert not wrong, wrong[0]
        assert int(backend.stats()["evicted"]) > 20
        assert backend.stats()["corrupt"] == 0
    return said

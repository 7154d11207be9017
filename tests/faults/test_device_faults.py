"""A device that fails under each engine: the kernel itself gives short transfers, errors and late answers.

The faults are the file system's (tests.fuse), so each engine runs as it is, the native one on its own slot path; those
of test_local_faults are injected above the engine. In every test a page that is a HIT has the right bytes, and one that
is not is looked for again.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hicache_ext.store.tiered import Tier, TieredStore
from storage_backends.base import Completion, OptionError, Outcome
from storage_backends.format import BLOCK, SlotShape
from storage_backends.local import LocalBackend
from tests import pages
from tests.fuse import fuse_disk
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, local_tiers

#: One buffer is large enough to travel as a request of its own from registered memory.
SPACE = namespace((16384, 16384))
LARGE = namespace((256 << 10, 256 << 10), model="model-b")
PATIENCE = 30.0

Faults = Callable[..., None]


@pytest.fixture(params=["native", "liburing", "threads"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Open, Faults]]:
    with fuse_disk(tmp_path) as disk, local_tiers(disk.path / "tier", request.param) as open_one:

        def faults(**rules: Any) -> None:
            text = json.dumps(rules)
            disk.plan.write_text(text + " " * (1 + len(disk.plan.read_text()) if disk.plan.exists() else 0))

        try:
            open_one().close()
        except OptionError as error:
            pytest.skip(str(error))
        yield open_one, faults


@pytest.fixture
def tier(parts: tuple[Open, Faults], request: pytest.FixtureRequest) -> LocalBackend:
    backend = scanned(parts[0]())
    assert "faults" not in str(backend.stats()["engine"]), "nothing stands between the tier and its engine"
    return backend


@pytest.fixture
def faults(parts: tuple[Open, Faults]) -> Faults:
    return parts[1]


def scanned(backend: LocalBackend) -> LocalBackend:
    """Past its first page, and the header scan that begins with it: that reads the device too."""
    store(backend, chain("first", 1))
    deadline = time.monotonic() + PATIENCE
    while "recovered_by_scan" not in backend.stats():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return backend


def store(backend: LocalBackend | TieredStore, keys: list[bytes], space: Any = SPACE) -> list[Outcome]:
    return backend.write(HostPool(space, len(keys)).write_batch(keys)).result(PATIENCE)


def served(backend: LocalBackend | TieredStore, keys: list[bytes], space: Any = SPACE) -> list[Outcome]:
    pool = HostPool(space, len(keys))
    if isinstance(backend, LocalBackend):
        backend.register_memory(pool.memory.address, pool.memory.size)
    return pages.served(backend, space, keys, PATIENCE, pool)


def resident(backend: LocalBackend, keys: list[bytes]) -> list[bool]:
    return [bool(there) for there in backend.lookup(key_batch(SPACE, keys))]


@pytest.mark.parametrize("space", [SPACE, LARGE], ids=["vectored", "large buffers"])
def test_short_reads_are_continued(tier: LocalBackend, faults: Faults, space: Any) -> None:
    keys = chain("a", 16)
    assert store(tier, keys, space) == [Outcome.HIT] * 16
    faults(read=[{"fault": "short", "count": 8}])
    assert served(tier, keys, space) == [Outcome.HIT] * 16
    assert tier.stats().get("corrupt", 0) == 0


def test_a_device_that_takes_and_gives_only_a_part(tier: LocalBackend, faults: Faults) -> None:
    keys = chain("a", 16)
    faults(write=[{"fault": "short"}])
    assert set(store(tier, keys)).isdisjoint({Outcome.HIT})
    assert resident(tier, keys) == [False] * 16
    faults()
    assert store(tier, keys) == [Outcome.HIT] * 16
    faults(read=[{"fault": "short"}])
    assert served(tier, keys) == [Outcome.CORRUPT] * 16
    faults()
    assert resident(tier, keys) == [False] * 16, "quarantined"
    assert store(tier, keys) == [Outcome.HIT] * 16
    assert served(tier, keys) == [Outcome.HIT] * 16


@pytest.mark.parametrize(("name", "outcome"), [("EIO", Outcome.FAILED), ("ENOSPC", Outcome.REJECTED)])
def test_writes_that_fail_in_the_middle_of_a_batch(
    tier: LocalBackend, faults: Faults, name: str, outcome: Outcome
) -> None:
    keys = chain("a", 32)
    faults(write=[{"fault": "errno", "errno": name, "after": 7, "count": 5}])
    outcomes = store(tier, keys)
    assert sorted(outcomes) == sorted([outcome] * 5 + [Outcome.HIT] * 27)
    assert resident(tier, keys) == [known == Outcome.HIT for known in outcomes]
    there = [Outcome.HIT if known == Outcome.HIT else Outcome.MISS for known in outcomes]
    assert served(tier, keys) == there
    assert tier.stats()["io_errors"] == 5
    faults()
    assert store(tier, keys) == [Outcome.HIT] * 32, "the next write heals"
    assert served(tier, keys) == [Outcome.HIT] * 32


def test_reads_that_fail_in_the_middle_of_a_batch(tier: LocalBackend, faults: Faults) -> None:
    keys = chain("a", 32)
    store(tier, keys)
    faults(read=[{"fault": "errno", "errno": "EIO", "after": 7, "count": 5}])
    outcomes = served(tier, keys)
    assert sorted(outcomes) == [Outcome.HIT] * 27 + [Outcome.FAILED] * 5
    assert served(tier, keys) == [Outcome.HIT] * 32, "an error that passed costs nothing more"
    keys = chain("b", 32)
    store(tier, keys)
    faults(read=[{"fault": "errno", "errno": "EIO"}])
    for _ in range(2):
        assert served(tier, keys) == [Outcome.FAILED] * 32
    faults()
    assert resident(tier, keys) == [False] * 32, "twice is the page: it is not offered any more"
    assert store(tier, keys) == [Outcome.HIT] * 32
    assert served(tier, keys) == [Outcome.HIT] * 32


def test_reads_that_bring_other_bytes(tier: LocalBackend, faults: Faults) -> None:
    keys = chain("a", 32)
    store(tier, keys)
    faults(seed=1, read=[{"fault": "flip", "probability": 0.5}])
    outcomes = served(tier, keys)
    assert set(outcomes) == {Outcome.HIT, Outcome.CORRUPT}
    assert resident(tier, keys) == [known == Outcome.HIT for known in outcomes]
    faults()
    assert store(tier, keys) == [Outcome.HIT] * 32
    assert served(tier, keys) == [Outcome.HIT] * 32


@pytest.mark.slow
def test_a_device_that_answers_after_five_seconds(tier: LocalBackend, faults: Faults) -> None:
    """Who set a deadline has its pages back by then, for good; who set none waits, and gets the right bytes."""
    tiered = TieredStore([Tier("local", tier)], tier.dispatcher)
    keys = chain("a", 16)
    store(tiered, keys)
    faults(read=[{"fault": "delay", "seconds": 5, "after": 6}])
    pool = HostPool(SPACE, 16)
    pool.poison()
    outcomes = tiered.read(pool.batch(keys), deadline=time.monotonic() + 0.2).result(4)
    assert outcomes.count(Outcome.TIMEOUT) >= 10
    for page, outcome in enumerate(outcomes):
        assert outcome in (Outcome.HIT, Outcome.TIMEOUT)
        assert outcome != Outcome.HIT or pool.right(page, keys[page])
    pool.bytes[:] = np.random.default_rng(0).integers(0, 256, len(pool.bytes), np.uint8)  # the pages are reused
    reused = pool.bytes.copy()
    patient = HostPool(SPACE, 16)
    late = tier.read(patient.batch(keys))
    assert not late.wait(0.3)
    assert late.result(PATIENCE) == [Outcome.HIT] * 16
    assert all(patient.right(page, key) for page, key in enumerate(keys))
    assert np.array_equal(pool.bytes, reused), "a late byte landed in memory that was given back"


def test_close_under_load(parts: tuple[Open, Faults], tier: LocalBackend) -> None:
    """Every page of every batch ends once, as what became of it; what was acknowledged is there at the next start."""
    open_one, faults = parts
    store(tier, chain("warm", 16))
    faults(seed=1, read=[{"fault": "delay", "seconds": [0, 1]}], write=[{"fault": "delay", "seconds": [0, 1]}])
    begun: list[tuple[bool, list[bytes], HostPool, Completion]] = []
    closing = threading.Event()

    def load(thread: int) -> None:
        turn = 0
        while not closing.is_set():
            keys, pool = chain(f"{thread}/{turn}", 16), HostPool(SPACE, 16)
            begun.append((True, keys, pool, tier.write(pool.write_batch(keys))))
            warm = HostPool(SPACE, 16)
            begun.append((False, chain("warm", 16), warm, tier.read(warm.batch(chain("warm", 16)))))
            turn += 1

    threads = [threading.Thread(target=load, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    closing.set()  # a tier is not called after its close; what it has is under way
    for thread in threads:
        thread.join()
    tier.close()
    faults()
    acknowledged: list[bytes] = []
    ends: set[Outcome] = set()
    for write, keys, pool, completion in begun:
        outcomes = completion.result(PATIENCE)
        ends.update(outcomes)
        for page, outcome in enumerate(outcomes):
            if outcome == Outcome.HIT and write:
                acknowledged.append(keys[page])
            assert outcome != Outcome.HIT or pool.right(page, keys[page])
    assert ends <= {Outcome.HIT, Outcome.TIMEOUT, Outcome.REJECTED}
    assert Outcome.TIMEOUT in ends, "there was something to recall"
    assert served(open_one(), acknowledged[-200:]) == [Outcome.HIT] * len(acknowledged[-200:])


@pytest.mark.slow
def test_close_does_not_wait_for_ever(tier: LocalBackend, faults: Faults) -> None:
    keys = chain("a", 8)
    store(tier, keys)
    faults(read=[{"fault": "delay", "seconds": 60}])
    pool = HostPool(SPACE, 8)
    pending = tier.read(pool.batch(keys))
    time.sleep(0.1)
    began = time.monotonic()
    tier.close()
    assert time.monotonic() - began <= 8.5
    assert not pending.done, "no outcome while the device may still write to the pages"


@pytest.mark.parametrize("engine", ["native", "liburing", "threads"])
def test_a_write_that_the_kernel_takes_only_in_part(tmp_path: Path, engine: str) -> None:
    """A limit of the file's size in the middle of a slot: the pages before it, that page, and the pages beyond it."""
    keys = chain("a", 12)
    slot = SlotShape.of_namespace(SPACE).slot_bytes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with local_tiers(tmp_path / "tier", engine) as open_one:
        try:
            backend = scanned(open_one(capacity=16 << 20))
        except OptionError as error:
            pytest.skip(str(error))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK + 6 * slot + slot // 2 // BLOCK * BLOCK, limits[1]))
            outcomes = store(backend, keys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert outcomes == [Outcome.HIT] * 5 + [Outcome.FAILED] * 7
        assert served(backend, keys) == [Outcome.HIT] * 5 + [Outcome.MISS] * 7
        assert store(backend, keys) == [Outcome.HIT] * 12
        assert served(backend, keys) == [Outcome.HIT] * 12


@pytest.mark.parametrize("engine", ["native", "liburing", "threads"])
@pytest.mark.parametrize("fault", [{"fault": "errno", "errno": "EAGAIN"}, {"fault": "short"}], ids=["EAGAIN", "short"])
def test_a_device_that_never_gets_on(tmp_path: Path, engine: str, fault: dict[str, str]) -> None:
    """It asks for repeats, or takes a part and io_uring makes a repeat of that: not for ever."""
    keys = chain("a", 4)
    with fuse_disk(tmp_path, synchronous=True) as disk, local_tiers(disk.path / "tier", engine) as open_one:
        try:
            backend = scanned(open_one())
        except OptionError as error:
            pytest.skip(str(error))
        disk.plan.write_text(json.dumps({"write": [fault]}))
        taken = store(backend, keys)
        # Halves of halves are the whole in the end, for an engine that hears of each.
        assert fault["fault"] == "short" or taken == [Outcome.FAILED] * 4
        disk.plan.write_text("{}   ")
        there = [Outcome.HIT if known == Outcome.HIT else Outcome.MISS for known in taken]
        assert served(backend, keys) == there
        assert store(backend, keys) == [Outcome.HIT] * 4
        disk.plan.write_text(json.dumps({"read": [{"fault": "errno", "errno": "EAGAIN"}]}))
        assert served(backend, keys) == [Outcome.FAILED] * 4
        disk.plan.write_text("{} ")
        assert served(backend, keys) == [Outcome.HIT] * 4


@pytest.mark.slow
def test_a_page_that_is_written_after_the_close_is_known_to_the_next(parts: tuple[Open, Faults]) -> None:
    """Close gave up waiting; the device takes the page after all, and it is acknowledged: the log must say so too."""
    open_one, faults = parts
    tier, keys = scanned(open_one()), chain("a", 4)
    faults(write=[{"fault": "delay", "seconds": 9}])
    late = tier.write(HostPool(SPACE, 4).write_batch(keys))
    time.sleep(0.1)
    tier.close()
    assert not late.done
    faults()
    assert late.result(PATIENCE) == [Outcome.HIT] * 4
    assert served(open_one(), keys) == [Outcome.HIT] * 4

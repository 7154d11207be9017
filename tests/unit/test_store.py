"""The cascade over scripted backends: single flight, deadlines, health, and that a broken backend costs nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache_ext.config import Config
from hicache_ext.store import NO_TIER, TieredStore
from hicache_ext.store.copies import CopyBudget
from hicache_ext.store.health import Health, State
from hicache_ext.store.tiered import Tier
from storage_backends.base import (
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
)
from tests.pages import HostPool, chain, content, key_batch, namespace

SPACE = namespace((4096, 4096))


class Scripted(Backend):
    """Holds every page; `gate` holds back completions; `answer` is every page's outcome."""

    capabilities = Capabilities(persistent=False, shared=False)

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(BackendOptions(), dispatcher)
        self.gate = threading.Event()
        self.gate.set()
        self.answer = Outcome.HIT
        self.raising = False
        self.calls: list[tuple[str, int]] = []

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        return np.ones(len(batch), np.uint8)

    def read(self, batch: PageBatch) -> Completion:
        return self._run("read", batch)

    def write(self, batch: PageBatch) -> Completion:
        return self._run("write", batch)

    def remove(self, batch: KeyBatch) -> int:
        return 0

    def _run(self, what: str, batch: PageBatch) -> Completion:
        self.calls.append((what, len(batch)))
        if self.raising:
            raise RuntimeError("a bug in a backend")
        completion = Completion(len(batch), self.dispatcher)

        def work() -> None:
            self.gate.wait()
            for page in range(len(batch)):
                if what == "read" and self.answer == Outcome.HIT:
                    data, at = content(batch.namespace, batch.key(page)), 0
                    for buffer in batch.buffers(page):
                        buffer[:] = data[at : at + len(buffer)].tobytes()
                        at += len(buffer)
                completion.settle(page, self.answer)

        threading.Thread(target=work, daemon=True).start()
        return completion


@pytest.fixture
def scripted() -> Iterator[tuple[TieredStore, Scripted]]:
    dispatcher = Dispatcher()
    backend = Scripted(dispatcher)
    tier = Tier("scripted", backend, Health(2, 0.05), Health(2, 0.05))
    store = TieredStore([tier], dispatcher)
    yield store, backend
    backend.gate.set()
    store.close()


def test_two_readers_of_a_page_share_one_flight(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    backend.gate.clear()
    keys = chain("a", 8)
    pools = [HostPool(SPACE, 8) for _ in range(3)]
    first = store.read(pools[0].batch(keys))
    others = [store.read(pools[1].batch(keys[::-1])), store.read(pools[2].batch(keys[4:]))]
    assert backend.calls == [("read", 8)]
    backend.gate.set()
    for completion in (first, *others):
        assert set(completion.result(10)) == {Outcome.HIT}
    assert all(pools[0].right(i, key) for i, key in enumerate(keys))
    assert all(pools[1].right(i, key) for i, key in enumerate(keys[::-1]))
    assert all(pools[2].right(i, key) for i, key in enumerate(keys[4:]))
    assert store.read(pools[0].batch(keys)).result(10) == [Outcome.HIT] * 8
    assert backend.calls == [("read", 8)] * 2, "a flight that has landed is not joined"


def test_two_writers_of_a_page_share_one_flight(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    backend.gate.clear()
    keys = chain("a", 4)
    first = store.write(HostPool(SPACE, 4).write_batch(keys))
    second = store.write(HostPool(SPACE, 6).write_batch(keys + chain("b", 2)))
    assert backend.calls == [("write", 4), ("write", 2)]
    backend.gate.set()
    assert first.result(10) == [Outcome.HIT] * 4
    assert second.result(10) == [Outcome.HIT] * 6


def test_followers_share_the_leaders_failure(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    backend.gate.clear()
    backend.answer = Outcome.CORRUPT
    completions = [store.read(HostPool(SPACE, 2).batch(chain("a", 2))) for _ in range(2)]
    backend.gate.set()
    assert [c.result(10) for c in completions] == [[Outcome.CORRUPT] * 2] * 2


def test_a_deadline_ends_the_wait_and_no_late_byte_lands(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    backend.gate.clear()
    pool = HostPool(SPACE, 4)
    pool.poison()
    before = pool.bytes.copy()
    assert store.read(pool.batch(chain("a", 4)), time.monotonic() + 0.05).result(5) == [Outcome.TIMEOUT] * 4
    backend.gate.set()
    time.sleep(0.2)
    assert np.array_equal(pool.bytes, before)


def test_a_read_in_time_for_its_deadline_is_a_read(scripted: tuple[TieredStore, Scripted]) -> None:
    store, _ = scripted
    pool, keys = HostPool(SPACE, 4), chain("a", 4)
    assert store.read(pool.batch(keys), time.monotonic() + 10).result(5) == [Outcome.HIT] * 4
    assert all(pool.right(i, key) for i, key in enumerate(keys))


def test_staging_memory_is_bounded(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    store._staging = CopyBudget(3 * 8192)
    backend.gate.clear()
    outcomes = [store.read(HostPool(SPACE, 2).batch(chain(f"{i}", 2)), time.monotonic() + 0.3) for i in range(2)]
    assert outcomes[1].result(5) == [Outcome.REJECTED] * 2
    backend.gate.set()
    assert outcomes[0].result(5) == [Outcome.HIT] * 2
    time.sleep(0.05)
    assert store._staging.bytes == store._staging.pages == 0


def test_a_failing_tier_is_left_alone_and_comes_back(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    backend.answer = Outcome.FAILED
    pool = HostPool(SPACE, 2)
    for turn in range(2):
        assert store.read(pool.batch(chain(f"{turn}", 2))).result(5) == [Outcome.FAILED] * 2
    asked = len(backend.calls)
    assert store.read(pool.batch(chain("x", 2))).result(5) == [Outcome.MISS] * 2
    assert store.lookup(key_batch(SPACE, chain("x", 2))).tolist() == [NO_TIER] * 2
    assert len(backend.calls) == asked, "an unhealthy tier is not asked"
    assert store.stats()["scripted"]["read_health"] == "open"
    written = store.write(pool.write_batch(chain("w", 2))).result(5)
    assert written == [Outcome.FAILED] * 2, "writes have a health of their own"
    backend.answer = Outcome.HIT
    deadline = time.monotonic() + 5
    while store.read(pool.batch(chain("y", 2))).result(5) != [Outcome.HIT] * 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.stats()["scripted"]["read_health"] == "closed"


def test_a_backend_that_raises_costs_a_miss_and_not_a_thread(scripted: tuple[TieredStore, Scripted]) -> None:
    store, backend = scripted
    backend.raising = True
    pool = HostPool(SPACE, 2)
    assert store.read(pool.batch(chain("a", 2))).result(5) == [Outcome.FAILED] * 2
    backend.raising = False
    assert store.read(pool.batch(chain("a", 2))).result(5) == [Outcome.HIT] * 2


def test_a_closed_store_answers_and_holds_nothing(scripted: tuple[TieredStore, Scripted]) -> None:
    store, _ = scripted
    store.close()
    store.close()
    pool = HostPool(SPACE, 2)
    assert store.read(pool.batch(chain("a", 2))).result(0) == [Outcome.MISS] * 2
    assert store.write(pool.batch(chain("a", 2))).result(0) == [Outcome.REJECTED] * 2
    assert store.lookup(key_batch(SPACE, chain("a", 2))).tolist() == [NO_TIER] * 2


def test_open_from_a_configuration() -> None:
    store = TieredStore.open(Config.load({"tiers": [{"type": "memory", "capacity": "16MiB", "name": "ram"}]}))
    pool, keys = HostPool(SPACE, 3), chain("a", 3)
    assert store.write(pool.write_batch(keys)).result(5) == [Outcome.HIT] * 3
    assert store.lookup_local(key_batch(SPACE, keys)).tolist() == [0, 0, 0]
    pool.poison()
    assert store.read(pool.batch(keys)).result(5) == [Outcome.HIT] * 3
    stats = store.stats()["ram"]
    assert stats["write_hit"] == stats["read_hit"] == 3
    store.clear([SPACE])
    assert store.lookup(key_batch(SPACE, keys)).tolist() == [NO_TIER] * 3
    store.close()


@given(st.lists(st.tuples(st.sampled_from(["good", "bad", "ask"]), st.floats(0, 3)), max_size=60))
def test_health_never_locks_a_tier_out_for_ever(steps: list[tuple[str, float]]) -> None:
    health, now = Health(2, 1.0, 8.0), 0.0
    for what, pause in steps:
        now += pause
        if what == "ask":
            usable = health.usable(now)
            assert health.allow(now) == usable
        elif what == "good":
            health.good()
            assert health.state is State.CLOSED
        else:
            health.bad(now, "test")
    assert health.usable(now + 8.0)


def test_health_lets_one_probe_through_at_a_time() -> None:
    health = Health(1, 1.0)
    assert health.bad(0.0, "gone")
    assert [health.allow(t) for t in (0.5, 1.1, 1.2)] == [False, True, False]
    assert health.state is State.HALF_OPEN
    assert not health.bad(1.3, "still gone")
    assert not health.allow(2.5), "the back-off has doubled"
    assert health.allow(3.4)
    assert health.good()
    assert health.allow(3.5)


def test_an_outcome_is_given_once() -> None:
    completion = Completion(2)
    completion.settle(0, Outcome.HIT)
    with pytest.raises(RuntimeError, match="already has outcome"):
        completion.settle(0, Outcome.MISS)
    assert not completion.done
    with pytest.raises(TimeoutError):
        completion.result(0.01)

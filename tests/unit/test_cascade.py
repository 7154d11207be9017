"""Several tiers as one: what comes from where, what goes on to where; a slow or lying tier costs nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hicache_ext.config import Config, ConfigError
from hicache_ext.store import NO_TIER, TieredStore, copies
from hicache_ext.store.copies import CopyBudget, copy_pages
from hicache_ext.store.health import Health
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.late import LateBackend
from hicache_ext.store.tier import Cost, Promotion, Recent, Tier, Writing
from storage_backends.base import Backend, Capabilities, Completion, Dispatcher, KeyBatch, Outcome, PageBatch
from tests.dictionary import DictionaryBackend, DictionaryOptions
from tests.pages import HostPool, chain, key_batch, namespace

SPACE = namespace((4096, 4096))
PAGE = 8192


class Server(DictionaryBackend):
    """A remote store as the cascade meets one: asked over a wire (`knows` is false), held up, wrong or down at will."""

    capabilities = Capabilities(persistent=True, shared=True)

    def __init__(self, options: DictionaryOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self.open = threading.Event()
        self.open.set()
        self.down = False
        self.asked: list[str] = []

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        self.asked.append("lookup")
        self.open.wait()
        return np.zeros(len(batch), np.uint8) if self.down else super().lookup(batch)

    def get(self, *args: Any) -> Outcome:
        self.asked.append("get")
        self.open.wait()
        return Outcome.FAILED if self.down else super().get(*args)

    def put(self, *args: Any) -> Outcome:
        self.asked.append("put")
        self.open.wait()
        return Outcome.FAILED if self.down else super().put(*args)

    def damage(self, key: bytes) -> None:
        data, _ = self._pages[SPACE.digest, key]
        data[0] ^= 1

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return np.zeros(len(batch), np.uint8)


Make = Callable[..., tuple[TieredStore, DictionaryBackend, Server]]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[tuple[TieredStore, Server]] = []

    def one(
        first: int = 1 << 20, behind: int = 64 << 20, **rules: Any
    ) -> tuple[TieredStore, DictionaryBackend, Server]:
        dispatcher = Dispatcher()
        near = DictionaryBackend(DictionaryOptions(capacity=first), dispatcher)  # type: ignore[arg-type]
        far = Server(DictionaryOptions(), dispatcher)
        tiers = [Tier("near", near), Tier("far", far, Health(2, 0.05), Health(2, 0.05), **rules)]
        opened.append((TieredStore(tiers, dispatcher, behind), far))
        return opened[-1][0], near, far

    yield one
    for store, far in opened:
        far.open.set()
        store.close()


def _holds(backend: Backend, keys: list[bytes]) -> list[int]:
    return DictionaryBackend.lookup(backend, key_batch(SPACE, keys)).tolist()  # type: ignore[arg-type]


def _right(store: TieredStore, keys: list[bytes]) -> list[Outcome]:
    """The outcomes of a read; every HIT's bytes are checked."""
    pool = HostPool(SPACE, len(keys))
    pool.poison()
    outcomes = store.read(pool.batch(keys)).result(10)
    for page, outcome in enumerate(outcomes):
        assert outcome != Outcome.HIT or pool.right(page, keys[page])
    return outcomes


def test_every_page_goes_through_and_its_memory_is_free_at_once(make: Make) -> None:
    """The second tier is held up while the engine's pages are overwritten: it still gets the right bytes."""
    store, near, far = make()
    far.open.clear()
    keys, pool = chain("a", 6), HostPool(SPACE, 6)
    assert store.write(pool.write_batch(keys)).result(5) == [Outcome.HIT] * 6
    pool.poison()
    assert _holds(near, keys) == [1] * 6
    far.open.set()
    assert store.settled(5)
    near.clear([SPACE])
    assert store.lookup(key_batch(SPACE, keys)).tolist() == [1] * 6
    assert _right(store, keys) == [Outcome.HIT] * 6


def test_what_waits_when_it_is_cleared_goes_nowhere_and_may_go_again(make: Make) -> None:
    """Behind pages of another namespace, which are on their way and held up, and stay."""
    store, near, far = make()
    far.open.clear()
    other, keys = namespace((4096, 8192)), chain("a", 6)
    for batch in range(32):
        store.write(HostPool(other, 1).write_batch(chain(f"{batch}", 1))).result(5)
    assert store.write(HostPool(SPACE, 6).write_batch(keys)).result(5) == [Outcome.HIT] * 6
    store.clear([SPACE])
    assert store.stats()["far"]["behind_bytes"] == 32 * 12288
    far.open.set()
    assert store.settled(10)
    assert _holds(near, keys) == _holds(far, keys) == [0] * 6
    assert far.stats()["pages"] == 32
    assert store.write(HostPool(SPACE, 6).write_batch(keys)).result(5) == [Outcome.HIT] * 6
    assert store.settled(10)
    assert _holds(far, keys) == [1] * 6
    store.clear([SPACE])
    assert store.write(HostPool(SPACE, 6).write_batch(keys)).result(5) == [Outcome.HIT] * 6
    assert store.settled(10)
    assert _holds(far, keys) == [1] * 6, "what was sent before the clearing counts as sent no more"


def test_a_full_queue_refuses_and_nothing_waits(make: Make) -> None:
    store, near, far = make(behind=1 << 20)
    far.open.clear()
    for batch in range(40):
        keys = chain(f"{batch}", 8)
        assert store.write(HostPool(SPACE, 8).write_batch(keys)).result(5) == [Outcome.HIT] * 8
    stats = store.stats()["far"]
    assert stats["behind_bytes"] <= 1 << 20
    assert stats["behind_full"] == 40 * 8 - stats["behind_pages"]
    assert stats["behind_pages"] == (1 << 20) // PAGE
    far.open.set()
    assert store.settled(5)
    assert store.stats()["far"]["behind_bytes"] == 0
    assert near.stats()["pages"] == (1 << 20) // PAGE


def test_each_page_comes_from_where_it_is(make: Make) -> None:
    store, near, far = make(promotion=Promotion.NEVER)
    keys = chain("a", 9)
    for i, key in enumerate(keys[:8]):
        batch = HostPool(SPACE, 1).write_batch([key])
        (near if i % 2 else far).write(batch).result(5)
    assert store.lookup(key_batch(SPACE, keys)).tolist() == [1, 0] * 4 + [NO_TIER]
    assert _right(store, keys) == [Outcome.HIT] * 8 + [Outcome.MISS]
    assert store.stats()["near"]["read_hit"] == store.stats()["far"]["read_hit"] == 4
    assert _holds(near, keys[::2]) == [0] * 5
    cost = store.seconds(np.array([0, 1, NO_TIER], np.uint8), SPACE)
    assert cost[0] > 0
    assert cost[1] > 0
    assert cost[2] == np.inf


@pytest.mark.parametrize(("promotion", "reads"), [(Promotion.ALWAYS, 1), (Promotion.SECOND_HIT, 2)])
def test_what_is_read_goes_up(make: Make, promotion: Promotion, reads: int) -> None:
    store, near, far = make(promotion=promotion)
    keys = chain("a", 5)
    far.write(HostPool(SPACE, 5).write_batch(keys)).result(5)
    for turn in range(reads):
        assert _holds(near, keys) == [0] * 5, turn
        assert _right(store, keys) == [Outcome.HIT] * 5
        assert store.settled(5)
    assert _holds(near, keys) == [1] * 5
    assert store.stats()["near"]["promoted"] == 5
    far.clear([SPACE])
    assert _right(store, keys) == [Outcome.HIT] * 5


def test_what_is_read_often_goes_down(make: Make) -> None:
    store, _, far = make(writing=Writing.HITS, hits=3)
    keys = chain("a", 4)
    store.write(HostPool(SPACE, 4).write_batch(keys)).result(5)
    for turn in range(3):
        assert _holds(far, keys) == [0] * 4, turn
        assert _right(store, keys) == [Outcome.HIT] * 4
        assert store.settled(5)
    assert _holds(far, keys) == [1] * 4


def test_what_is_about_to_be_evicted_goes_down_first(make: Make) -> None:
    """Written slowly enough for the demotion, nothing that the first tier ever held is lost."""
    store, near, far = make(first=64 * PAGE, writing=Writing.EVICTED)
    keys = chain("a", 200)
    for start in range(0, len(keys), 4):
        chosen = keys[start : start + 4]
        store.write(HostPool(SPACE, 4).write_batch(chosen)).result(5)
        until = time.monotonic() + 5
        while start >= 60 and not all(_holds(far, keys[start - 60 : start - 56])) and time.monotonic() < until:
            time.sleep(0.005)
    assert near.stats()["evicted"] == 136
    assert _holds(far, keys[:136]) == [1] * 136
    assert _holds(far, keys[-32:]) == [0] * 32, "what is not about to go stays"
    assert _right(store, keys) == [Outcome.HIT] * 200


def test_a_damaged_page_is_fetched_from_the_next_tier_and_not_asked_for_again(make: Make) -> None:
    store, near, far = make()
    keys = chain("a", 4)
    store.write(HostPool(SPACE, 4).write_batch(keys)).result(5)
    assert store.settled(5)
    near._pages[SPACE.digest, keys[1]][0][7] ^= 1
    assert _right(store, keys) == [Outcome.HIT] * 4
    assert near.stats()["corrupt"] == 1
    assert store.settled(5)
    assert _holds(near, keys) == [1] * 4, "healed from below"
    far.damage(keys[2])
    near.delete(SPACE, keys[2])
    assert _right(store, keys[:3]) == [Outcome.HIT, Outcome.HIT, Outcome.CORRUPT]
    asked = len(far.asked)
    assert _right(store, [keys[2]]) == [Outcome.MISS]
    assert store.lookup(key_batch(SPACE, [keys[2]])).tolist() == [NO_TIER]
    assert len(far.asked) == asked, "a tier is not asked again for what it lied about"
    store.write(HostPool(SPACE, 1).write_batch([keys[2]])).result(5)
    assert store.settled(5)
    near.delete(SPACE, keys[2])
    assert _right(store, [keys[2]]) == [Outcome.HIT], "written again, asked again"


def test_a_claim_that_is_not_kept_is_a_lie(make: Make) -> None:
    store, _, far = make()
    keys = chain("a", 2)
    far.write(HostPool(SPACE, 2).write_batch(keys)).result(5)
    assert store.lookup(key_batch(SPACE, keys)).tolist() == [1, 1]
    held = far._pages.pop((SPACE.digest, keys[1]))
    assert _right(store, keys) == [Outcome.HIT, Outcome.MISS]
    far._pages[SPACE.digest, keys[1]] = held
    assert store.settled(5)
    assert store.lookup(key_batch(SPACE, keys)).tolist() == [0, NO_TIER]


def test_pages_that_a_server_lost_are_sent_again(make: Make) -> None:
    store, near, far = make()
    keys = chain("a", 3)
    store.write(HostPool(SPACE, 3).write_batch(keys)).result(5)
    assert store.settled(5)
    far.clear([SPACE])
    near.clear([SPACE])
    assert store.lookup(key_batch(SPACE, keys)).tolist() == [NO_TIER] * 3
    store.write(HostPool(SPACE, 3).write_batch(keys)).result(5)
    assert store.settled(5)
    assert _holds(far, keys) == [1] * 3


def test_a_dead_server_costs_local_pages_nothing(make: Make) -> None:
    store, _, far = make()
    far.down = True
    keys = chain("a", 4)
    for turn in range(4):
        store.write(HostPool(SPACE, 4).write_batch(chain(f"{turn}", 4))).result(5)
        assert store.settled(5)
        store.read(HostPool(SPACE, 4).batch(chain(f"{turn}-absent", 4))).result(5)
    store.write(HostPool(SPACE, 4).write_batch(keys)).result(5)
    assert _right(store, keys) == [Outcome.HIT] * 4
    stats = store.stats()["far"]
    assert stats["read_health"] == stats["write_health"] == "open"
    assert stats["behind_unhealthy"] >= 4
    far.down = False
    time.sleep(0.1)
    until = time.monotonic() + 10
    while store.stats()["far"]["write_health"] != "closed" and time.monotonic() < until:
        store.write(HostPool(SPACE, 1).write_batch(chain(f"{time.monotonic()}", 1))).result(5)
        time.sleep(0.02)
    assert store.stats()["far"]["write_health"] == "closed"


def test_a_hung_server_holds_up_nobody_else(make: Make) -> None:
    """Local pages are read and written while the server's answers are outstanding; a deadline ends the wait for it."""
    store, _, far = make()
    away, keys = chain("away", 2), chain("a", 4)
    far.write(HostPool(SPACE, 2).write_batch(away)).result(5)
    far.open.clear()
    stuck = store.read(HostPool(SPACE, 2).batch(away))
    pool = HostPool(SPACE, 2)
    pool.poison()
    before = pool.bytes.copy()
    assert store.read(pool.batch(away), time.monotonic() + 0.1).result(5) == [Outcome.TIMEOUT] * 2
    assert store.write(HostPool(SPACE, 4).write_batch(keys)).result(5) == [Outcome.HIT] * 4
    assert _right(store, keys) == [Outcome.HIT] * 4
    assert not stuck.done
    far.open.set()
    assert stuck.result(5) == [Outcome.HIT] * 2
    assert store.settled(5)
    assert np.array_equal(pool.bytes, before), "no late byte"


def test_a_cancelled_read_ends_and_costs_nobody_else(make: Make) -> None:
    store, _, far = make()
    away = chain("away", 40)
    far.write(HostPool(SPACE, 40).write_batch(away)).result(5)
    far.open.clear()
    pool = HostPool(SPACE, 40)
    pool.poison()
    before = pool.bytes.copy()
    staged = store.read(pool.batch(away), time.monotonic() + 60)
    staged.cancel()
    assert staged.result(5) == [Outcome.TIMEOUT] * 40, "at once: what comes now comes into the store's memory"
    leader = store.read(HostPool(SPACE, 40).batch(away[:20]))
    follower = store.read(HostPool(SPACE, 1).batch(away[:1]))
    alone = store.read(HostPool(SPACE, 20).batch(away[20:]))
    leader.cancel()
    alone.cancel()
    assert not alone.done, "the device may be writing into the engine's pages"
    far.open.set()
    assert follower.result(5) == [Outcome.HIT]
    assert leader.result(5) == [Outcome.HIT] * 20
    assert set(alone.result(5)) <= {Outcome.HIT, Outcome.TIMEOUT}
    assert Outcome.TIMEOUT in alone.result(5)
    assert store.settled(5)
    assert np.array_equal(pool.bytes, before)
    assert store.stats()["far"]["read_health"] == "closed"
    late = Completion(1)
    late.cancel()
    told: list[int] = []
    late.on_cancel(lambda: told.append(1))
    assert told == [1]


def test_a_tier_that_is_down_at_the_start_comes_when_it_can() -> None:
    dispatcher = Dispatcher()
    attempts: list[int] = []
    real = DictionaryBackend(DictionaryOptions(), dispatcher)

    def opening() -> Backend:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionRefusedError("nobody listens")
        return real

    late = LateBackend("far", opening, ConnectionRefusedError("nobody listens"), dispatcher, first=0.01)
    store = TieredStore(
        [Tier("near", DictionaryBackend(DictionaryOptions(), dispatcher)), Tier("far", late)], dispatcher
    )
    keys = chain("a", 3)
    assert store.write(HostPool(SPACE, 3).write_batch(keys)).result(5) == [Outcome.HIT] * 3
    assert _right(store, keys) == [Outcome.HIT] * 3
    until = time.monotonic() + 5
    while len(attempts) < 3 or late.capabilities is not real.capabilities:
        assert time.monotonic() < until
        time.sleep(0.005)
    more = chain("b", 3)
    store.write(HostPool(SPACE, 3).write_batch(more)).result(5)
    assert store.settled(5)
    assert _holds(real, more) == [1] * 3
    store.close()


def test_every_tier_is_told_of_the_device_and_one_that_comes_late_as_well() -> None:
    class Reaching(DictionaryBackend):
        reached: int | None = None

        def reach_device(self, ordinal: int) -> None:
            self.reached = ordinal
            self.capabilities = replace(self.capabilities, memory=("host", "device"))

    class Failing(DictionaryBackend):
        def reach_device(self, ordinal: int) -> None:
            raise RuntimeError("a defect")

    dispatcher = Dispatcher()
    first, near, real = (kind(DictionaryOptions(), dispatcher) for kind in (Failing, Reaching, Reaching))
    may_open = threading.Event()

    def opening() -> Backend:
        assert may_open.wait(30)
        return real

    late = LateBackend("far", opening, ConnectionRefusedError("not yet"), dispatcher, first=0.01)
    tiers = [Tier("first", first), Tier("near", near, promotion=Promotion.NEVER), Tier("far", late)]
    store = TieredStore(tiers, dispatcher)
    assert store.reads_to_device is None
    FaultyStore(store).reach_device(3)
    assert getattr(near, "reached", None) == 3
    assert (store.reads_to_device, store.writes_from_device) == (1, False)
    assert late.capabilities.memory == ("host",)
    may_open.set()
    until = time.monotonic() + 30
    while late.capabilities.memory != ("host", "device"):
        assert time.monotonic() < until
        time.sleep(0.005)
    assert getattr(real, "reached", None) == 3
    real.capabilities = replace(real.capabilities, memory=("host",))
    assert late.capabilities.memory == ("host",), "a device that is out is seen through it"
    store.close()


def test_a_cascade_from_a_configuration(tmp_path: Path) -> None:
    tiers = [
        {"type": "memory", "name": "a", "capacity": "1MiB"},
        {"type": "memory", "name": "b", "write": "hits", "write_hits": 3, "promote": "never"},
    ]
    store = TieredStore.open(Config.load({"tiers": tiers, "background_bytes": "8MiB"}))
    assert store.tiers[1].writing is Writing.HITS
    assert (store.tiers[1].hits, store.tiers[1].promotion) == (3, Promotion.NEVER)
    store.close()
    with pytest.raises(ConfigError, match=r"tiers\[0\].write: the first tier gets every page. Fix: remove it"):
        Config.load({"tiers": [{"type": "memory", "write": "through"}]})
    below = {"type": "memory", "name": "c", "write": "evicted"}
    assert Config.load({"tiers": [tiers[0], below]}).tiers[1].write == "evicted"
    local = {"type": "local", "path": str(tmp_path), "capacity": "8MiB"}
    assert Config.load({"tiers": [local, below]}).tiers[1].write == "evicted"
    with pytest.raises(ConfigError, match=r"tiers\[1\].write = 'evicted': a redis tier does not say"):
        Config.load({"tiers": [{"type": "redis", "url": "redis://127.0.0.1:1"}, below]})
    with pytest.raises(ConfigError, match=r"tiers\[1\].promote"):
        Config.load({"tiers": [tiers[0], {"type": "memory", "promote": "sometimes"}]})


_WHAT = ["write", "read", "lookup", "damage near", "lose far", "down", "up"]
_STEP = st.tuples(st.sampled_from(_WHAT), st.integers(0, 11))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_STEP, max_size=30), promotion=st.sampled_from(Promotion), writing=st.sampled_from(Writing))
def test_whatever_happens_no_byte_is_wrong(
    make: Make, steps: list[tuple[str, int]], promotion: Promotion, writing: Writing
) -> None:
    """And without a fault everything that was written is there, as long as it fits."""
    store, near, far = make(promotion=promotion, writing=writing)
    keys, written, faults = chain("a", 14), set(), False
    for what, at in steps:
        chosen = keys[at : at + 3]
        match what:
            case "write":
                assert store.write(HostPool(SPACE, len(chosen)).write_batch(chosen)).result(5)
                written.update(chosen)
            case "read":
                outcomes = _right(store, chosen)
                if not faults:
                    assert [o == Outcome.HIT for o in outcomes] == [key in written for key in chosen]
            case "lookup":
                found = store.lookup(key_batch(SPACE, chosen))
                if not faults:
                    assert [tier != NO_TIER for tier in found] == [key in written for key in chosen]
            case "damage near":
                faults = True
                if page := near._pages.get((SPACE.digest, keys[at])):
                    page[0][3] ^= 4
            case "lose far":
                store.settled(5)
                far.delete(SPACE, keys[at])
            case _:
                far.down = what == "down"
    far.down = False
    assert store.settled(10)


def test_recent_forgets_the_oldest_and_what_is_too_old() -> None:
    recent = Recent(2)
    assert [recent.add(b"s", key) for key in (b"a", b"b", b"a", b"c", b"b")] == [1, 1, 2, 1, 1]
    assert len(recent) == 2
    brief = Recent(10, 0.01)
    brief.add(SPACE.digest, chain("a", 1)[0])
    assert brief.flags(key_batch(SPACE, chain("a", 2))).tolist() == [True, False]
    time.sleep(0.02)
    assert not brief.flags(key_batch(SPACE, chain("a", 2))).any()
    assert brief.add(SPACE.digest, chain("a", 1)[0]) == 1


def test_cost_learns_latency_and_bandwidth() -> None:
    """Batches of many sizes over a link of 2 ms and 1 GB/s."""
    cost, sizes = Cost(), np.random.default_rng(1).integers(1, 200, 3000) * 100_000
    for size in sizes.tolist():
        cost.learn(size, 2e-3 + size * 1e-9)
    for pages in (1, 10, 200):
        assert cost.seconds(pages, 100_000) == pytest.approx(2e-3 + pages * 1e-4, rel=0.5)
    assert cost.seconds(0, 100) == 0


@pytest.mark.parametrize("compiled", [True, False])
def test_copies_go_from_page_to_page(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and copies._native is None:
        pytest.skip("this build has no native module")
    monkeypatch.setattr(copies, "_native", copies._native if compiled else None)
    counts, sizes = [1, 3, 0, 2], [5, 4096, 70, 1, 8192, 300]
    memory = [np.random.default_rng(seed).integers(0, 256, 6 * 8192, np.uint8) for seed in (1, 2)]
    source, target = (
        PageBatch(
            SPACE, bytes(32 * len(counts)), None, one.ctypes.data + np.arange(6, dtype=np.uint64) * np.uint64(8192),
            np.array(sizes, np.uint64), np.concatenate([[0], np.cumsum(counts)]), one,
        ) for one in memory
    )  # fmt: skip
    before = [[bytes(buffer) for buffer in target.buffers(page)] for page in range(4)]
    assert not copy_pages(source, [0, 1], target, [0, 3])
    assert not copy_pages(source, [0], target, [1])
    assert [[bytes(buffer) for buffer in target.buffers(page)] for page in range(4)] == before
    assert copy_pages(source, [3, 2, 1], target, [3, 2, 1])
    assert copy_pages(source, [], target, [])
    for page in range(4):
        assert [bytes(buffer) for buffer in target.buffers(page)] == (
            before[0] if page == 0 else [bytes(buffer) for buffer in source.buffers(page)]
        )


def test_copies_are_counted_and_memory_is_used_again() -> None:
    budget, pool = CopyBudget(4 * PAGE, most_pages=3), HostPool(SPACE, 4)
    keys = chain("a", 4)
    batch = pool.write_batch(keys)
    assert budget.take(batch) is None, "four pages are more than three"
    first = budget.take(batch.select([0, 1]))
    assert first is not None
    assert budget.take(batch.select([2, 3])) is None
    assert copy_pages(batch, [2, 0], first, [0, 1])
    assert first.buffers(0)[0] == batch.buffers(2)[0]
    assert first.buffers(1)[1] == batch.buffers(0)[1]
    address = first.addresses[0]
    budget.give(first)
    assert (budget.bytes, budget.pages) == (0, 0)
    other = HostPool(namespace((4096,)), 1).batch(keys[:1])
    assert not copy_pages(batch, [0], other, [0]), "pages of another size"
    again = CopyBudget(64 << 20)
    one = again.take(batch)
    assert one is not None
    address = one.addresses[0]
    again.give(one)
    two = again.take(batch)
    assert two is not None
    assert two.addresses[0] == address


def test_memory_that_somebody_was_told_of_is_kept_and_bounded() -> None:
    told: list[tuple[int, int]] = []
    budget = CopyBudget(8 << 20, told=lambda address, size: told.append((address, size)))
    large, small = (HostPool(namespace((size,)), 2) for size in (1 << 20, 4096))
    two = [budget.take(large.batch(chain(name, 2))) for name in "ab"]
    assert [size for _, size in told] == [2 << 20, 2 << 20]
    for batch in two:
        assert batch is not None
        budget.give(batch)
    again = [budget.take(pool.batch(chain(name, 2))) for pool, name in ((small, "c"), (large, "d"), (small, "e"))]
    assert len(told) == 3, "what is there is used first"
    assert all(batch is not None for batch in again)
    tall = HostPool(namespace((1 << 20,)), 4)
    assert budget.take(tall.batch(chain("f", 4))) is None, "6 of 8 MiB are made already"
    assert (budget.bytes, len(told)) == ((2 << 20) + 4 * 4096, 3)


def test_a_completion_that_never_comes_does_not_stop_the_close() -> None:
    class Stuck(DictionaryBackend):
        def write(self, batch: PageBatch) -> Completion:
            return Completion(len(batch), self.dispatcher)

        def close(self) -> None:
            pass

    dispatcher = Dispatcher()
    tiers = [
        Tier("near", DictionaryBackend(DictionaryOptions(), dispatcher)),
        Tier("far", Stuck(DictionaryOptions(), dispatcher)),
    ]
    store = TieredStore(tiers, dispatcher)
    store.write(HostPool(SPACE, 2).write_batch(chain("a", 2))).result(5)
    closer = threading.Thread(target=store.close, daemon=True)
    closer.start()
    closer.join(15)
    assert not closer.is_alive()

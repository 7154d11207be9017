"""Write-through of pages that went past the host: what the first tier took from a device arrives below it as well.

The first tier here takes "device" pages as it takes any; what is tested is where they go from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hicache_ext.store import TieredStore, read_back
from hicache_ext.store.behind import Behind
from hicache_ext.store.copies import CopyBudget
from hicache_ext.store.health import Health
from hicache_ext.store.read_back import ReadBack
from hicache_ext.store.tier import Tier, Writing
from storage_backends.base import Backend, Capabilities, Completion, Dispatcher, Outcome, PageBatch, Residency
from tests.dictionary import DictionaryBackend, DictionaryOptions
from tests.pages import HostPool, chain, key_batch, namespace

SPACE, OTHER = namespace((4096, 4096)), namespace((4096, 8192))
PAGE = 8192
HIT = Outcome.HIT


class Held(DictionaryBackend):
    """May be held up: before it takes pages, and when it has found them."""

    def __init__(self, options: DictionaryOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self.takes, self.gives = threading.Event(), threading.Event()
        self.takes.set()
        self.gives.set()
        self.down = False
        self.order: list[bytes] = []
        self.asked = 0

    def put(self, namespace: Any, key: bytes, *rest: Any) -> Outcome:
        self.takes.wait(30)
        if self.down:
            return Outcome.FAILED
        self.order.append(key)
        return super().put(namespace, key, *rest)

    def get(self, *args: Any) -> Outcome:
        self.asked += 1
        outcome = super().get(*args)
        self.gives.wait(30)
        return outcome


class Near(Held):
    capabilities = Capabilities(persistent=False, shared=False, knows=True, memory=("host", "device"))


Make = Callable[..., tuple[TieredStore, Near, Held]]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[tuple[TieredStore, Near, Held]] = []

    def one(first: int = 64 << 20, behind: int = 64 << 20, **rules: Any) -> tuple[TieredStore, Near, Held]:
        dispatcher = Dispatcher()
        near = Near(DictionaryOptions(capacity=first), dispatcher)  # type: ignore[arg-type]
        far = Held(DictionaryOptions(), dispatcher)
        tiers = [Tier("near", near), Tier("far", far, Health(2, 30.0), Health(2, 30.0), **rules)]
        opened.append((TieredStore(tiers, dispatcher, behind), near, far))
        return opened[-1]

    yield one
    for store, near, far in opened:
        near.gives.set()
        far.takes.set()
        store.close()


def _save(store: TieredStore, keys: list[bytes], space: Any = SPACE, **more: Any) -> list[Outcome]:
    """From what is called a device, whose memory is somebody else's as soon as the save is done."""
    pool = HostPool(space, len(keys))
    batch = replace(pool.write_batch(keys), memory="device", **more)
    outcomes = store.write(batch).result(10)
    pool.poison()
    return outcomes


def _holds(backend: Backend, keys: list[bytes], space: Any = SPACE) -> list[int]:
    return backend.lookup(key_batch(space, keys)).tolist()


def _right(backend: Backend, keys: list[bytes]) -> list[Outcome]:
    pool = HostPool(SPACE, len(keys))
    pool.poison()
    outcomes = backend.read(pool.batch(keys)).result(10)
    assert all(pool.right(page, keys[page]) for page, outcome in enumerate(outcomes) if outcome == HIT)
    return outcomes


def _until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_the_same_bytes_arrive_below_and_parents_come_first(make: Make) -> None:
    store, near, far = make()
    assert store.writes_from_device
    keys = chain("a", 300)  # several parts
    assert _save(store, keys) == [HIT] * 300
    assert _holds(near, keys) == [1] * 300
    assert store.settled(30)
    assert _right(far, keys) == [HIT] * 300
    assert far.order == keys
    stats = store.stats()["far"]
    assert (stats["read_back"], stats["read_back_waiting"], stats["behind_bytes"]) == (300, 0, 0)
    asked = near.asked
    assert _save(store, keys) == [HIT] * 300
    assert store.settled(30)
    assert near.asked == asked, "what is known to be below is not read again"


def test_a_first_tier_of_host_memory_takes_no_pages_of_a_device(make: Make) -> None:
    store, near, _ = make()
    near.capabilities = replace(near.capabilities, memory=("host",))
    assert not store.writes_from_device
    with pytest.raises(ValueError, match="writes_from_device"):
        _save(store, chain("a", 1))


@pytest.mark.parametrize("writing", [Writing.HITS, Writing.EVICTED])
def test_a_tier_that_wants_other_pages_gets_none_of_them(make: Make, writing: Writing) -> None:
    store, near, far = make(writing=writing)
    assert _save(store, chain("a", 4)) == [HIT] * 4
    assert store.settled(30)
    assert (near.asked, _holds(far, chain("a", 4))) == (0, [0] * 4)


def test_what_events_say_of_pages_goes_with_them(make: Make) -> None:
    store, _, far = make()
    told: list[tuple[np.ndarray, np.ndarray, str]] = []
    write = far.write

    def telling(batch: PageBatch) -> Completion:
        assert batch.memory == "host"
        assert batch.notes is not None
        told.append((batch.notes.tokens, batch.notes.hashes, batch.lora))
        return write(batch)

    far.write = telling  # type: ignore[method-assign]
    tokens, hashes = np.arange(8, dtype=np.uint32).reshape(4, 2), np.arange(8, dtype=np.int64).reshape(4, 2)
    heard: list[tuple[int, Residency]] = []
    store.on_residency(lambda tier, change, *_: heard.append((tier, change)))
    assert _save(store, chain("a", 4), tokens=tokens, event_hashes=hashes, lora="one") == [HIT] * 4
    assert store.settled(30)
    assert [(t.tolist(), h.tolist(), lora) for t, h, lora in told] == [(tokens.tolist(), hashes.tolist(), "one")]
    _until(lambda: (1, Residency.STORED) in heard)


def test_pages_that_are_evicted_before_their_turn_are_lost_below(make: Make) -> None:
    """A tier below with room for few copies, that takes none: the save is done all the same."""
    store, _, far = make(first=128 * PAGE, behind=64 * PAGE)
    far.takes.clear()
    keys = chain("a", 400)
    for first in range(0, 400, 40):
        assert _save(store, keys[first : first + 40]) == [HIT] * 40
    assert int(store.stats()["far"]["behind_bytes"]) <= 64 * PAGE
    far.takes.set()
    assert store.settled(30)
    stats = store.stats()["far"]
    assert int(stats["read_back_late"]) > 0
    assert sum(_holds(far, keys)) == stats["read_back"] == 400 - int(stats["read_back_late"])
    assert set(_right(far, keys)) == {HIT, Outcome.MISS}
    assert (stats["read_health"], stats["write_health"], stats.get("behind_full", 0)) == ("closed", "closed", 0)
    assert store.stats()["near"]["read_health"] == "closed"


def test_a_tier_that_is_down_costs_a_count(make: Make) -> None:
    store, _, far = make()
    far.down = True
    for name in ("a", "b", "c", "d"):
        assert _save(store, chain(name, 4)) == [HIT] * 4
        assert store.settled(30)
    assert store.stats()["far"]["behind_unhealthy"] == 8, "after two bad batches"


def test_a_page_that_never_fits_is_refused_and_those_after_it_go(make: Make) -> None:
    store, _, far = make(behind=PAGE)  # OTHER's pages are larger
    assert _save(store, chain("large", 1), OTHER) == [HIT]
    assert store.settled(30)
    assert store.stats()["far"]["behind_full"] == 1
    assert _save(store, chain("a", 1)) == [HIT]
    assert store.settled(30)
    assert _right(far, chain("a", 1)) == [HIT]


def test_names_that_wait_are_limited() -> None:
    dispatcher = Dispatcher()
    near, far = Near(DictionaryOptions(), dispatcher), Held(DictionaryOptions(), dispatcher)
    below = Behind(Tier("far", far), CopyBudget(1 << 20))
    waiting = ReadBack(Tier("near", near), below, most_pages=6)
    near.gives.clear()
    keys = chain("a", 12)
    batch = HostPool(SPACE, 12).write_batch(keys)
    near.write(batch).result(5)
    waiting.put(batch.select([0]), [0])
    _until(lambda: near.asked == 1)  # this one is under way
    waiting.put(batch, list(range(1, 12)))
    assert waiting.stats() == {"read_back_waiting": 6}
    assert below.tier.counts["read_back_full"] == 5
    near.gives.set()
    _until(lambda: waiting.idle() and below.idle())
    assert far.order == keys[:7]
    waiting.close()
    waiting.put(batch, [11])
    assert below.tier.counts["read_back_full"] == 6
    below.close(time.monotonic() + 5)
    dispatcher.close()


def test_what_is_cleared_meanwhile_does_not_come_back(make: Make) -> None:
    """What waits, what is being read, and what waits below; another namespace's pages go on."""
    store, near, far = make()
    far.takes.clear()
    below = chain("below", 6)
    for key in below:  # more than are under way at once
        assert _save(store, [key]) == [HIT]
        _until(lambda: store.stats()["far"]["read_back_waiting"] == 0)
    near.gives.clear()
    read, waits = chain("read", 2), chain("waits", 2)
    asked = near.asked
    assert _save(store, read) == [HIT] * 2
    _until(lambda: near.asked > asked)
    assert _save(store, waits) == [HIT] * 2
    assert _save(store, chain("other", 2), OTHER) == [HIT] * 2
    store.clear([SPACE])
    near.gives.set()
    far.takes.set()
    assert store.settled(30)
    assert _holds(far, read + waits) == [0] * 4
    assert store.stats()["far"].get("read_back_late", 0) == 0, "nobody looks for them any more"
    assert sum(_holds(far, below)) <= 4, "those that were on their way"
    assert _holds(far, chain("other", 2), OTHER) == [1] * 2
    assert _save(store, below + waits) == [HIT] * 8, "and what is stored anew goes down anew"
    assert store.settled(30)
    assert _right(far, below + waits) == [HIT] * 8
    assert store.stats()["far"]["behind_bytes"] == 0


def test_closing_drops_what_waits_and_is_not_held_up(make: Make) -> None:
    store, near, far = make()
    near.gives.clear()
    assert _save(store, chain("a", 2)) == [HIT] * 2
    _until(lambda: near.asked > 0)
    assert _save(store, chain("b", 3)) == [HIT] * 3
    threading.Timer(0.2, near.gives.set).start()
    since = time.monotonic()
    store.close()
    assert time.monotonic() - since < 20
    assert store.tiers[1].counts["behind_dropped"] == 5
    assert not far.order
    _until(lambda: not any(thread.name.startswith("hicache-read-back") for thread in threading.enumerate()))


def test_a_defect_of_the_first_tier_costs_its_pages_only(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    store, near, far = make()
    read = near.read

    def broken(batch: PageBatch) -> Completion:
        near.read = read  # type: ignore[method-assign]
        raise RuntimeError("a defect")

    near.read = broken  # type: ignore[method-assign]
    assert _save(store, chain("a", 2)) == [HIT] * 2
    assert store.settled(30)
    assert _save(store, chain("b", 2)) == [HIT] * 2
    assert store.settled(30)
    assert (_holds(far, chain("a", 2)), _holds(far, chain("b", 2))) == ([0, 0], [1, 1])
    assert store.stats()["far"]["read_back_late"] == 2
    assert store.stats()["far"]["behind_bytes"] == 0
    assert "could not be read back" in caplog.text


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["device", "host", "clear", "hold", "let go", "lose", "remove"]), st.integers(0, 11),
        st.integers(1, 4),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS)
def test_whatever_happens_what_is_below_is_right(
    make: Make, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int, int]]
) -> None:
    """And where nothing was lost above or cleared everything is below in the end."""
    monkeypatch.setattr(read_back, "_PART_PAGES", 2)
    store, near, far = make()
    keys, saved, lost = chain("a", 16), set(), False
    for what, at, count in steps:
        chosen = keys[at : at + count]
        match what:
            case "device":
                assert _save(store, chosen) == [HIT] * len(chosen)
                saved |= set(chosen)
            case "host":
                assert store.write(HostPool(SPACE, len(chosen)).write_batch(chosen)).result(10) == [HIT] * len(chosen)
                saved |= set(chosen)
            case "clear":
                store.clear([SPACE])
                lost = True
            case "hold":
                far.takes.clear()
            case "let go":
                far.takes.set()
            case "lose":
                near.remove(key_batch(SPACE, chosen))
                lost = True
            case "remove":
                store.remove(key_batch(SPACE, chosen))
                lost = True
    far.takes.set()
    assert store.settled(30)
    below = _right(far, keys)
    assert {key for key, outcome in zip(keys, below, strict=True) if outcome == HIT} <= saved
    if not lost:
        assert {key for key, outcome in zip(keys, below, strict=True) if outcome == HIT} == saved
    stats = store.stats()["far"]
    assert (stats["behind_bytes"], stats["behind_pages"], stats["read_back_waiting"]) == (0, 0, 0)

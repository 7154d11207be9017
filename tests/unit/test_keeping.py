"""What a tier keeps and for how long: pinned namespaces and times to live, over real tiers and both indexes."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_backends.base import Outcome
from storage_backends.local import LocalBackend
from storage_backends.local import tier as tier_module
from storage_backends.local.index_choice import VARIABLE
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, local_tiers

MIB = 1 << 20
LENGTHS = (131072, 131072)
PINNED, LOOSE = namespace(LENGTHS, salt="keep"), namespace(LENGTHS, salt="other")
PIN = [{"match": {"salt": "keep"}, "pin": True}]
HOUR = 3600 * 10**9


@pytest.fixture(params=["python", "native"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def tier(index: str, tmp_path: Path) -> Iterator[Open]:
    with local_tiers(tmp_path / "tier", "threads") as open_one:
        yield open_one


def store(backend: LocalBackend, space: Any, keys: list[bytes], parent: bytes | None = None) -> list[Outcome]:
    return backend.write(HostPool(space, len(keys)).write_batch(keys, parent)).result(30)


def found(backend: LocalBackend, space: Any, keys: list[bytes]) -> int:
    return int(backend.lookup(key_batch(space, keys)).sum())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


# --- pin


def fill(backend: LocalBackend) -> tuple[int, int]:
    """Pages of the salt "keep" before and after others have written twice the capacity."""
    for turn in range(4):
        store(backend, PINNED, chain(f"keep{turn}", 8))
    before = sum(found(backend, PINNED, chain(f"keep{turn}", 8)) for turn in range(4))
    for turn in range(12):
        for space in (LOOSE, namespace(LENGTHS, salt="third"), namespace((65536,), salt="fourth")):
            store(backend, space, chain(f"other{turn}", 16))
    return before, sum(found(backend, PINNED, chain(f"keep{turn}", 8)) for turn in range(4))


def test_pinned_pages_outlive_any_pressure_and_others_go_on(tier: Open) -> None:
    backend = tier(capacity=24 * MIB, namespaces=PIN)
    assert fill(backend) == (32, 32)
    assert found(backend, LOOSE, chain("other11", 16)) > 0


def test_without_the_pin_they_go(tier: Open) -> None:
    before, after = fill(tier(capacity=24 * MIB))
    assert before == 32
    assert after < 32, "if these stay, the test above shows nothing"


def test_a_full_pinned_namespace_refuses_and_says_why(tier: Open) -> None:
    backend = tier(capacity=16 * MIB, namespaces=PIN)
    outcomes = [outcome for turn in range(12) for outcome in store(backend, PINNED, chain(f"keep{turn}", 8))]
    kept = outcomes.count(Outcome.HIT)
    assert set(outcomes) == {Outcome.HIT, Outcome.REJECTED}
    assert sum(found(backend, PINNED, chain(f"keep{turn}", 8)) for turn in range(12)) == kept
    stats = backend.stats()
    assert stats["rejected_pinned_full"]
    assert "evicted" not in stats
    assert set(store(backend, LOOSE, chain("other", 4))) == {Outcome.REJECTED}, "pins may take all of it"
    assert backend.stats()["rejected_no_room"]


def test_a_pin_holds_over_a_restart_with_less_room_and_in_folders_that_nobody_writes(tier: Open) -> None:
    first = tier(capacity=32 * MIB, namespaces=PIN)
    for turn in range(4):
        store(first, PINNED, chain(f"keep{turn}", 8))
    store(first, LOOSE, chain("other", 40))
    first.close()
    again = tier(capacity=24 * MIB, namespaces=PIN)
    third = namespace(LENGTHS, salt="third")
    for turn in range(12):
        store(again, third, chain(f"third{turn}", 16))
    assert sum(found(again, PINNED, chain(f"keep{turn}", 8)) for turn in range(4)) == 32


def test_a_pinned_page_can_be_removed_and_cleared(tier: Open) -> None:
    backend = tier(namespaces=PIN)
    keys = chain("keep", 8)
    store(backend, PINNED, keys)
    assert backend.remove(key_batch(PINNED, keys[6:])) == 2
    assert found(backend, PINNED, keys) == 6
    backend.clear([PINNED])
    assert found(backend, PINNED, keys) == 0


STEPS = st.lists(st.tuples(st.sampled_from(["keep", "other", "small", "remove"]), st.integers(1, 24)), max_size=25)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_whatever_is_written_no_pinned_page_goes(index: str, tmp_path: Path, steps: list[tuple[str, int]]) -> None:
    """The model of a pin: a set that only grows by HITs and shrinks by removals."""
    place = tmp_path / "tier"
    spaces = {"keep": PINNED, "other": LOOSE, "small": namespace((65536,), salt="small")}
    kept: set[bytes] = set()
    with local_tiers(place, "threads") as open_one:
        backend = open_one(capacity=16 * MIB, namespaces=PIN)
        for turn, (what, count) in enumerate(steps):
            if what == "remove":
                gone = sorted(kept)[:count]
                backend.remove(key_batch(PINNED, gone))
                kept -= set(gone)
            else:
                keys = chain(str(turn), count)
                outcomes = store(backend, spaces[what], keys)
                assert set(outcomes) <= {Outcome.HIT, Outcome.REJECTED}
                if what == "keep":
                    kept |= {key for key, outcome in zip(keys, outcomes, strict=True) if outcome == Outcome.HIT}
            assert found(backend, PINNED, sorted(kept)) == len(kept)
            assert sum(file.stat().st_size for file in place.glob("w*/e*")) <= 16 * MIB
    shutil.rmtree(place)


def test_every_count_is_explained(tier: Open) -> None:
    """Of what a tier counts under pressure, with rules; tier.py is where people look."""
    backend = tier(capacity=16 * MIB, namespaces=PIN, admission="second_hit", ttl="24h")
    fill(backend)
    backend.remove(key_batch(PINNED, chain("keep0", 2)))
    backend.clear([PINNED])
    served(backend, LOOSE, chain("other11", 4))
    explained = set(str(tier_module.__doc__).replace(",", " ").split())
    assert {"stored", "removed", "cleared", "rejected_second_hit"} <= set(backend._tier.counts)
    assert set(backend._tier.counts) <= explained


# --- time to live


def test_pages_past_their_time_are_missed_at_once_and_gone_soon(tier: Open) -> None:
    backend = tier(ttl="24h", namespaces=[{"match": {"salt": "keep"}, "ttl": "never"}])
    keys = chain("a", 8)
    for space in (PINNED, LOOSE):
        store(backend, space, keys)
    set_clock(backend, 23 * HOUR)
    until(lambda: swept(backend))
    assert found(backend, LOOSE, keys) == 8
    set_clock(backend, 25 * HOUR)
    with backend._lock:
        backend._tier.expiry.advance()  # the first half of a round, and nothing swept yet
        assert len(backend._index) == 16
        assert found(backend, LOOSE, keys) == 0
        assert served(backend, LOOSE, keys) == [Outcome.MISS] * 8
    until(lambda: backend.stats().get("expired") == 8)
    assert backend.stats()["pages"] == 8
    assert found(backend, PINNED, keys) == 8, "a rule may say never"
    assert store(backend, LOOSE, keys) == [Outcome.HIT] * 8


def test_an_expired_page_is_stored_again_as_new(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tier(ttl="24h")
    keys = chain("a", 4)
    with stored_before(monkeypatch, 25 * HOUR):
        store(backend, LOOSE, keys)
    assert found(backend, LOOSE, keys) == 0
    assert store(backend, LOOSE, keys) == [Outcome.HIT] * 4
    assert found(backend, LOOSE, keys) == 4


def test_a_clock_that_goes_back_leaves_pages_fresh(tier: Open) -> None:
    backend = tier(ttl="1h")
    store(backend, LOOSE, chain("a", 8))
    set_clock(backend, -48 * HOUR)
    until(lambda: swept(backend))
    assert found(backend, LOOSE, chain("a", 8)) == 8


def test_after_a_restart_age_counts_from_when_a_page_was_stored(tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tier()
    with stored_before(monkeypatch, 25 * HOUR):
        store(first, LOOSE, chain("a", 8))
    store(first, LOOSE, chain("b", 8))
    assert found(first, LOOSE, chain("a", 8)) == 8
    first.close()
    again = tier(ttl="24h")
    assert (found(again, LOOSE, chain("a", 8)), found(again, LOOSE, chain("b", 8))) == (0, 8)


def test_another_process_s_pages_age_too(tier: Open) -> None:
    one, two = tier(ttl="24h"), tier(ttl="24h")
    store(one, LOOSE, chain("a", 8))
    assert found(two, LOOSE, chain("a", 8)) == 8
    set_clock(two, 25 * HOUR)
    until(lambda: found(two, LOOSE, chain("a", 8)) == 0)
    assert found(one, LOOSE, chain("a", 8)) == 8
    set_clock(one, 25 * HOUR)
    until(lambda: one.stats().get("expired") == 8)


def served(backend: LocalBackend, space: Any, keys: list[bytes]) -> list[Outcome]:
    return backend.read(HostPool(space, len(keys)).batch(keys)).result(30)


@contextlib.contextmanager
def stored_before(monkeypatch: pytest.MonkeyPatch, ago: int) -> Iterator[None]:
    """What is stored inside was stored that long ago (ns)."""
    now = time.time_ns
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now() - ago)
        yield


def set_clock(backend: LocalBackend, ahead: int) -> None:
    backend._tier.expiry.clock = lambda: time.time_ns() + ahead


def swept(backend: LocalBackend) -> bool:
    """Two rounds of maintenance have gone by since the call before."""
    rounds = []
    expiry = backend._tier.expiry
    kept = expiry.sweep

    def counted(forget: Any) -> None:
        kept(forget)
        rounds.append(1)

    expiry.sweep = counted  # type: ignore[method-assign]
    until(lambda: len(rounds) > 1)
    del expiry.sweep  # type: ignore[method-assign]
    return True

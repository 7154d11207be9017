"""Room for batches in a full tier: who gets it, who is refused and why, and what never goes for it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_backends.base import Outcome
from storage_backends.local import LocalBackend
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import Open, local_tiers

MIB = 1 << 20
SPACE = namespace((65536,))
SLOTS = 240  # a little more than 16 MiB hold


@pytest.fixture(params=["python", "native"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    if request.param == "native":
        pytest.importorskip("storage_backends.local.index_native", exc_type=ImportError)
    monkeypatch.setenv("HICACHE_EXT_INDEX", request.param)
    with local_tiers(tmp_path / "tier", "threads") as open_one:
        yield open_one


def store(backend: LocalBackend, keys: list[bytes], parent: bytes | None = None) -> list[Outcome]:
    return backend.write(HostPool(SPACE, len(keys)).write_batch(keys, parent)).result(30)


def found(backend: LocalBackend, keys: list[bytes]) -> list[int]:
    return backend.lookup_local(key_batch(SPACE, keys)).tolist()


def fill(backend: LocalBackend) -> None:
    for turn in range(SLOTS // 10):
        assert store(backend, chain(f"old {turn}", 10)) == [Outcome.HIT] * 10


def test_batches_of_one_chain_in_flight_together_all_come_in(
    tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page whose parent is still being written is of use: the parent is here to stay."""
    plan = tmp_path / "faults.json"
    monkeypatch.setenv("HICACHE_EXT_FAULTS", str(plan))
    backend = tier(capacity=16 * MIB)
    fill(backend)
    plan.write_text(json.dumps({"write": [{"fault": "delay", "seconds": 1}]}))
    os.utime(plan)
    keys = chain("new", 40)
    pools = [HostPool(SPACE, 10) for _ in range(4)]
    flights = [
        backend.write(pool.write_batch(keys[at : at + 10], keys[at - 1] if at else None))
        for pool, at in zip(pools, range(0, 40, 10), strict=True)
    ]
    assert not any(flight.done for flight in flights), "the parents are not in the index yet"
    assert [flight.result(30) for flight in flights] == [[Outcome.HIT] * 10] * 4
    assert found(backend, keys) == [1] * 40


def test_a_page_below_nothing_is_refused_and_costs_nothing(tier: Open) -> None:
    backend = tier(capacity=16 * MIB)
    fill(backend)
    before = int(backend.stats().get("evicted", 0))
    orphans = chain("orphan", 5)
    assert store(backend, orphans, chain("not here", 1)[0]) == [Outcome.REJECTED] * 5
    stats = backend.stats()
    assert (stats["rejected_no_room"], stats["rejected_unreachable"]) == (1, 4)
    assert int(stats.get("evicted", 0)) == before


def test_a_batch_of_several_chains_keeps_the_ancestors_of_each(tier: Open) -> None:
    backend = tier(capacity=16 * MIB)
    fill(backend)
    heads = [chain(f"chain {n}", 20) for n in range(4)]
    for keys in heads:
        assert store(backend, keys[:10]) == [Outcome.HIT] * 10
    fresh = [key for keys in heads for key in keys[10:]]
    batch = HostPool(SPACE, len(fresh)).write_batch(fresh)
    parents = b"".join(keys[9] + b"".join(keys[10:19]) for keys in heads)
    object.__setattr__(batch, "parents", parents)
    assert backend.write(batch).result(30) == [Outcome.HIT] * 40
    assert all(found(backend, keys) == [1] * 20 for keys in heads)


def test_books_balance_whatever_is_written(tier: Open) -> None:
    """Random chains in batches of random sizes: every refusal is counted, pages and room add up."""
    chance = random.Random(7)
    backend = tier(capacity=16 * MIB)
    chains = {n: chain(f"c{n}", 400) for n in range(6)}
    outcomes: list[Outcome] = []
    for _ in range(120):
        keys = chains[chance.randrange(6)]
        at, count = chance.randrange(0, 40) * 5, chance.choice([1, 5, 20, 60])
        outcomes += store(backend, keys[at : at + count], keys[at - 1] if at else None)
    stats = backend.stats()
    refused = sum(int(stats.get(f"rejected_{why}", 0)) for why in ("no_room", "unreachable"))
    assert refused == outcomes.count(Outcome.REJECTED) > 0
    assert stats["pages"] == int(stats["stored"]) - int(stats["evicted"])
    assert int(stats["own_bytes"]) <= 16 * MIB
    for keys in chains.values():
        held = [key for key, there in zip(keys, found(backend, keys), strict=True) if there]
        pool = HostPool(SPACE, len(held))
        assert backend.read(pool.batch(held)).result(30) == [Outcome.HIT] * len(held)
        assert all(pool.right(page, key) for page, key in enumerate(held))

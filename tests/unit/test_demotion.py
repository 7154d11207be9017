"""What a local tier is about to evict goes to the server below it first, and is served from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hicache_ext.config import Config
from hicache_ext.page import split_keys
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Outcome
from tests import pages
from tests.pages import HostPool, chain, key_batch, namespace
from tests.redis_server import RedisServer

MIB = 1 << 20
SPACE = namespace((16384, 16384))
OTHER = namespace((16384, 16384), model="another")
CHAINS, LENGTH = 40, 12

Open = Callable[[str], TieredStore]


@pytest.fixture(params=["native", "python"])
def cascade(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Open]:
    """A local tier with room for about half of the pages, and Redis below it."""
    if request.param == "native":
        pytest.importorskip("storage_backends.local.index_native")
    monkeypatch.setenv("HICACHE_EXT_INDEX", request.param)
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer())

        def open_one(write: str) -> TieredStore:
            local = {"type": "local", "path": str(tmp_path / "tier"), "capacity": "9MiB", "eviction": "lru"}
            redis = {"type": "redis", "url": f"redis://127.0.0.1:{server.port}/0", "write": write, "promote": "never"}
            store = TieredStore.open(Config.load({"tiers": [local, redis]}))
            stack.callback(store.close)
            return store

        yield open_one


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def written(store: TieredStore, wait: bool) -> None:
    """Chains, from two namespaces in turns. wait: until what goes next has arrived below."""
    near, far = (tier.backend for tier in store.tiers)
    spaces = {space.digest: space for space in (SPACE, OTHER)}

    def below() -> bool:
        going = [(spaces[digest], split_keys(keys)) for digest, keys in near.going(2 * LENGTH)]
        return all(far.lookup(key_batch(space, keys)).all() for space, keys in going)

    for turn in range(CHAINS):
        space = (SPACE, OTHER)[turn % 2]
        store.write(HostPool(space, LENGTH).write_batch(chain(f"c{turn}", LENGTH))).result(20)
        if wait:
            until(below)


def hits(store: TieredStore) -> int:
    found = 0
    for turn in range(CHAINS):
        found += pages.served(store, (SPACE, OTHER)[turn % 2], chain(f"c{turn}", LENGTH)).count(Outcome.HIT)
    return found


def test_nothing_that_is_evicted_is_lost(cascade: Open) -> None:
    store = cascade("evicted")
    written(store, wait=True)
    stats = store.stats()
    assert stats["local"]["evicted"]
    assert hits(store) == CHAINS * LENGTH - int(stats["local"].get("reclaimed", 0))
    assert 0 < stats["redis"]["demoted"] < CHAINS * LENGTH, "what stays above is not sent"


def test_it_would_be_lost_otherwise(cascade: Open) -> None:
    """The negative control."""
    store = cascade("hits")
    written(store, wait=False)
    assert hits(store) < 0.7 * CHAINS * LENGTH


def test_a_tier_with_room_sends_nothing(cascade: Open) -> None:
    store = cascade("evicted")
    keys = chain("a", 60)
    store.write(HostPool(SPACE, 60).write_batch(keys)).result(20)
    near, far = (tier.backend for tier in store.tiers)
    assert near.going(1000) == []
    time.sleep(0.6)
    assert not far.lookup(key_batch(SPACE, keys)).any()

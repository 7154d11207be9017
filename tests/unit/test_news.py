"""Residency that no write of this process reported: of earlier runs, of other writers, and what they evict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage_backends.base import Dispatcher, Notes, Outcome, Residency
from storage_backends.local import LocalBackend
from tests.pages import HostPool, chain, key_batch, namespace
from tests.tiers import local_tiers

Open = Callable[..., LocalBackend]
SPACE = namespace()
PAGES = 300


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Open]:
    with local_tiers(tmp_path, "threads") as opened:
        yield opened


class Heard:
    """What a backend reported: pages that are there, and what is known of them."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend
        self.there: set[bytes] = set()
        self.known: dict[bytes, tuple[list[int], list[int], str, str]] = {}
        backend.on_residency(self)

    def __call__(self, change: Residency, digest: bytes, packed: bytes, notes: Notes | None) -> None:
        assert digest == SPACE.digest
        keys = [packed[i : i + 32] for i in range(0, len(packed), 32)]
        (self.there.update if change == Residency.STORED else self.there.difference_update)(keys)
        if notes is not None:
            for at, key in enumerate(keys):
                self.known[key] = (notes.tokens[at].tolist(), notes.hashes[at].tolist(), notes.salt, notes.lora)

    def drain(self) -> None:
        import threading

        drained = threading.Event()
        self.backend.dispatcher.post(drained.set)
        assert drained.wait(10)

    def told(self) -> None:
        """Everything that can be told is told."""
        while self.backend.tell(SPACE.digest):
            pass
        self.drain()


def write(
    backend: LocalBackend, keys: list[bytes], salt: str = ""
) -> dict[bytes, tuple[list[int], list[int], str, str]]:
    """Store these pages with tokens and event hashes; what should be known of them."""
    pool = HostPool(SPACE, len(keys))
    tokens = np.arange(len(keys) * 16, dtype=np.uint32).reshape(-1, 16) + keys[0][0]
    numbers = np.frombuffer(b"".join(keys), ">i8")[::4].astype(np.int64)
    hashes = np.stack([numbers, np.concatenate([[0], numbers[:-1]])], 1)
    batch = replace(pool.write_batch(keys), tokens=tokens, event_hashes=hashes, salt=salt, lora="adapter")
    assert set(backend.write(batch).result(30)) == {Outcome.HIT}
    return {key: (tokens[i].tolist(), hashes[i].tolist(), salt, "adapter") for i, key in enumerate(keys)}


def test_what_an_earlier_run_stored_is_told_from_its_headers(tier: Open) -> None:
    keys = chain("a", PAGES)
    first = tier()
    heard = Heard(first)
    expected = write(first, keys[:200]) | write(first, keys[200:], salt="tenant")
    heard.drain()
    assert heard.known == expected, "a write reports what it was given"
    first.close()
    second = Heard(tier())
    assert not second.there
    second.told()
    assert second.there == set(keys)
    assert second.known == expected


def test_a_slice_is_small_and_evictions_meanwhile_are_right(tier: Open) -> None:
    keys = chain("a", PAGES)
    first = tier()
    write(first, keys)
    first.close()
    backend = tier()
    heard = Heard(backend)
    assert backend.tell(SPACE.digest)
    heard.drain()
    assert 0 < len(heard.there) < PAGES
    backend.remove(key_batch(SPACE, keys[::2]))
    heard.told()
    assert heard.there == set(keys[1::2])


def test_other_writers_pages_come_and_go(tier: Open) -> None:
    ours, theirs = tier(), tier()
    heard = Heard(ours)
    heard.told()
    mine, other = chain("a", 20), chain("b", 20)
    write(ours, mine)
    expected = write(theirs, other)
    ours.lookup(key_batch(SPACE, other))  # reads the other's log, as upkeep does now and then
    heard.told()
    assert heard.there == {*mine, *other}
    assert {key: heard.known[key] for key in other} == expected
    theirs.remove(key_batch(SPACE, other[:5]))
    ours.lookup(key_batch(SPACE, other))
    heard.told()
    assert heard.there == {*mine, *other[5:]}
    theirs.clear([SPACE])  # its extents are gone: no record names the pages
    ours.lookup(key_batch(SPACE, other))
    ours.recheck(SPACE.digest, b"".join([*mine, *other]))
    heard.drain()
    assert heard.there == set(mine)


def test_headers_without_event_hashes_are_pages_of_which_nothing_is_known(tier: Open) -> None:
    backend = tier()
    keys = chain("a", 3)
    assert set(backend.write(HostPool(SPACE, 3).write_batch(keys)).result(30)) == {Outcome.HIT}
    expected = write(backend, chain("b", 1), salt="x" * 400)  # too long for a header: kept whole or not at all
    assert expected
    heard = Heard(backend)
    heard.told()
    assert heard.there == {*keys, *chain("b", 1)}
    assert not heard.known


def test_a_dispatcher_keeps_the_order_of_one_page(tier: Open) -> None:
    """Stored and evicted again and again by a tier that holds a few pages: the last word is what is so."""
    backend = tier(capacity=16 << 20)
    heard = Heard(backend)
    assert isinstance(backend.dispatcher, Dispatcher)
    for turn in range(12):
        keys = chain(f"turn-{turn}", 120)
        pool = HostPool(SPACE, len(keys))
        backend.write(pool.write_batch(keys)).wait(30)
    heard.drain()
    everything = [key for turn in range(12) for key in chain(f"turn-{turn}", 120)]
    found = backend.lookup(key_batch(SPACE, everything))
    assert heard.there == {key for key, there in zip(everything, found, strict=True) if there}
    assert len(heard.there) < len(everything), "nothing was evicted"

"""How writers part a directory's capacity: the rules as cases and properties, and the file that tells of a writer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_backends.local.shares import MIN_EXTENT, Use, shares
from storage_backends.local.use import HALF_LIFE, NAME, Recent, Told, read_use, write_use

MIB = 1 << 20
GIB = 1 << 30
IDLE, BUSY, SILENT = Use(0, 0, 0, False), Use(0, 8 * GIB, GIB, True), Use(0)


def settled(capacity: int, uses: dict[int, Use], rounds: int = 200) -> dict[int, int]:
    """What the writers hold in the end, when those who want more fill their parts and nothing else changes."""
    for _ in range(rounds):
        parts = shares(capacity, uses)
        shrunk = {w: replace(use, held=min(use.held, parts[w])) for w, use in uses.items()}
        free = capacity - sum(use.held for use in shrunk.values())
        for writer, use in shrunk.items():
            if use.wants_more:
                more = max(0, min(free, parts[writer] - use.held))
                free -= more
                shrunk[writer] = replace(use, held=use.held + more)
        if shrunk == uses:
            return {w: use.held for w, use in uses.items()}
        uses = shrunk
    raise AssertionError("does not settle")


CASES = [
    ("alone: all of it", GIB, {0: IDLE}, {0: (1.0, 1.0)}),
    ("nobody has said anything: equal parts", GIB, {0: SILENT, 1: SILENT}, {0: (0.49, 0.51), 1: (0.49, 0.51)}),
    ("an idle writer without pages: only its floor", GIB, {0: IDLE, 1: BUSY}, {0: (0.04, 0.06), 1: (0.94, 0.96)}),
    ("equal use: equal parts", GIB, {0: BUSY, 1: BUSY, 2: BUSY}, {0: (0.33, 0.34), 1: (0.33, 0.34), 2: (0.33, 0.34)}),
    ("nothing is taken at once", GIB, {0: replace(IDLE, held=GIB), 1: BUSY}, {0: (0.95, 0.97), 1: (0.03, 0.05)}),
    ("nobody wants it: nobody gives", GIB, {0: replace(IDLE, held=GIB * 8 // 10), 1: IDLE}, {0: (0.8, 0.9)}),
    ("one content with little leaves the rest", GIB, {0: replace(BUSY, held=GIB // 8, wants_more=False), 1: BUSY},
     {0: (0.12, 0.13), 1: (0.87, 0.88)}),
    ("silent counts as average", GIB, {0: SILENT, 1: BUSY}, {0: (0.49, 0.51)}),
    ("a lowered capacity comes at once", GIB, {0: replace(BUSY, held=2 * GIB), 1: replace(BUSY, held=GIB)},
     {0: (0.49, 0.51), 1: (0.49, 0.51)}),
    ("an idle one is not robbed where the other has enough", GIB,
     {0: replace(IDLE, held=GIB * 8 // 10), 1: replace(BUSY, held=GIB // 5, wants_more=False)}, {0: (0.79, 0.81)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "capacity", "uses", "expected"), CASES, ids=[case[0] for case in CASES])
def test_cases(name: str, capacity: int, uses: dict[int, Use], expected: dict[int, tuple[float, float]]) -> None:
    parts = shares(capacity, uses)
    for writer, (low, high) in expected.items():
        assert low * capacity <= parts[writer] <= high * capacity, (name, {w: p / capacity for w, p in parts.items()})


def test_room_moves_to_who_uses_it_and_back() -> None:
    first = settled(GIB, {0: replace(IDLE, held=GIB), 1: BUSY})
    assert first[1] > 0.85 * GIB
    back = settled(GIB, {0: replace(BUSY, held=first[0]), 1: replace(IDLE, held=first[1])})
    assert back[0] > 0.85 * GIB


def test_hits_weigh_more_than_stores() -> None:
    reader, streamer = Use(0, hit=GIB, stored=0), Use(0, hit=0, stored=GIB)
    parts = settled(GIB, {0: reader, 1: streamer})
    assert parts[0] > 2 * parts[1]


def test_what_is_pinned_stays() -> None:
    held = settled(GIB, {0: replace(IDLE, held=GIB, pinned=GIB // 2), 1: BUSY})
    assert held[0] >= GIB // 2
    assert held[1] > 0.4 * GIB
    assert shares(GIB, {0: replace(IDLE, held=2 * GIB, pinned=2 * GIB), 1: BUSY}) == {0: 2 * GIB, 1: 0}


USES = st.builds(
    Use,
    held=st.integers(0, 1 << 42),
    hit=st.none() | st.integers(0, 1 << 50),
    stored=st.integers(0, 1 << 50),
    wants_more=st.booleans(),
)
WRITERS = st.dictionaries(st.integers(0, 50), USES, min_size=1, max_size=9)
CAPACITIES = st.integers(1 << 20, 1 << 43)


@given(CAPACITIES, WRITERS)
def test_never_more_than_there_is_and_never_below_the_floor(capacity: int, uses: dict[int, Use]) -> None:
    parts = shares(capacity, uses)
    equal = capacity // len(uses)
    assert parts.keys() == uses.keys()
    assert sum(parts.values()) <= capacity
    assert min(parts.values()) >= min(equal, max(MIN_EXTENT, equal // 10))


@given(CAPACITIES, WRITERS)
def test_every_process_computes_the_same(capacity: int, uses: dict[int, Use]) -> None:
    assert shares(capacity, uses) == shares(capacity, dict(reversed(uses.items())))


@given(CAPACITIES, WRITERS)
def test_without_need_nobody_gives(capacity: int, uses: dict[int, Use]) -> None:
    uses = {w: replace(use, wants_more=False) for w, use in uses.items()}
    total = sum(use.held for use in uses.values())
    equal = capacity // len(uses)
    floor = min(equal, max(MIN_EXTENT, equal // 10))
    if total + floor * len(uses) <= capacity:
        parts = shares(capacity, uses)
        assert all(parts[w] >= use.held for w, use in uses.items())


@given(CAPACITIES, WRITERS)
def test_what_is_given_is_given_in_steps(capacity: int, uses: dict[int, Use]) -> None:
    equal = capacity // len(uses)
    floor = min(equal, max(MIN_EXTENT, equal // 10))
    if sum(max(use.held, floor) for use in uses.values()) <= capacity:
        parts = shares(capacity, uses)
        step = max(MIN_EXTENT, capacity // 32)
        assert all(parts[w] >= use.held - step for w, use in uses.items())


@given(st.integers(64 << 20, 1 << 43), WRITERS)
def test_it_settles(capacity: int, uses: dict[int, Use]) -> None:
    held = settled(capacity, uses)
    assert sum(held.values()) <= capacity


@given(CAPACITIES, WRITERS, st.data())
def test_a_writer_that_comes_to_use_more_never_gets_less(
    capacity: int, uses: dict[int, Use], data: st.DataObject
) -> None:
    writer = data.draw(st.sampled_from(sorted(uses)))
    if uses[writer].hit is None or any(use.hit is None for use in uses.values()):
        return
    busier = {**uses, writer: replace(uses[writer], hit=uses[writer].hit * 2 + (1 << 40))}
    slop = len(uses) * 2
    assert shares(capacity, busier)[writer] >= shares(capacity, uses)[writer] - slop


@given(st.builds(Told, *[st.integers(0, (1 << 63) - 1)] * 5, st.booleans()))
def test_the_file_says_what_was_written(told: Told) -> None:
    assert Told.decode(told.encode()) == told


@given(st.integers(0, 63), st.integers(0, 7))
def test_a_flipped_bit_makes_it_say_nothing(at: int, bit: int) -> None:
    raw = bytearray(Told(1, 2, 3, 4, 5, True).encode())
    raw[at] ^= 1 << bit
    assert Told.decode(bytes(raw)) is None


def test_files_that_are_not_there_torn_or_strange_say_nothing(tmp_path: Path) -> None:
    told = Told(5, 6, 7, 8, 9, False)
    assert read_use(tmp_path) is None
    write_use(tmp_path, told)
    assert read_use(tmp_path) == told
    for strange in (b"", told.encode()[:40], told.encode() + b"x", os.urandom(64), bytes(64)):
        (tmp_path / NAME).write_bytes(strange)
        assert read_use(tmp_path) is None
        write_use(tmp_path, told)
        assert read_use(tmp_path) == told, "the next write heals it"
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    assert read_use(tmp_path) is None, "and a pipe is not waited for"


def test_bytes_fade() -> None:
    now = 0.0
    recent = Recent(lambda: now)
    recent.count(hit=1000, stored=400)
    assert recent.told(1, 2, 3, True) == Told(1, 1000, 400, 2, 3, True)
    now = HALF_LIFE
    recent.count(hit=100)
    assert recent.told(1, 2, 3, True)[1:3] == (550, 200)

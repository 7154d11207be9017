"""The announcer against a simple model: whatever happens in whatever order, the consumer's view becomes what is so."""

from __future__ import annotations

import random
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hicache_ext.events.announcer import Announcer
from hicache_ext.events.model import AnyEvent, BlockRemoved, BlockStored, CostedBlockStored, LoadCost
from storage_backends.base import Notes

PAGE = 4
SPACES = [b"a" * 16, b"b" * 16]
BLOCKS = 12
#: Three chains: the block above each; -1: it begins a prompt.
ABOVE = [-1, 0, 1, 2, 1, 4, -1, 6, 7, -1, 9, 9]


def key(block: int) -> bytes:
    return block.to_bytes(32, "big")


def event_hash(block: int) -> int:
    return (1 << 40) - block * 7 if block % 2 else -(1 << 50) + block


def notes(blocks: list[int], salt: str = "", page: int = PAGE) -> Notes:
    hashes = [[event_hash(b), 0 if ABOVE[b] < 0 else event_hash(ABOVE[b])] for b in blocks]
    tokens = np.array([[b * 100 + i for i in range(page)] for b in blocks], np.uint32)
    return Notes(tokens.reshape(-1, page), np.array(hashes, np.int64).reshape(-1, 2), salt)


class Consumer:
    """A router's view, which counts no references and takes offence at whatever a router would lose."""

    def __init__(self) -> None:
        self.view: set[tuple[str, int]] = set()

    def hear(self, events: list[AnyEvent]) -> None:
        for event in events:
            assert isinstance(event, BlockStored | BlockRemoved)
            assert event.medium in ("DISK", "EXTERNAL")
            assert len(set(event.block_hashes)) == len(event.block_hashes), "a hash twice in one event"
            for at, block in enumerate(event.block_hashes):
                place = (event.medium, block)
                if isinstance(event, BlockRemoved):
                    assert place in self.view, "removed, though never stored"
                    self.view.discard(place)
                    continue
                assert place not in self.view, "stored twice"
                self.view.add(place)
                number = next(b for b in range(BLOCKS) if event_hash(b) == block)
                assert event.block_size == PAGE
                assert event.token_ids[at * PAGE : (at + 1) * PAGE] == [number * 100 + i for i in range(PAGE)]
                above = event.block_hashes[at - 1] if at else event.parent_block_hash
                assert above == (None if ABOVE[number] < 0 else event_hash(ABOVE[number]))
            if isinstance(event, BlockStored):
                assert len(event.token_ids) == PAGE * len(event.block_hashes)


def drain(announcer: Announcer, consumer: Consumer, limit: int = 1000) -> None:
    while not announcer.quiet:
        consumer.hear(announcer.take(limit))
    assert announcer.take() == []


class Residency(RuleBasedStateMachine):
    """copies: which pages are where. known: of which pages something was told while they were somewhere."""

    @initialize()
    def begin(self) -> None:
        self.announcer = Announcer()
        self.consumer = Consumer()
        self.tiers: dict[int, tuple[str, bool]] = {}
        self.copies: set[tuple[int, bytes, int]] = set()
        self.known: set[tuple[bytes, int]] = set()
        self.served: set[bytes] | None = None

    def wanted(self) -> set[tuple[str, int]]:
        return {
            (self.tiers[tier][0], event_hash(block))
            for tier, space, block in self.copies
            if tier in self.tiers
            and self.tiers[tier][1]
            and (space, block) in self.known
            and (self.served is None or space in self.served)
        }

    def _forget(self) -> None:
        """What is known of a page goes with its last copy."""
        held = {(space, block) for _, space, block in self.copies}
        self.known &= held

    @precondition(lambda self: len(self.tiers) < 4)
    @rule(medium=st.sampled_from(["DISK", "EXTERNAL"]))
    def add_tier(self, medium: str) -> None:
        self.tiers[self.announcer.add(medium)] = (medium, True)

    @precondition(lambda self: self.tiers)
    @rule(data=st.data(), space=st.sampled_from(SPACES), blocks=st.sets(st.integers(0, BLOCKS - 1)), told=st.booleans())
    def store(self, data: st.DataObject, space: bytes, blocks: set[int], told: bool) -> None:
        tier = data.draw(st.sampled_from(sorted(self.tiers)))
        order = sorted(blocks, key=lambda b: (b * 5) % 7)
        self.announcer.stored(tier, space, b"".join(map(key, order)), notes(order) if told else None)
        self.copies |= {(tier, space, block) for block in blocks}
        if told:
            self.known |= {(space, block) for block in blocks}

    @precondition(lambda self: self.tiers)
    @rule(data=st.data(), space=st.sampled_from(SPACES), blocks=st.sets(st.integers(0, BLOCKS - 1)))
    def remove(self, data: st.DataObject, space: bytes, blocks: set[int]) -> None:
        tier = data.draw(st.sampled_from(sorted(self.tiers)))
        self.announcer.removed(tier, space, b"".join(map(key, blocks)))
        self.copies -= {(tier, space, block) for block in blocks}
        self._forget()

    @precondition(lambda self: self.tiers)
    @rule(data=st.data(), visible=st.booleans())
    def health(self, data: st.DataObject, visible: bool) -> None:
        tier = data.draw(st.sampled_from(sorted(self.tiers)))
        self.announcer.show(tier, visible)
        self.tiers[tier] = (self.tiers[tier][0], visible)

    @precondition(lambda self: self.tiers)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        tier = data.draw(st.sampled_from(sorted(self.tiers)))
        self.announcer.drop(tier)
        del self.tiers[tier]
        self.copies = {copy for copy in self.copies if copy[0] != tier}
        drain(self.announcer, self.consumer)  # what is known of pages without copies goes when they are looked over
        self._forget()

    @rule(spaces=st.none() | st.sets(st.sampled_from(SPACES)))
    def serve(self, spaces: set[bytes] | None) -> None:
        self.announcer.serve(spaces)
        self.served = spaces

    @rule()
    def cleared(self) -> None:
        self.announcer.clear()
        self.consumer.view.clear()

    @rule(limit=st.integers(1, 5))
    def take(self, limit: int) -> None:
        events = self.announcer.take(limit)
        assert sum(len(event.block_hashes) for event in events) <= limit + 1  # a block in two media is not torn apart
        self.consumer.hear(events)

    @rule(limit=st.integers(1, 50))
    def take_all(self, limit: int) -> None:
        drain(self.announcer, self.consumer, limit)
        assert self.consumer.view == self.wanted()

    @invariant()
    def counts_add_up(self) -> None:
        stats = self.announcer.stats()
        assert 0 <= stats["unknown"] <= stats["pages"]
        assert stats["over_limit"] == 0

    def teardown(self) -> None:
        if hasattr(self, "announcer"):
            drain(self.announcer, self.consumer)
            assert self.consumer.view == self.wanted()
            for tier in list(self.tiers):
                self.announcer.drop(tier)
            drain(self.announcer, self.consumer)
            assert not self.consumer.view
            assert self.announcer.stats()["pages"] == self.announcer.stats()["announced"] == 0
            assert not self.announcer._blocks, "something is kept of pages that are nowhere"


TestResidency = Residency.TestCase
TestResidency.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_children_come_after_their_parents_and_chains_in_one_event() -> None:
    announcer, consumer = Announcer(), Consumer()
    tier = announcer.add("DISK")
    for block in (3, 2, 1, 0):
        announcer.stored(tier, SPACES[0], key(block), notes([block]))
    events = announcer.take()
    consumer.hear(events)
    assert [event.block_hashes for event in events] == [[event_hash(b) for b in range(4)]]
    assert events[0].parent_block_hash is None  # type: ignore[union-attr]


def test_a_page_without_tokens_waits_until_somebody_tells_them() -> None:
    announcer, consumer = Announcer(), Consumer()
    disk, remote = announcer.add("DISK"), announcer.add("EXTERNAL")
    announcer.stored(remote, SPACES[0], key(0))
    drain(announcer, consumer)
    assert not consumer.view
    assert announcer.stats()["unknown"] == 1
    announcer.stored(disk, SPACES[0], key(0), notes([0]))
    drain(announcer, consumer)
    assert consumer.view == {("DISK", event_hash(0)), ("EXTERNAL", event_hash(0))}


def test_beyond_the_limit_pages_are_counted_and_not_announced() -> None:
    announcer, consumer = Announcer(limit=2), Consumer()
    tier = announcer.add("DISK")
    announcer.stored(tier, SPACES[0], b"".join(map(key, range(4))), notes([0, 1, 2, 3]))
    announcer.removed(tier, SPACES[0], key(3))
    drain(announcer, consumer)
    assert len(consumer.view) == 2
    assert announcer.stats()["over_limit"] == 2


def test_a_measured_cost_is_said_with_stores_and_ends_a_chain_where_it_changes() -> None:
    announcer = Announcer()
    slow, fast, remote = announcer.add("DISK"), announcer.add("DISK"), announcer.add("EXTERNAL")

    def store(tier: int, blocks: list[int]) -> list[AnyEvent]:
        announcer.stored(tier, SPACES[0], b"".join(map(key, blocks)), notes(blocks))
        return announcer.take()

    (event,) = store(slow, [0])
    assert type(event) is BlockStored, "nothing was measured"
    announcer.price(slow, LoadCost(1e9, 1e-3))
    announcer.price(fast, LoadCost(3e9, 2e-3))
    (event,) = store(slow, [1])
    assert isinstance(event, CostedBlockStored)
    assert event.load_cost == LoadCost(1e9, 1e-3)
    announcer.stored(fast, SPACES[0], key(2), notes([2]))
    events = store(slow, [2, 3])
    assert [(event.block_hashes, event.load_cost) for event in events] == [  # type: ignore[union-attr]
        ([event_hash(2)], LoadCost(3e9, 2e-3)),  # of the fastest that has it
        ([event_hash(3)], LoadCost(1e9, 1e-3)),
    ]
    (event,) = store(remote, [3])
    assert type(event) is BlockStored, "another medium, not measured"
    announcer.price(slow, LoadCost(2e9, 1e-3))
    assert announcer.take() == [], "another cost alone is no event"
    announcer.price(slow, None)
    announcer.clear()
    said = [event for event in announcer.take() if isinstance(event, CostedBlockStored)]
    assert [event.block_hashes for event in said] == [[event_hash(2)]]


def test_a_dropped_removal_is_seen_by_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the model above."""
    monkeypatch.setattr(Announcer, "removed", lambda *_: None)
    machine = Residency()
    machine.begin()
    machine.tiers[machine.announcer.add("DISK")] = ("DISK", True)
    machine.announcer.stored(0, SPACES[0], key(0), notes([0]))
    machine.copies, machine.known = {(0, SPACES[0], 0)}, {(SPACES[0], 0)}
    machine.take_all(10)
    machine.announcer.removed(0, SPACES[0], key(0))
    machine.copies = set()
    machine._forget()
    with pytest.raises(AssertionError):
        machine.take_all(10)


def test_several_io_threads_and_one_taker() -> None:
    """Each page's changes come from one thread; the view after them is what the last change of each says."""
    announcer, consumer = Announcer(), Consumer()
    tiers = [announcer.add("DISK"), announcer.add("EXTERNAL")]
    end: dict[tuple[int, int], bool] = {}
    stop = threading.Event()

    def work(number: int) -> None:
        draw = random.Random(number)
        mine = [b for b in range(BLOCKS) if b % 4 == number]
        for _ in range(1500):
            tier, block = draw.choice(tiers), draw.choice(mine)
            there = draw.random() < 0.5
            if there:
                announcer.stored(tier, SPACES[0], key(block), notes([block]))
            else:
                announcer.removed(tier, SPACES[0], key(block))
            end[tier, block] = there

    def take() -> None:
        while not stop.is_set():
            consumer.hear(announcer.take(3))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    taker = threading.Thread(target=take)
    taker.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    taker.join()
    drain(announcer, consumer)
    names = dict(zip(tiers, ("DISK", "EXTERNAL"), strict=True))
    assert consumer.view == {(names[tier], event_hash(block)) for (tier, block), there in end.items() if there}


def test_what_a_page_costs() -> None:
    """The figure of the module's docstring, for pages of 64 tokens."""
    count, page = 20_000, 64
    tokens = np.arange(page, dtype=np.uint32)[None, :].repeat(256, 0)
    tracemalloc.start()
    try:
        announcer = Announcer()
        tier = announcer.add("DISK")
        before = tracemalloc.get_traced_memory()[0]
        for first in range(0, count, 256):
            numbers = np.arange(first, first + 256)
            hashes = np.stack([numbers + (1 << 60), np.where(numbers, numbers + (1 << 60) - 1, 0)], 1)
            packed = b"".join(int(number).to_bytes(32, "big") for number in numbers)
            announcer.stored(tier, SPACES[0], packed, Notes(tokens, hashes))
        while not announcer.quiet:
            announcer.take()
        each = (tracemalloc.get_traced_memory()[0] - before) / announcer.stats()["pages"]
    finally:
        tracemalloc.stop()
    assert announcer.stats()["announced"] == announcer.stats()["pages"] >= count
    assert each < 500 + 4 * page, each
    print(f"{each:.0f} bytes a page of {page} tokens")

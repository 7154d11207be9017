"""The index: native and Python side by side, against the rule that both must keep (suffix first)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hicache_ext.page import NO_PARENT, split_keys
from storage_backends.local.claim import adopt
from storage_backends.local.index import Index, Page
from storage_backends.local.index_choice import open_index
from storage_backends.local.policy import ORDERS
from storage_backends.local.residency import RECORD_BYTES, Kind, Record

try:
    from storage_backends.local.index_native import NativeIndex
except ImportError:
    NativeIndex = None  # type: ignore[assignment,misc]

SPACE = b"s" * 16
OTHER_SPACE = b"t" * 16
OURS, THEIRS = 0, 1
SECOND = 1_000_000_000
needs_native = pytest.mark.skipif(NativeIndex is None, reason="the native index is not built")
both = pytest.mark.parametrize("make", [Index, pytest.param(NativeIndex, marks=needs_native)], ids=["python", "native"])
Make = Callable[..., Any]


def key(name: int) -> bytes:
    return name.to_bytes(32, "big")


def packed(names: list[int]) -> bytes:
    return b"".join(map(key, names))


def above(name: int) -> int:
    """Pages form a tree: page n's parent is n // 2, so that chains branch; 1 is the root."""
    return name // 2


def page(name: int, slot: int, own: bool = True, known: bool = True, space: bytes = SPACE) -> Page:
    parent = key(above(name)) if known else NO_PARENT
    return Page(space, key(name), parent, OURS if own else THEIRS, slot // 16, slot % 16, slot, own, slot * SECOND)


names = st.integers(1, 63)
spaces = st.sampled_from([SPACE, SPACE, SPACE, OTHER_SPACE])


class IndexMachine(RuleBasedStateMachine):
    """Every call on both; the same answers. With lru the same victims, else victims that keep the rule.

    No rule draws from what is resident: what is drawn must not depend on what an index answers.
    """

    order = "lru"
    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.model = Index(self.order)
        self.native = NativeIndex(self.order)
        self.slot = 0
        self.pins: list[tuple[int, int, int]] = []
        self.resident: dict[tuple[bytes, int], Page] = {}
        self.oldest: dict[bytes, int] = {}
        self.captured: list[tuple[int, Any, Any, list[bytes]]] = []

    def same(self, call: str, *arguments: object) -> Any:
        one, two = (getattr(index, call)(*arguments) for index in (self.model, self.native))
        assert np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two, (call, one, two)
        return one

    @rule(name=names, own=st.booleans(), known=st.booleans(), space=spaces, oldest=st.booleans())
    def store(self, name: int, own: bool, known: bool, space: bytes, oldest: bool) -> None:
        self.slot += 1
        new = page(name, self.slot, own, known, space)
        self.same("insert", new, oldest and own)
        self.resident[space, name] = new

    @rule(start=names, length=st.integers(1, 5), known=st.booleans(), space=spaces)
    def publish(self, start: int, length: int, known: bool, space: bytes) -> None:
        chain = [start << i for i in range(length) if start << i < 64]
        slots = [self.slot + 1 + i for i in range(len(chain))]
        self.slot += len(chain)
        parents = packed([above(name) for name in chain]) if known else None
        places = [slot // 16 for slot in slots], [slot % 16 for slot in slots]
        now = slots[0] * SECOND + 999
        self.same("publish", space, packed(chain), parents, OURS, *places, slots, now)
        for name, slot in zip(chain, slots, strict=True):
            self.resident[space, name] = page(name, slot, True, known, space)._replace(time_ns=slots[0] * SECOND)

    @rule(found=st.lists(names, max_size=8, unique=True), prefix=st.sampled_from(["absent", "partial", "full"]),
          used=st.booleans(), space=spaces)  # fmt: skip
    def lookup(self, found: list[int], prefix: str, used: bool, space: bytes) -> None:
        parents = [above(name) if prefix == "full" or (prefix == "partial" and name % 3) else 0 for name in found]
        given_parents = None if prefix == "absent" else packed(parents)
        answer = self.same("lookup", space, packed(found), given_parents, used)
        assert answer.tolist() == [self.usable(space, name) for name in found]

    def usable(self, space: bytes, name: int) -> bool:
        known = self.resident.get((space, name))
        return known is not None and known.time_ns >= self.oldest.get(space, 0)

    @rule(touched=st.lists(names, max_size=5), space=spaces)
    def touch(self, touched: list[int], space: bytes) -> None:
        self.same("touch", space, list(map(key, touched)))

    @rule(name=names, space=spaces)
    def link(self, name: int, space: bytes) -> None:
        self.same("link", space, key(name), key(above(name)))

    @rule(name=names, space=spaces, evicted=st.booleans())
    def remove(self, name: int, space: bytes, evicted: bool) -> None:
        known = self.resident.pop((space, name), None)
        if known is not None:
            assert self.same("remove", known, evicted)
            assert not self.same("remove", known, evicted)

    @rule(pinned=st.lists(names, max_size=4, unique=True), space=spaces)
    def pin(self, pinned: list[int], space: bytes) -> None:
        one, two = (index.pin(space, packed(pinned), None) for index in (self.model, self.native))
        assert (one.pages, one[2:]) == (two.pages, two[2:])
        assert one.pages == [at for at, name in enumerate(pinned) if self.usable(space, name)]
        for at, first, second in zip(one.pages, one.handles, two.handles, strict=True):
            self.pins.append((pinned[at], first, second))

    @rule(which=st.integers(0, 7))
    def unpin(self, which: int) -> None:
        if self.pins:
            name, one, two = self.pins.pop(which % len(self.pins))
            assert self.model.pinned(one)[:9] == self.native.pinned(two)[:9]
            assert self.model.pinned(one).key == key(name)
            assert self.model.fail(one) == self.native.fail(two)
            assert self.model.unpin([one]) == self.native.unpin([two])

    @rule(space=spaces, count=st.integers(0, 9))
    def foresee(self, space: bytes, count: int) -> None:
        self.foreseen(space, count)

    def foreseen(self, space: bytes, count: int) -> list[bytes]:
        """What goes next, asked without changing anything: leaves, and what would be one by then."""
        order = records_of(self.native)
        keys = split_keys(self.native.going(space, count))
        if self.exact:
            assert split_keys(self.model.going(space, count)) == keys
        assert len(keys) <= count
        left = {p.key: p for p in map(self.told, self.resident.values()) if p.namespace == space}
        for one in keys:
            assert left[one].own
            assert not left[one].pins
            assert self.usable(space, int.from_bytes(one, "big"))
            unusable = {p.key for p in left.values() if not self.usable(space, int.from_bytes(p.key, "big"))}
            assert one not in {p.parent for p in left.values() if p.key not in unusable}, "suffix first"
            del left[one]
        assert records_of(self.native) == order
        return keys

    @rule(protected=st.frozensets(names, max_size=8), space=spaces)
    def evict(self, protected: frozenset[int], space: bytes) -> None:
        kept = frozenset(map(key, protected))
        victim = self.native.victim(space, kept)
        if self.exact:
            assert self.model.victim(space, kept) == victim
        assert self.native.victim(space, frozenset(kept)) == victim or not self.exact, "asking changes nothing"
        mine = {p.key: p for p in map(self.told, self.resident.values()) if p.namespace == space}
        own = {k: p for k, p in mine.items() if p.own}
        parents = {p.parent for p in own.values()}
        leaves = {k for k, p in own.items() if not p.pins and k not in kept and k not in parents}
        if victim is None:
            assert not leaves
            return
        assert victim.key in leaves, "a victim is an own page, not in use, with no resident child of ours"
        if any(p.parent == victim.key for p in mine.values()):
            childless = leaves - {p.parent for p in mine.values()}
            assert not childless, "a page with others' children goes only when nothing else can"
        assert self.same("remove", victim, True)
        del self.resident[space, int.from_bytes(victim.key, "big")]

    @rule(protected=st.frozensets(names, max_size=8), space=spaces, count=st.integers(0, 9), time=st.integers(0, 99))
    def evict_many(self, protected: frozenset[int], space: bytes, count: int, time: int) -> None:
        """As many victims, one after the other, on a twin that is told of the same pages."""
        kept = frozenset(map(key, protected))
        foreseen = self.foreseen(space, count) if not kept else []
        gone, records = self.native.evict(space, count, kept, time)
        if self.exact:
            assert self.model.evict(space, count, kept, time) == (gone, records)
        else:
            assert self.model.forget(gone, True, time) == (gone, records)
        assert len(gone) == count or self.native.victim(space, kept) is None
        if self.order != "s3fifo":  # where pages that get another round are not foreseen
            usable = [p.key for p in gone if p.time_ns >= self.oldest.get(space, 0)]
            assert usable[: len(foreseen)] == foreseen
        self.check_gone(gone, records, time)

    @rule(which=st.lists(st.integers(0, 63), max_size=6), evicted=st.booleans(), time=st.integers(0, 99), absent=names)
    def forget(self, which: list[int], evicted: bool, time: int, absent: int) -> None:
        there = list(self.resident.values())
        pages = [there[at % len(there)] for at in which if there]
        pages.append(page(absent, 1 << 20))  # a place that no page has
        gone, records = self.same("forget", pages, evicted, time)
        assert [p.generation for p in gone] == [p.generation for p in dict.fromkeys(pages[:-1])]
        self.check_gone(gone, records, time)

    def check_gone(self, gone: list[Page], records: bytes, time: int) -> None:
        for at, removed in enumerate(gone):
            raw = records[at * RECORD_BYTES : (at + 1) * RECORD_BYTES]
            place = removed.extent, removed.slot, removed.generation
            assert Record.decode(raw) == Record(Kind.REMOVED, *place, time, removed.namespace, removed.key)
            del self.resident[removed.namespace, int.from_bytes(removed.key, "big")]
        assert len(records) == RECORD_BYTES * len(gone)

    @rule(age=st.integers(-3, 60), space=spaces)
    def set_oldest(self, age: int, space: bytes) -> None:
        """Stored times count up with the slots."""
        self.oldest[space] = max(0, self.slot - age) * SECOND
        self.same("set_oldest", space, self.oldest[space] + 5)  # whole seconds count

    @rule(limit=st.integers(0, 5), examine=st.integers(0, 20), space=spaces)
    def expired(self, limit: int, examine: int, space: bytes) -> None:
        for found in self.same("expired", space, limit, examine):
            assert found.own
            assert found.namespace == space
            assert found.time_ns < self.oldest[space]

    @rule(limit=st.integers(1, 5), examine=st.integers(1, 20), space=spaces)
    def sweep(self, limit: int, examine: int, space: bytes) -> None:
        """Enough calls find all that is past its time, and nothing else."""
        due = {k for k, p in self.resident.items() if p.own and k[0] == space and not self.usable(*k)}
        for _ in range(3 * len(self.resident) + 3):
            found = self.same("expired", space, limit, examine)
            assert len(found) <= limit
            for gone in found:
                assert self.same("remove", gone)
                name = space, int.from_bytes(gone.key, "big")
                due.remove(name)
                del self.resident[name]
        assert not due

    @rule(folder=st.sampled_from([OURS, THEIRS]), sort=st.booleans())
    def snapshot(self, folder: int, sort: bool) -> None:
        one, two = (index.snapshot(folder) for index in (self.model, self.native))
        records = records_of(self.native, folder)
        assert len(one) == len(two) == len(records)
        self.captured.append((folder, one, two, records))

    @rule(start=st.integers(0, 20), count=st.integers(0, 40))
    def write_snapshot(self, start: int, count: int) -> None:
        """What a snapshot gives later: what its folder's records were, less those of pages that went or moved."""
        if not self.captured:
            return
        folder, one, two, records = self.captured.pop(0)
        one.sort()
        two.sort()
        now = set(records_of(self.native, folder))
        pieces = [(start, count), (0, len(records))]
        for first, many in pieces:
            given = self.native.snapshot_records(two, first, many)
            at = [given[at : at + RECORD_BYTES] for at in range(0, len(given), RECORD_BYTES)]
            assert bare(at) == [raw for raw in bare(records[first : first + many]) if raw in bare(now)]
            if self.exact and not self.mixed_spaces(records):
                assert self.model.snapshot_records(one, first, many) == given

    @staticmethod
    def mixed_spaces(records: list[bytes]) -> bool:
        return len({Record.decode(raw).namespace for raw in records}) > 1

    def told(self, known: Page) -> Page:
        return self.same("get", known.namespace, known.key)

    @rule(extent=st.integers(0, 8))
    def take_extent(self, extent: int) -> None:
        """As a writer does that needs an extent for another namespace: what hangs below its pages becomes orphans."""
        doomed = self.same("in_extent", OURS, extent)
        gone, records = self.same("forget", doomed, True, 0)
        self.check_gone(gone, records, 0)

    @rule(limit=st.integers(1, 5), examine=st.integers(1, 30))
    def sweep_orphans(self, limit: int, examine: int) -> None:
        """Both find the same in the end, each in its own order."""
        gone: list[set[Page]] = []
        for index in (self.model, self.native):
            gone.append(set())
            quiet = 0
            while quiet < 40:
                found = index.sweep_orphans(limit, examine)
                assert len(found) <= limit
                assert len(index.forget(found, True, 0)[0]) == len(found)
                gone[-1].update(found)
                quiet = 0 if found else quiet + 2 * examine // 30 + 1
        assert gone[0] == gone[1]
        for found in gone[0]:
            assert found.own
            assert not found.pins
            del self.resident[found.namespace, int.from_bytes(found.key, "big")]

    @rule(space=spaces, name=names)
    def climb(self, space: bytes, name: int) -> None:
        self.same("ancestors", space, key(name))

    @rule(which=st.sampled_from([OURS, THEIRS]), extent=st.integers(0, 8), slots=st.integers(0, 16))
    def trim(self, which: int, extent: int, slots: int) -> None:
        self.same("trim", which, extent, SPACE, slots)
        one, two = (index.used_slots(which, extent) for index in (self.model, self.native))
        assert sorted(one.tolist()) == two.tolist()
        self.resync()

    @rule(space=st.sampled_from([None, SPACE]))
    def drop(self, space: bytes | None) -> None:
        self.same("drop", THEIRS, space)
        self.resync()

    @rule(capacity=st.integers(1, 100), space=spaces)
    def resize(self, capacity: int, space: bytes) -> None:
        self.same("set_capacity", space, capacity)

    @rule(folders=st.sampled_from([[THEIRS], [2], [THEIRS, 2], [2, THEIRS, 2]]), gone=st.none() | names,
          examine=st.integers(1, 100), count=st.integers(1, 40))  # fmt: skip
    def adopt(self, folders: list[int], gone: int | None, examine: int, count: int) -> None:
        """gone: a page that goes between two steps."""
        adoptions = [index.adoption(*folders) for index in (self.model, self.native)]
        for index, adoption in zip((self.model, self.native), adoptions, strict=True):
            while not index.gather(adoption, examine):
                pass
            adoption.sort()
        if gone is not None:
            self.remove(gone, SPACE, False)
        done = False
        while not done:
            done, also = (i.adopt(a, count) for i, a in zip((self.model, self.native), adoptions, strict=True))
            assert done == also
        self.resync()

    @rule(entries=st.lists(st.tuples(names, st.sampled_from(list(Kind)), st.integers(0, 40)), max_size=8),
          torn=st.integers(0, 9), at_end=st.booleans())  # fmt: skip
    def log(self, entries: list[tuple[int, Kind, int]], torn: int, at_end: bool) -> None:
        records = bytearray()
        for name, kind, slot in entries:
            self.slot += 1
            extent, number = (1000 + slot // 16, slot % 16)
            records += Record(
                kind, extent, number, self.slot, self.slot * SECOND, SPACE, key(name), key(above(name))
            ).encode()
        if torn < len(entries):
            records[torn * RECORD_BYTES + 50] ^= 1
        self.same("apply_log", 2, bytes(records), at_end)
        self.resync()

    def resync(self) -> None:
        """After a call that changes many pages: the model's word for it."""
        self.resident = {
            (space, int.from_bytes(k, "big")): entry.told()
            for space, there in self.model.spaces.items()
            for k, entry in there.entries.items()
        }

    @invariant()
    def same_pages(self) -> None:
        assert self.same("__len__") == len(self.resident)
        for (space, _), known in self.resident.items():
            told = self.same("get", space, known.key)
            assert told is not None
            assert self.same("at", told.folder, told.extent, told.slot) == told
        self.same("orphans")
        for space in (SPACE, OTHER_SPACE):
            self.same("touched", space)
        for folder in (OURS, THEIRS, 2):
            for extent in self.model.extents(folder):
                self.same("newest_generation", folder, extent)
            assert sorted(self.model.extents(folder)) == self.native.extents(folder)
        if self.exact:
            for folder in (None, OURS, THEIRS):
                assert records_of(self.native, folder) == records_of(self.model, folder) or self.mixed(folder)

    def mixed(self, folder: int | None) -> bool:
        """Namespaces may come in another order."""
        one, two = (by_space(records_of(index, folder)) for index in (self.model, self.native))
        return len(one) > 1 and one == two


def by_space(records: list[bytes]) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for raw in records:
        found.setdefault(Record.decode(raw).namespace, []).append(raw)
    return found


def bare(records: Iterable[bytes]) -> list[Record]:
    """Without parents, which a page may learn at any time."""
    return [Record.decode(raw)._replace(parent=NO_PARENT) for raw in records]


def records_of(index: Any, folder: int | None = None) -> list[bytes]:
    raw = index.own_records(folder)
    return [raw[at : at + RECORD_BYTES] for at in range(0, len(raw), RECORD_BYTES)]


@needs_native
@pytest.mark.parametrize("order", ["lru", "credit", "s3fifo"])
def test_native_and_python_agree(order: str) -> None:
    machine = type("Machine", (IndexMachine,), {"order": order, "exact": order == "lru"})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))


@both
@pytest.mark.parametrize("order", ORDERS.keys() - {"fifo"})
def test_a_chain_shrinks_from_its_end(make: Make, order: str) -> None:
    index = make(order)
    for i in range(1, 11):
        index.insert(Page(SPACE, key(i), key(i - 1) if i > 1 else NO_PARENT, 0, 0, i, i, True))
        index.touch(SPACE, [key(i)])
    gone = []
    while (victim := index.victim(SPACE)) is not None:
        gone.append(int.from_bytes(victim.key, "big"))
        index.remove(victim)
    assert gone == list(range(10, 0, -1))


@both
def test_using_a_tail_keeps_its_head(make: Make) -> None:
    """The engine asks the disk only for what its memory lacks: the head must not die of being in memory."""
    index = make("lru")
    for prefix in (100, 200):
        for i in range(5):
            parent = key(prefix + i - 1) if i else NO_PARENT
            index.insert(Page(SPACE, key(prefix + i), parent, 0, 0, prefix + i, 1, True))
            index.touch(SPACE, [key(prefix + i)])
    index.touch(SPACE, [key(104)])  # only the tail of the first chain is asked for
    gone = []
    for _ in range(5):
        victim = index.victim(SPACE)
        assert victim is not None
        gone.append(int.from_bytes(victim.key, "big"))
        index.remove(victim)
    assert gone == [204, 203, 202, 201, 200]


@both
def test_adoption_restores_ancestors_last(make: Make) -> None:
    index = make("lru")
    for i in (3, 1, 2):  # a log may name a child before its parent
        index.insert(Page(SPACE, key(i), key(i - 1) if i > 1 else NO_PARENT, 7, 0, i, i, False))
    assert index.victim(SPACE) is None
    adopt(index, threading.RLock(), [7])
    assert [Record.decode(raw).key for raw in records_of(index)] == [key(3), key(2), key(1)]


@both
def test_folders_adopted_together_grow_old_together(make: Make) -> None:
    """One folder per disk: neither disk's pages may all go before the other's."""
    index = make("credit")
    for folder in (0, 1):
        for i in range(10):
            name = 100 * folder + i + 1
            index.insert(Page(SPACE, key(name), NO_PARENT, folder, 0, i, i, False))
    adopt(index, threading.RLock(), [0, 1])
    gone, records = index.evict(SPACE, 10, frozenset(), 5)
    assert sorted(page.folder for page in gone) == [0] * 5 + [1] * 5
    for folder in (0, 1):
        kept = [Record.decode(raw).key for raw in records_of(index, folder)]
        assert kept == [key(100 * folder + i + 1) for i in range(5, 10)], "each folder's own order holds"
    assert [Record.decode(records[at : at + RECORD_BYTES]).key for at in range(0, len(records), RECORD_BYTES)] == [
        page.key for page in gone
    ]


@both
def test_a_page_past_its_time_is_absent_until_it_is_stored_again(make: Make) -> None:
    index = make("lru")
    index.publish(SPACE, packed([1, 2]), packed([0, 1]), OURS, [0, 0], [0, 1], [1, 2], 100 * SECOND)
    index.set_oldest(SPACE, 101 * SECOND)
    assert not index.has(SPACE, key(1))
    assert index.lookup(SPACE, packed([1, 2]), None, True).tolist() == [0, 0]
    assert index.pin(SPACE, packed([1, 2]), None).pages == []
    assert index.ancestors(SPACE, key(2)) == []
    assert index.get(SPACE, key(1)).slot == 0
    replaced, _ = index.publish(SPACE, key(1), None, OURS, [0], [2], [3], 200 * SECOND)
    assert [page.slot for page in replaced] == [0], "its slot is told, to be used again"
    assert index.lookup(SPACE, packed([1, 2]), None, True).tolist() == [1, 0]
    assert index.ancestors(SPACE, key(2)) == [key(1)]
    assert [page.key for page in index.expired(SPACE, 10)] == [key(2)]


@both
def test_a_page_of_the_future_is_not_past_its_time(make: Make) -> None:
    index = make("lru")
    index.insert(page(1, 1)._replace(time_ns=10**18))
    index.set_oldest(SPACE, 5 * 10**17)
    assert index.has(SPACE, key(1))
    assert index.expired(SPACE, 10) == []


@both
def test_another_writers_copy_takes_the_place_of_one_past_its_time(make: Make) -> None:
    index = make("lru")
    records = [Record(Kind.STORED, 0, 0, 1, time * SECOND, SPACE, key(1)).encode() for time in (100, 200)]
    index.apply_log(1, records[0], True)
    index.apply_log(2, records[1], True)
    assert index.get(SPACE, key(1)).folder == 1
    index.set_oldest(SPACE, 150 * SECOND)
    index.apply_log(2, records[1], True)
    assert index.get(SPACE, key(1)).folder == 2
    assert index.has(SPACE, key(1))


@both
def test_failed_reads_are_remembered_between_reads(make: Make) -> None:
    index = make("lru")
    index.insert(page(1, 1))
    for times in (1, 2):
        handles = index.pin(SPACE, key(1), None).handles
        assert index.fail(handles[0]) == times
        assert index.unpin(handles) == bytes(1)


@both
def test_a_page_removed_while_it_is_read_frees_its_slot_after_the_last_reader(make: Make) -> None:
    index = make("lru")
    index.insert(page(1, 1))
    one, two = (index.pin(SPACE, key(1), None).handles for _ in range(2))
    assert index.victim(SPACE) is None
    index.remove(index.get(SPACE, key(1)))
    index.insert(page(1, 2))
    assert index.pinned(two[0]).slot == 1
    assert [index.unpin(one), index.unpin(two)] == [bytes([0]), bytes([1])]
    assert index.get(SPACE, key(1)).slot == 2


@both
@pytest.mark.parametrize("order", ORDERS.keys() - {"fifo"})
def test_what_goes_next_is_foreseen(make: Make, order: str) -> None:
    """Chains from their ends, the coldest first; asked a hundred times, it is the same."""
    index = make(order)
    index.set_capacity(SPACE, 40)
    for first in (100, 200, 300):
        chain = [first + i for i in range(8)]
        index.publish(SPACE, packed(chain), packed([0, *chain[:-1]]), OURS, [first] * 8, list(range(8)), chain, 0)
    index.lookup(SPACE, packed([107]), None, True)
    index.lookup(SPACE, packed([107]), None, True)
    held = index.pin(SPACE, packed([207]), None, False)
    for _ in range(100):
        foreseen = index.going(SPACE, 30)
    if order != "s3fifo":
        assert foreseen == packed([*range(307, 299, -1), *range(107, 99, -1)])
    assert foreseen[:256] == packed([*range(307, 299, -1)])
    gone, _ = index.evict(SPACE, 8, frozenset(), 0)
    assert b"".join(page.key for page in gone) == foreseen[:256]
    index.unpin(held.handles)
    assert index.going(SPACE, 8) == packed([*range(207, 199, -1)]), "reading it on its way out was no use of it"


@both
def test_credit_keeps_what_was_used_often(make: Make) -> None:
    index = make("credit")
    index.set_capacity(SPACE, 8)
    for name in range(1, 5):
        index.insert(page(name, name, known=False))
    for _ in range(3):
        index.lookup(SPACE, key(1), None, True)
    for name in range(5, 7):
        index.insert(page(name, name, known=False))
    gone = []
    while (victim := index.victim(SPACE)) is not None:
        gone.append(int.from_bytes(victim.key, "big"))
        index.remove(victim, True)
    assert gone[-1] == 1


@both
def test_s3fifo_lets_a_scan_pass(make: Make) -> None:
    index = make("s3fifo")
    index.set_capacity(SPACE, 20)
    index.insert(page(1, 1, known=False))
    for _ in range(2):
        index.lookup(SPACE, key(1), None, True)
    for name in range(2, 60):
        index.insert(page(name, name, known=False))
        if name > 20:
            index.remove(index.victim(SPACE), True)
    assert index.has(SPACE, key(1))


@needs_native
@pytest.mark.parametrize("known", [True, False], ids=["chains", "no page with a known parent"])
@pytest.mark.parametrize("pages", [100_000, 98_500])  # the latter: the table of keys has just grown
def test_at_most_120_bytes_a_page(known: bool, pages: int) -> None:
    index = NativeIndex("credit")
    length = 250
    index.set_capacity(SPACE, pages)
    for first in range(1, pages, length):
        chain = list(range(first, first + length))
        parents = packed([0, *chain[:-1]]) if known else None
        index.publish(SPACE, packed(chain), parents, 0, [first // length] * length, list(range(length)), chain, 0)
    assert index.memory() / len(index) <= 120


@both
def test_pages_below_one_that_is_evicted_with_its_extent_are_orphans(make: Make) -> None:
    index = make("lru")
    index.publish(SPACE, packed([1, 2, 4, 8]), packed([0, 1, 2, 4]), OURS, [0, 1, 1, 1], [0, 1, 2, 3], [1, 2, 3, 4], 0)
    index.publish(SPACE, packed([3]), packed([1]), OURS, [2], [0], [5], 0)
    index.forget(index.in_extent(OURS, 0), True, 0)
    assert index.orphans() == 2
    assert index.lookup(SPACE, packed([2]), None, True).tolist() == [1], "they serve as long as they are there"
    assert index.orphans() == 0, "and whoever asks for them has their parent"
    assert index.sweep_orphans(9) == []
    index.forget([index.get(SPACE, key(2))], True, 0)
    gone = []
    while index.orphans():
        found = index.sweep_orphans(1)
        index.forget(found, True, 0)
        gone += [page.key for page in found]
    assert gone == [key(4), key(8)]
    assert index.has(SPACE, key(3))


@both
def test_the_parents_return_ends_its_childrens_orphanhood(make: Make) -> None:
    index = make("lru")
    for name in (1, 2):
        index.insert(page(name, name))
    index.remove(page(1, 1), True)
    assert index.orphans() == 1
    index.insert(page(1, 3))
    assert index.orphans() == 0
    index.remove(page(1, 3), False)
    assert index.orphans() == 0, "a page that is quarantined is healed by the next write"


def test_the_python_index_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HICACHE_EXT_INDEX", "python")
    assert open_index("lru").name == "python"

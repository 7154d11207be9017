"""The index: a state machine against the rule it must keep (no victim with resident children, suffix first)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from hicache_ext.page import NO_PARENT
from storage_backends.local.index import Entry, Index

SPACE = bytes(16)


def key(name: int) -> bytes:
    return name.to_bytes(32, "big")


class IndexMachine(RuleBasedStateMachine):
    """Pages form a tree: page n's parent is n // 2, so that chains branch; 1 is the root."""

    pages = Bundle("pages")

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.slot = 0
        self.resident: dict[int, Entry] = {}

    @rule(target=pages, name=st.integers(1, 63))
    def a_page(self, name: int) -> int:
        return name

    @rule(name=pages, own=st.booleans(), known=st.booleans())
    def store(self, name: int, own: bool, known: bool) -> None:
        parent = key(name // 2) if known and name > 1 else NO_PARENT
        self.slot += 1
        entry = Entry(SPACE, key(name), parent, 0 if own else 1, 0, self.slot, self.slot, own)
        self.index.insert(entry)
        self.resident[name] = entry
        self.index.touch(SPACE, [key(name)])

    @rule(name=pages)
    def link(self, name: int) -> None:
        if name in self.resident and name > 1:
            self.index.link(self.resident[name], key(name // 2))
            self.index.touch(SPACE, [key(name)])

    @rule(names=st.lists(st.integers(1, 63), max_size=5))
    def touch(self, names: list[int]) -> None:
        self.index.touch(SPACE, [key(name) for name in names])

    @rule(name=pages)
    def quarantine(self, name: int) -> None:
        entry = self.resident.pop(name, None)
        if entry is not None:
            assert self.index.remove(entry)
            assert not self.index.remove(entry)

    @rule(name=pages, pins=st.integers(0, 1))
    def pin(self, name: int, pins: int) -> None:
        if name in self.resident:
            self.resident[name].pins = pins

    @rule(protected=st.frozensets(st.integers(1, 63), max_size=8))
    def evict(self, protected: frozenset[int]) -> None:
        victim = self.index.victim(SPACE, frozenset(map(key, protected)))
        names = {entry.key: name for name, entry in self.resident.items()}
        own = [n for n, e in self.resident.items() if e.own and not e.pins and n not in protected]
        leaves = [n for n in own if not any(e.own and e.parent == key(n) for e in self.resident.values())]
        if victim is None:
            assert not leaves
            return
        name = names[victim.key]
        assert name in leaves, "a victim is an own page, not in use, with no resident child of ours"
        other_child = any(e.parent == victim.key for e in self.resident.values())
        if other_child:
            childless = [n for n in leaves if not any(e.parent == key(n) for e in self.resident.values())]
            assert not childless, "a page with others' children goes only when nothing else can"
        self.index.remove(victim)
        del self.resident[name]

    @invariant()
    def same_pages(self) -> None:
        assert len(self.index) == len(self.resident)
        for name, entry in self.resident.items():
            assert self.index.get(SPACE, key(name)) is entry
            assert self.index.at(entry.folder, entry.extent, entry.slot) is entry

    @invariant()
    def ancestors_are_more_recent(self) -> None:
        space = self.index.spaces.get(SPACE)
        if space is None:
            return
        place = {k: i for i, k in enumerate(space.order)}
        for entry in self.resident.values():
            if entry.own and entry.parent in place:
                assert place[entry.parent] > place[entry.key]


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_a_chain_shrinks_from_its_end() -> None:
    index = Index()
    for i in range(1, 11):
        index.insert(Entry(SPACE, key(i), key(i - 1) if i > 1 else NO_PARENT, 0, 0, i, i, True))
        index.touch(SPACE, [key(i)])
    gone = []
    while (victim := index.victim(SPACE)) is not None:
        gone.append(int.from_bytes(victim.key, "big"))
        index.remove(victim)
    assert gone == list(range(10, 0, -1))


def test_using_a_tail_keeps_its_head() -> None:
    """The engine asks the disk only for what its memory lacks: the head must not die of being in memory."""
    index = Index()
    for prefix in (100, 200):
        for i in range(5):
            parent = key(prefix + i - 1) if i else NO_PARENT
            index.insert(Entry(SPACE, key(prefix + i), parent, 0, 0, prefix + i, 1, True))
            index.touch(SPACE, [key(prefix + i)])
    index.touch(SPACE, [key(104)])  # only the tail of the first chain is asked for
    gone = []
    for _ in range(5):
        victim = index.victim(SPACE)
        assert victim is not None
        gone.append(int.from_bytes(victim.key, "big"))
        index.remove(victim)
    assert gone == [204, 203, 202, 201, 200]


def test_adoption_restores_ancestors_last() -> None:
    index = Index()
    for i in (3, 1, 2):  # a log may name a child before its parent
        index.insert(Entry(SPACE, key(i), key(i - 1) if i > 1 else NO_PARENT, 7, 0, i, i, False))
    assert index.victim(SPACE) is None
    index.adopt(7)
    order = list(index.spaces[SPACE].order)
    assert order == [key(3), key(2), key(1)]

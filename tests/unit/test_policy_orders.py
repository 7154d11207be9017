"""Orders of eviction: the rule that all must keep, and what each adds, against models that search."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from storage_backends.local.policy import ORDERS, Always, Credit, Lru, S3Fifo, SecondHit, Tier, WriteBudget
from storage_backends.local.policy.order import Ghosts, Order


def ancestors(name: int) -> list[int]:
    """Pages form a tree: page n's parent is n // 2, so that chains branch; 1 is the root. Root first."""
    chain = []
    while name:
        chain.append(name)
        name //= 2
    return chain[::-1]


names = st.integers(1, 127)
requests = st.lists(st.tuples(names, st.booleans()), max_size=120)


class OrderMachine(RuleBasedStateMachine):
    """Every order under every call, with parents known, unknown, and told later."""

    kind = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.order: Order = ORDERS[self.kind](8)
        self.parents: dict[int, int | None] = {}

    @rule(name=names, known=st.booleans())
    def insert(self, name: int, known: bool) -> None:
        if name not in self.order:
            self.parents[name] = name // 2 if known and name > 1 else None
            self.order.insert(name, self.parents[name])

    @rule(name=names)
    def link(self, name: int) -> None:
        if name in self.order and name > 1:
            self.order.link(name, name // 2)
            self.parents[name] = name // 2

    @rule(name=names, depth=st.integers(1, 7), used=st.booleans())
    def touch(self, name: int, depth: int, used: bool) -> None:
        self.order.touch(ancestors(name)[-depth:], used)

    @precondition(lambda self: self.parents)
    @rule(data=st.data(), evicted=st.booleans())
    def remove(self, data: st.DataObject, evicted: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.parents)))
        self.order.remove(name, evicted)
        del self.parents[name]

    @rule(protected=st.frozensets(names, max_size=6))
    def evict(self, protected: frozenset[int]) -> None:
        leaves = set(self.parents) - set(self.parents.values()) - protected
        victim = self.order.victim(protected)
        assert (victim in leaves) if leaves else victim is None
        if victim is not None:
            assert self.order.victim(protected) == victim, "asking changes nothing"
            self.order.remove(victim, evicted=True)
            del self.parents[victim]

    @invariant()
    def same_pages(self) -> None:
        assert self.order.pages.keys() == self.parents.keys()
        parents = [parent for parent in self.parents.values() if parent is not None]
        assert dict(self.order.children) == {parent: parents.count(parent) for parent in parents}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_victim_never_has_resident_children(kind: str) -> None:
    machine = type("Machine", (OrderMachine,), {"kind": kind})
    settings_ = settings(max_examples=60, stateful_step_count=60, deadline=None)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings_)


@pytest.mark.parametrize("kind", ORDERS)
@settings(max_examples=60, deadline=None)
@given(requests=requests, capacity=st.integers(1, 20), admission=st.sampled_from(["always", "second", "budget"]))
def test_a_tier_keeps_to_its_capacity_and_whole_prefixes(
    kind: str, requests: list[tuple[int, bool]], capacity: int, admission: str
) -> None:
    rules = {"always": Always(), "second": SecondHit(capacity), "budget": WriteBudget(86_400 / 2, 3)}
    tier = Tier(ORDERS[kind](capacity), rules[admission])
    offered = 0
    for now, (name, _) in enumerate(requests):
        chain = ancestors(name)
        before = set(tier.order.pages)
        hits = tier.lookup(chain)
        assert chain[:hits] == [key for key in chain if key in before], "a hit is all of it that is resident"
        tier.write(chain, hits, now)
        offered += len(chain) - hits
        assert len(tier.order) <= capacity
        assert all(key == 1 or key // 2 in tier.order for key in tier.order.pages)
    assert offered == tier.written + sum(tier.rejected.values())
    assert tier.written == len(tier.order) + sum(tier.evicted.values())


@settings(max_examples=150, deadline=None)
@given(requests=requests, capacity=st.integers(1, 20))
def test_lru_is_the_leaf_that_a_search_finds(requests: list[tuple[int, bool]], capacity: int) -> None:
    """Last use of each page in a list; the victim is the first of it without a resident child."""
    order, recency = Lru(capacity), list[int]()
    for name, used in requests:
        chain = ancestors(name)
        for depth, key in enumerate(chain):
            if key not in order:
                if len(recency) == capacity:
                    leaves = [k for k in recency if not {2 * k, 2 * k + 1} & set(recency) and k not in chain]
                    assert order.victim(frozenset(chain)) == (leaves[0] if leaves else None)
                    if not leaves:
                        break
                    recency.remove(leaves[0])
                    order.remove(leaves[0], evicted=True)
                order.insert(key, chain[depth - 1] if depth else None)
                recency.append(key)
        order.touch(chain, used)
        for key in reversed(chain):
            if key in recency:
                recency.remove(key)
                recency.append(key)


@settings(max_examples=100, deadline=None)
@given(requests=requests, capacity=st.integers(2, 20))
def test_credit_ranks_no_page_above_its_parent(requests: list[tuple[int, bool]], capacity: int) -> None:
    tier = Tier(Credit(capacity))
    for now, (name, _) in enumerate(requests):
        chain = ancestors(name)
        tier.write(chain, tier.lookup(chain), now)
        pages = tier.order.pages
        assert all(page.parent is None or page.rank < pages[page.parent].rank for page in pages.values())


def test_credit_keeps_what_was_used_twice_over_what_is_newer() -> None:
    tier = Tier(Credit(4))
    for name in (2, 2, 2, 2, 3, 5):
        tier.write([name], tier.lookup([name]), 0)
    for name in (11, 12, 13):
        tier.write([name], tier.lookup([name]), 0)
    assert 2 in tier.order
    for name in range(20, 40):  # and nothing stays for ever
        tier.write([name], tier.lookup([name]), 0)
    assert 2 not in tier.order


def test_s3fifo_moves_to_main_after_two_visits_and_back_from_the_ghosts() -> None:
    tier = Tier(S3Fifo(10))
    tier.write([1], 0, 0)
    assert tier.lookup([1]) + tier.lookup([1]) == 2
    for name in range(10, 40):
        tier.write([name], 0, 0)
    assert 1 in tier.order, "main: the scan went through small"
    assert 25 not in tier.order
    tier.write([25], 0, 0)
    assert tier.order.pages[25].queue == 1, "a ghost's place is main"


def test_second_hit_asks_only_a_full_tier_and_lets_the_second_offer_of_a_chain_in() -> None:
    tier = Tier(Lru(3), SecondHit(100))
    tier.write([1, 2, 4], 0, 0)
    assert tier.written == 3
    chain = [3, 7, 15]
    tier.write(chain, 0, 1)
    assert tier.rejected == {"second_hit": 3}
    tier.write(chain, 0, 2)
    assert tier.lookup(chain) == 3


def test_a_page_whose_parent_was_refused_is_refused() -> None:
    tier = Tier(Lru(2), SecondHit(100))
    tier.write([1, 2], 0, 0)
    tier.write([4], 0, 0)  # known alone, before its parent
    tier.write([3, 4], 0, 1)
    assert tier.rejected == {"second_hit": 2, "unreachable": 1}


def test_a_chain_longer_than_the_tier_keeps_its_head() -> None:
    tier = Tier(Lru(3))
    tier.write([1, 2, 4, 8, 16], 0, 0)
    assert sorted(tier.order.pages) == [1, 2, 4]
    assert tier.rejected == {"no_room": 1, "unreachable": 1}


def test_write_budget_is_a_token_bucket() -> None:
    budget = WriteBudget(per_day=86_400, burst=2)
    assert [budget.admit(0, 1, 0.0) for _ in range(3)] == [True, True, False]
    assert budget.admit(0, 1, 1.0)
    assert not budget.admit(0, 1, 0.0), "a clock that goes back earns nothing"
    assert not budget.admit(0, 1, 1.0), "nor does the same second count twice"
    assert [budget.admit(0, 1, 1000.0) for _ in range(3)] == [True, True, False]


def test_removed_pages_are_counted_apart_and_leave_no_ghost() -> None:
    tier = Tier(Credit(4))
    tier.write([1, 2], 0, 0)
    tier.remove(2)
    tier.remove(2)
    assert tier.evicted == {"removed": 1}
    assert len(tier.order.ghosts) == 0


def test_ghosts_forget_the_oldest() -> None:
    ghosts = Ghosts(2)
    for key in (1, 2, 1, 3):
        ghosts.add(key, key * 10)
    assert [ghosts.take(key) for key in (2, 1, 1, 3)] == [0, 10, 0, 30]

"""The ten rules: a stream that keeps them passes, and each way to break one is named by its number."""

from __future__ import annotations

import pytest

from hicache_ext.events.check import RULES, Checker, Rule
from hicache_ext.events.model import (
    AllBlocksCleared,
    AnyEvent,
    BlockRemoved,
    BlockStored,
    Decoded,
    EventBatch,
    Medium,
    decode,
)
from hicache_ext.events.subscriber import Received
from hicache_ext.events.view import View


def chain(hashes: list[int], parent: int | None, medium: str | None, size: int = 2) -> BlockStored:
    return BlockStored(hashes, parent, [7] * size * len(hashes), size, None, medium)


GOOD: list[AnyEvent] = [
    AllBlocksCleared(),
    chain([1, 2, 3], None, "GPU"),
    chain([4], 3, None),
    chain([1, 2], None, "DISK"),
    chain([12], 11, "DISK"),  # below the device a child may come first
    chain([11], 2, "DISK"),
    chain([5], 2, "EXTERNAL"),
    BlockRemoved([4]),
    BlockRemoved([3, 2], "GPU"),
    BlockRemoved([1], "DISK"),
    chain([1], None, "DISK"),
    AllBlocksCleared(),
    chain([1, 2, 3], None, "GPU"),
]


def judge(events: list[AnyEvent], problems: tuple[str, ...] = (), **how: int) -> list[Rule]:
    checker = Checker()
    found = []
    for number, event in enumerate(events):
        last = number == len(events) - 1
        decoded = Decoded(EventBatch(0.0, [event], 0), problems if last else ())
        found += checker.feed(Received(number + 5, b"", decoded, **(how if last else {})))  # type: ignore[arg-type]
    return [violation.rule for violation in found]


def test_a_stream_that_keeps_all_rules() -> None:
    assert judge(GOOD) == []
    assert set(RULES) == set(Rule)


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (BlockRemoved([11]), Rule.REMOVAL_NAMES_MEDIUM),
        (chain([11], 2, "DISK"), Rule.CHANGES_ONLY),
        (BlockRemoved([999], "DISK"), Rule.CHANGES_ONLY),
        (chain([50], 49, "GPU"), Rule.DEVICE_PARENT_KNOWN),
        (BlockRemoved([2], "GPU"), Rule.DEVICE_REMOVES_ENDS),
        (chain([50], None, "TAPE"), Rule.WELL_FORMED),
        (BlockRemoved([1], "disk"), Rule.WELL_FORMED),
        (chain([50], 3, "DISK", size=4), Rule.WHOLE_BLOCKS),
        (chain([50, 50], 3, "DISK"), Rule.WHOLE_BLOCKS),
        (BlockStored([50], 3, [7], 2, None, "DISK"), Rule.WHOLE_BLOCKS),
        (BlockStored([], 3, [], 2, None, "DISK"), Rule.WHOLE_BLOCKS),
    ],
    ids=str,
)
def test_each_rule_can_be_broken(bad: AnyEvent, rule: Rule) -> None:
    assert judge([*GOOD[:7], bad])[:1] == [rule]


def test_rules_of_batches() -> None:
    assert judge(GOOD, ("event 0 is of the unknown type 'X'",)) == [Rule.WELL_FORMED]
    assert judge([*GOOD, AllBlocksCleared()], stale=True) == [Rule.NUMBERS_GROW]
    assert judge([*GOOD, AllBlocksCleared()], missed=3) == [Rule.REPLAY]
    assert judge([*GOOD[:11], AllBlocksCleared(), BlockRemoved([11], "DISK")]) == [Rule.CLEARED_IS_CLEARED]


def test_who_came_late_is_no_judge_of_removals() -> None:
    assert judge([BlockRemoved([1], "DISK")]) == []


def test_ranks_are_apart() -> None:
    checker = Checker()
    for number, rank in enumerate((0, 1)):
        assert not checker.feed(Received(number, b"", Decoded(EventBatch(0.0, [chain([1], None, "DISK")], rank))))
    assert not checker.feed(Received(2, b"", Decoded(EventBatch(0.0, [AllBlocksCleared()], 1))))
    assert [view.held() for view in checker.views.values()] == [{Medium.DISK: {1}}, {}]


def test_a_damaged_payload_is_a_violation() -> None:
    assert [violation.rule for violation in Checker().feed(Received(0, b"", decode(b"\xc1")))] == [Rule.WELL_FORMED]


def test_copies_that_no_query_comes_to() -> None:
    view = View()
    view.apply(chain([1], None, "EXTERNAL"))
    view.apply(chain([2], 1, "DISK"))
    assert view.unreachable() == 1
    assert view.reach([1, 2]) == {Medium.DEVICE: 0, Medium.HOST: 0, Medium.DISK: 0, Medium.EXTERNAL: 1}
    view.apply(chain([1], None, "GPU"))
    assert view.unreachable() == 0
    assert view.reach([1, 2]) == {Medium.DEVICE: 1, Medium.HOST: 1, Medium.DISK: 2, Medium.EXTERNAL: 2}

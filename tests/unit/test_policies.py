"""Tables of cases for the prefix and hit policies, each beside a plain loop that says what it means."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hicache_ext.store import policies


def flags(bits: str) -> np.ndarray:
    return np.array([bit == "1" for bit in bits], dtype=bool)


ALL = ["".join(bits) for n in range(7) for bits in itertools.product("01", repeat=n)]


@pytest.mark.parametrize(
    ("present", "length"),
    [("", 0), ("0", 0), ("1", 1), ("10", 1), ("01", 0), ("1101", 2), ("1111", 4)],
)
def test_prefix_length(present: str, length: int) -> None:
    assert policies.prefix_length(flags(present)) == length


@pytest.mark.parametrize("present", ALL)
def test_usable_full_is_a_prefix(present: str) -> None:
    expected = [all(bit == "1" for bit in present[: n + 1]) for n in range(len(present))]
    assert policies.usable_full(flags(present)).tolist() == expected


@pytest.mark.parametrize(
    ("present", "window", "usable"),
    [
        ("00001", 1, [5]),  # a state only at the end
        ("10101", 1, [1, 3, 5]),  # one state per stored boundary
        ("00011", 2, [5]),  # the window must be whole
        ("01111", 2, [3, 4, 5]),
        ("11", 4, [1, 2]),  # a prefix shorter than the window needs all of it
        ("01", 4, []),
        ("", 3, []),
    ],
)
def test_usable_trailing(present: str, window: int, usable: list[int]) -> None:
    assert (np.flatnonzero(policies.usable_trailing(flags(present), window)) + 1).tolist() == usable


@pytest.mark.parametrize("present", ALL)
@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_usable_trailing_against_the_plain_loop(present: str, window: int) -> None:
    expected = [all(present[i] == "1" for i in range(max(0, n - window), n)) for n in range(1, len(present) + 1)]
    assert policies.usable_trailing(flags(present), window).tolist() == expected


@pytest.mark.parametrize(
    ("present", "block", "group", "pages"),
    [("", 4, 2, 0), ("11", 4, 2, 4), ("111", 4, 2, 4), ("1111", 4, 2, 8), ("1011", 4, 2, 0), ("111", 1, 1, 3)],
)
def test_block_group_pages(present: str, block: int, group: int, pages: int) -> None:
    assert policies.block_group_pages(flags(present), block, group) == pages


@pytest.mark.parametrize(
    ("kv", "others", "lengths"),
    [
        ("111", [], [1, 2, 3]),
        ("110", ["111"], [1, 2]),
        ("111", ["101"], [1, 3]),
        ("111", ["101", "011"], [3]),
        ("111", ["100", "001"], []),
        ("111", ["10"], [1]),  # a pool that answered for fewer pages serves no more
        ("", ["1"], []),
        ("0", ["1"], []),
    ],
)
def test_usable_lengths(kv: str, others: list[str], lengths: list[int]) -> None:
    assert policies.usable_lengths(flags(kv), [flags(other) for other in others]) == lengths


def test_usable_lengths_leaves_its_arguments_alone() -> None:
    kv = flags("111")
    policies.usable_lengths(kv, [flags("100")])
    assert kv.all()


@pytest.mark.parametrize(("usable", "length"), [("", 0), ("00", 0), ("10", 1), ("101", 3)])
def test_longest(usable: str, length: int) -> None:
    assert policies.longest(flags(usable)) == length


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_a_programming_error(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        policies.usable_trailing(flags("1"), window)

"""Prefix and hit policies: pure functions over what a lookup found.

Belongs here: from "which pages are there" to "how many pages of the prefix can be used". Does not belong here: asking
anybody (TieredStore.lookup), or an engine's names for these policies (adapters).

Every `present` is a boolean array with one entry per page (or per key) in prefix order. A *length* is a number of
pages from the start; a set of usable lengths is a boolean array `usable` of n entries in which usable[i] stands for
length i + 1 (length 0 is always usable).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]


def prefix_length(present: Flags) -> int:
    """Pages from the start without a gap."""
    return len(present) if present.all() else int(np.argmin(present))


def usable_full(present: Flags) -> Flags:
    """Lengths whose every page is present (attention KV, indexers)."""
    return np.logical_and.accumulate(present) if len(present) else present


def usable_trailing(present: Flags, window: int) -> Flags:
    """Lengths whose last `window` pages are present, or all of them where the prefix is shorter.

    Such lengths have gaps: a sliding window or a recurrent state is stored only where a stored prefix ended, so 5
    pages can be restorable while 4 and 3 are not.
    """
    if window < 1:
        raise ValueError(f"a trailing window has at least one page, got {window}")
    if not len(present):
        return present
    # run[i]: how many pages up to and with page i are present without a gap.
    index = np.arange(len(present))
    last_gap = np.maximum.accumulate(np.where(present, -1, index))
    run = index - last_gap
    return run >= np.minimum(index + 1, window)


def block_group_pages(present: Flags, block_pages: int, group_pages: int) -> int:
    """Pages that the leading complete groups cover: `group_pages` keys make a group of `block_pages` pages."""
    if block_pages < 1 or group_pages < 1:
        raise ValueError(f"blocks and groups have at least one page, got {block_pages} and {group_pages}")
    return prefix_length(present) // group_pages * block_pages


def usable_lengths(kv: Flags, others: Iterable[Flags]) -> list[int]:
    """Lengths, ascending, that every pool can serve. Pools whose answer is shorter serve no more than it says."""
    usable = usable_full(kv).copy()
    for other in others:
        usable[len(other) :] = False
        np.logical_and(usable[: len(other)], other[: len(usable)], out=usable[: len(other)])
    return (np.flatnonzero(usable) + 1).tolist()


def longest(usable: Flags) -> int:
    """The longest usable length, 0 if there is none."""
    found = np.flatnonzero(usable)
    return int(found[-1]) + 1 if len(found) else 0

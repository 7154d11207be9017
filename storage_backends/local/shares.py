"""How the writers of a directory part its capacity: by use, slowly, and the same in every process.

Belongs here: the rule, as a pure function of what the writers' `use` files say. Does not belong here: those files
(use.py), or making and giving up extents (room.py): a writer grows only into room that is free in fact, so that
two processes that looked at different moments never overbook the disk by this arithmetic.

    1. Every living writer keeps a floor: a tenth of the equal share, at least one extent.
    2. The rest goes by demand: bytes hit lately, and bytes stored lately at a quarter, for who only stores has yet to
       show that anybody comes back.
    3. A writer that does not want more is content with what it holds; what it leaves goes to those who want more.
    4. A writer gives up room only when somebody else wants it, only what it holds beyond its part by more than a slack,
       and at most one step at a time: extents must not go back and forth with every burst.
    5. Room that nobody holds is open to all who want more (to all, when nobody does), as their parts lack it.
    6. A capacity that was lowered comes first: what is held beyond it goes without slack or step.
    7. Pinned pages stay whatever the others want: their room is nobody's to share.
    8. A writer whose file is torn, strange or not yet there counts as average and as wanting more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

MIN_EXTENT = 4 << 20
_FLOOR = 10
_SLACK = 8
_STEP = 32
_HIT_WEIGHT = 4


@dataclass(frozen=True)
class Use:
    """One writer. held: bytes of its extents on disk. hit, stored: bytes lately (aged sums, use.py).

    wants_more: it evicted or refused pages lately for want of room. hit is None where the writer did not say.
    pinned: bytes of `held` that it may not give up.
    """

    held: int
    hit: int | None = None
    stored: int = 0
    wants_more: bool = True
    pinned: int = 0

    @property
    def demand(self) -> int | None:
        return None if self.hit is None else _HIT_WEIGHT * self.hit + self.stored


def shares(capacity: int, uses: Mapping[int, Use], smallest: int = MIN_EXTENT) -> dict[int, int]:
    """Bytes of disk that each writer may hold now, together at most `capacity` (or what is pinned, where that is more).

    capacity: bytes for these writers together. uses: by the writer's number. smallest: bytes of the smallest extent.
    """
    pinned = {w: min(use.pinned, use.held) for w, use in uses.items()}
    loose = {w: replace(use, held=max(0, use.held - pinned[w])) for w, use in uses.items()}
    parts = _parts(max(0, capacity - sum(pinned.values())), loose, smallest) if uses else {}
    return {w: parts[w] + pinned[w] for w in uses}


def _parts(capacity: int, uses: Mapping[int, Use], smallest: int) -> dict[int, int]:
    writers = sorted(uses)
    equal = capacity // len(writers)
    floor = min(equal, max(smallest, equal // _FLOOR))
    targets = _targets(capacity, uses, writers, floor)
    slack, step = equal // _SLACK, max(smallest, capacity // _STEP)
    held = {writer: uses[writer].held for writer in writers}
    overbooked = sum(held.values()) > capacity
    wanted = {w for w in writers if uses[w].wants_more and held[w] < targets[w]}
    parts = {}
    for writer in writers:
        over = held[writer] - targets[writer]
        if over <= 0:
            parts[writer] = max(floor, held[writer])
        elif overbooked:
            parts[writer] = targets[writer]
        elif over > slack and wanted - {writer}:
            parts[writer] = max(targets[writer], held[writer] - step)
        else:
            parts[writer] = held[writer]
    over = sum(parts.values()) - capacity
    if over > 0:  # floors of those who hold less than theirs come out of what others hold beyond their targets
        parts = _cut(parts, targets, over)
    open_room = capacity - sum(parts.values())
    takers = [w for w in writers if uses[w].wants_more] or writers
    lacks = {w: max(0, targets[w] - parts[w]) for w in takers}
    for writer, more in _divide(open_room, lacks).items():
        parts[writer] += more
    return parts


def _targets(capacity: int, uses: Mapping[int, Use], writers: list[int], floor: int) -> dict[int, int]:
    """Where the parts should end up: floors, then by demand, each at most what it can use."""
    told = [demand for use in uses.values() if (demand := use.demand) is not None]
    average = sum(told) // len(told) if told else 1
    weights = {w: average if (demand := uses[w].demand) is None else demand for w in writers}
    targets = dict.fromkeys(writers, floor)
    rest = capacity - floor * len(writers)
    content = {w: max(0, uses[w].held - floor) for w in writers if not uses[w].wants_more}
    # Those whose part by demand is more than they can use are served first and leave the rest to the others.
    hungry = set(writers)
    while True:
        parts = _divide(rest, {w: weights[w] for w in sorted(hungry)})
        served = {w for w in hungry if w in content and content[w] <= parts[w]}
        for writer in served:
            targets[writer] += content[writer]
            rest -= content[writer]
        hungry -= served
        if not served or not hungry:
            break
    for writer in hungry:
        targets[writer] += parts[writer]
    return targets


def _divide(amount: int, weights: Mapping[int, int]) -> dict[int, int]:
    """Whole parts of `amount` by weight, rounded down; equal ones where nobody has any."""
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1)
    total = sum(weights.values())
    return {w: amount * weight // total for w, weight in weights.items()}


def _cut(parts: dict[int, int], targets: Mapping[int, int], over: int) -> dict[int, int]:
    surplus = {w: max(0, parts[w] - targets[w]) for w in parts}
    total = sum(surplus.values())
    return {w: parts[w] - -(-over * surplus[w] // total) for w in parts} if total else parts

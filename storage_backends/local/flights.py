"""Beginning the transfers of one batch on several disks.

Belongs here: that a disk which holds all of its memory in flight keeps no other waiting. Does not belong here: what a
transfer is (reads.py, writes.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from storage_backends.local.disk import Disk

_PATIENCE = 0.05


class Part(Protocol):
    """What of a batch goes to or comes from one disk."""

    @property
    def disk(self) -> Disk: ...


P = TypeVar("P", bound=Part)


def begin_all(
    parts: Iterable[P], begin: Callable[[P, float | None], P | None], abandon: Callable[[P], None], several: bool
) -> None:
    """Begin every part; those for which there is no memory wait their turn.

    begin: given a part and for how long it may wait for memory (seconds; None: for ever), gives what is left of it, and
    the part itself when nothing began. abandon: given what is left when the disk went out of use meanwhile.
    """
    waiting = deque((part, False) for part in parts)
    while waiting:
        part, tried = waiting.popleft()
        if part.disk.out:
            abandon(part)
            continue
        rest = begin(part, (_PATIENCE if tried else 0.0) if several else None)
        if rest is not None:
            waiting.append((rest, rest is part))

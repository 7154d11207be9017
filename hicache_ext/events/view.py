"""What a router believes after the events that it was given.

Belongs here: the meaning of events, by the rules that Dynamo's indexer keeps. Does not belong here: judging them
(check.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache_ext.events.model import AnyEvent, BlockRemoved, BlockStored, Medium

#: A query goes down these, each going on where the one before stopped; never up again.
ORDER = (Medium.DEVICE, Medium.HOST, Medium.DISK, Medium.EXTERNAL)


class View:
    """Blocks by medium, of one data-parallel rank. media: medium -> hash -> hash of the block before (None: first)."""

    def __init__(self) -> None:
        self.media: dict[Medium, dict[int, int | None]] = {medium: {} for medium in ORDER}

    def apply(self, event: AnyEvent) -> None:
        """No reference counts: a block is in a medium or not. A medium that nobody knows changes nothing."""
        if isinstance(event, BlockStored):
            medium = Medium.of(event.medium)
            if medium is None:
                return
            before = event.parent_block_hash
            for block in event.block_hashes:
                self.media[medium][block] = before
                before = block
        elif isinstance(event, BlockRemoved):
            medium = Medium.of(event.medium)
            if medium is not None:
                for block in event.block_hashes:
                    self.media[medium].pop(block, None)
        else:
            for blocks in self.media.values():
                blocks.clear()

    def held(self) -> dict[Medium, set[int]]:
        """The blocks of each medium that has any."""
        return {medium: set(blocks) for medium, blocks in self.media.items() if blocks}

    def reach(self, chain: Sequence[int]) -> dict[Medium, int]:
        """How many blocks of this chain a query finds down to and including each medium: never fewer than above."""
        at = 0
        found = {}
        for medium in ORDER:
            while at < len(chain) and chain[at] in self.media[medium]:
                at += 1
            found[medium] = at
        return found

    def unreachable(self) -> int:
        """Copies that no query comes to: with nothing before them in their medium or in one above it."""
        reached: set[int] = set()
        lost = 0
        for medium in ORDER:
            blocks = self.media[medium]
            below: dict[int, list[int]] = {}
            ends = []
            for block, before in blocks.items():
                if before is None or before in reached:
                    ends.append(block)
                else:
                    below.setdefault(before, []).append(block)
            here: set[int] = set()
            while ends:
                block = ends.pop()
                if block not in here:
                    here.add(block)
                    ends += below.get(block, ())
            lost += len(blocks) - len(here)
            reached |= here
        return lost

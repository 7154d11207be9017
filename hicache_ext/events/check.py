"""The rules that an event stream must keep, as a check over one that passes by.

Belongs here: judging batches, one after the other, without sockets or clocks. Does not belong here: receiving them
(subscriber.py), what they mean to a router (view.py).

The rules are those of Dynamo's indexer 1.6, the strictest reader known; their numbers are part of the interface.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from hicache_ext.events.model import AllBlocksCleared, AnyEvent, BlockRemoved, BlockStored, Medium
from hicache_ext.events.subscriber import Received
from hicache_ext.events.view import View


class Rule(IntEnum):
    """What readers ask of a stream."""

    REACHABLE = 1
    REMOVAL_NAMES_MEDIUM = 2
    CHANGES_ONLY = 3
    DEVICE_PARENT_KNOWN = 4
    DEVICE_REMOVES_ENDS = 5
    WELL_FORMED = 6
    WHOLE_BLOCKS = 7
    CLEARED_IS_CLEARED = 8
    NUMBERS_GROW = 9
    REPLAY = 10


RULES = {
    Rule.REACHABLE: "a query goes device, host, disk, external, and never back up: other copies are not found",
    Rule.REMOVAL_NAMES_MEDIUM: "a removal names its medium: without one it is the device's",
    Rule.CHANGES_ONLY: "stores and removals are changes: nobody counts, two stores and a removal leave nothing",
    Rule.DEVICE_PARENT_KNOWN: "a device block comes after its parent: else it is dropped",
    Rule.DEVICE_REMOVES_ENDS: "a device block goes after its children: else they are not found any more",
    Rule.WELL_FORMED: "every event is of a known type, medium and shape: one that is not costs its batch",
    Rule.WHOLE_BLOCKS: "blocks are of the stream's size, with all their tokens, none twice: else they are dropped",
    Rule.CLEARED_IS_CLEARED: "AllBlocksCleared empties every medium of its data-parallel rank: nothing outlives it",
    Rule.NUMBERS_GROW: "sequence numbers grow, over restarts too: what is not higher is dropped",
    Rule.REPLAY: "what was missed can be asked for: else who comes late, or is slow, never knows",
}


@dataclass(frozen=True)
class Violation:
    """number: of the batch. event: in it; None: of the batch as a whole."""

    rule: Rule
    number: int
    event: int | None
    text: str

    def __str__(self) -> str:
        where = f"batch {self.number}" + ("" if self.event is None else f", event {self.event}")
        return f"rule {int(self.rule)}, {where}: {self.text}"


class Checker:
    """Judges a stream as it comes. view: what a reader believes so far, of the rank that came last.

    block_size: of the stream; 0: that of the first store. Rule 1 is of what is resident, which no event can break: see
    View.unreachable.
    """

    def __init__(self, block_size: int = 0) -> None:
        self.views: dict[int | None, View] = {}
        self.block_size = block_size
        self.batches = self.events = self.blocks = 0
        self._known: set[int | None] = set()  # ranks of which all is known
        self._cleared: dict[int | None, set[tuple[Medium, int]]] = {}
        self._children: dict[int | None, dict[int, set[int]]] = {}  # on the device

    def feed(self, got: Received) -> list[Violation]:
        """What this batch breaks, the first thing first."""
        found: list[Violation] = []
        number, batch = got.number, got.decoded.batch
        self.batches += 1
        if got.stale:
            found.append(Violation(Rule.NUMBERS_GROW, number, None, "not higher than a number before it"))
        if got.missed:
            found.append(Violation(Rule.REPLAY, number, None, f"{got.missed} batches before it cannot be had any more"))
            self._known.discard(batch.dp_rank)
        if number == 0 and not got.stale:
            self._known.add(batch.dp_rank)
        found += [Violation(Rule.WELL_FORMED, number, None, problem) for problem in got.decoded.problems]
        view = self.views.setdefault(batch.dp_rank, View())
        for at, event in enumerate(batch.events):
            self.events += 1
            found += [Violation(rule, number, at, text) for rule, text in self._judge(event, view, batch.dp_rank)]
            if isinstance(event, AllBlocksCleared):
                self._known.add(batch.dp_rank)
                self._cleared[batch.dp_rank] = {
                    (medium, block) for medium, blocks in view.media.items() for block in blocks
                }
            elif isinstance(event, BlockStored):
                medium = Medium.of(event.medium)
                gone = self._cleared.get(batch.dp_rank)
                if gone and medium is not None:
                    gone.difference_update((medium, block) for block in event.block_hashes)
            self._adopt(event, batch.dp_rank)
            view.apply(event)
        return found

    def _adopt(self, event: AnyEvent, rank: int | None) -> None:
        """Keep the device's families."""
        children = self._children.setdefault(rank, {})
        if isinstance(event, AllBlocksCleared):
            children.clear()
        elif Medium.of(event.medium) is not Medium.DEVICE:
            return
        elif isinstance(event, BlockStored):
            parent = event.parent_block_hash
            for block in event.block_hashes:
                if parent is not None:
                    children.setdefault(parent, set()).add(block)
                parent = block
        else:
            held = self.views[rank].media[Medium.DEVICE]
            for block in event.block_hashes:
                parent = held.get(block)
                if parent is not None and parent in children:
                    children[parent].discard(block)
                    if not children[parent]:
                        del children[parent]

    def _judge(self, event: AnyEvent, view: View, rank: int | None) -> Iterable[tuple[Rule, str]]:
        if isinstance(event, AllBlocksCleared):
            return
        self.blocks += len(event.block_hashes)
        medium = Medium.of(event.medium)
        if medium is None:
            yield Rule.WELL_FORMED, f"nobody knows the medium {event.medium!r}"
            return
        if isinstance(event, BlockStored):
            yield from self._judge_store(event, medium, view)
        else:
            yield from self._judge_removal(event, medium, view, rank)

    def _judge_store(self, event: BlockStored, medium: Medium, view: View) -> Iterable[tuple[Rule, str]]:
        hashes = event.block_hashes
        self.block_size = self.block_size or event.block_size
        if event.block_size != self.block_size:
            yield Rule.WHOLE_BLOCKS, f"blocks of {event.block_size} tokens where others have {self.block_size}"
        if len(event.token_ids) != len(hashes) * event.block_size:
            yield (
                Rule.WHOLE_BLOCKS,
                f"{len(event.token_ids)} tokens for {len(hashes)} blocks of {event.block_size}",
            )
        if not hashes:
            yield Rule.WHOLE_BLOCKS, "a store of nothing"
        if len(set(hashes)) != len(hashes) or event.parent_block_hash in hashes:
            yield Rule.WHOLE_BLOCKS, "a block twice in one chain"
        held = view.media[medium]
        again = [block for block in hashes if block in held]
        if again:
            yield Rule.CHANGES_ONLY, f"{_some(again)} stored in {medium} already"
        parent = event.parent_block_hash
        if medium is Medium.DEVICE and parent is not None and parent not in held:
            yield Rule.DEVICE_PARENT_KNOWN, f"its parent {parent} is not on the device"

    def _judge_removal(
        self, event: BlockRemoved, medium: Medium, view: View, rank: int | None
    ) -> Iterable[tuple[Rule, str]]:
        held = view.media[medium]
        absent = [block for block in event.block_hashes if block not in held]
        if event.medium is None and (
            elsewhere := [block for block in absent if any(block in blocks for blocks in view.media.values())]
        ):
            yield Rule.REMOVAL_NAMES_MEDIUM, f"{_some(elsewhere)} is not on the device, and no medium is named"
        elif absent and rank in self._known:
            outlived = self._cleared.get(rank, set()) & {(medium, block) for block in absent}
            if outlived:
                yield Rule.CLEARED_IS_CLEARED, f"{_some([block for _, block in outlived])} went with AllBlocksCleared"
            else:
                yield Rule.CHANGES_ONLY, f"{_some(absent)} is not in {medium}"
        if medium is Medium.DEVICE:
            going, children = set(event.block_hashes), self._children.get(rank, {})
            left = [child for block in event.block_hashes for child in children.get(block, ()) if child not in going]
            if left:
                yield Rule.DEVICE_REMOVES_ENDS, f"{_some(left)} is left without its parent on the device"


def _some(blocks: list[int]) -> str:
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} and {len(blocks) - 1} more"

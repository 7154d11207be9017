"""Blocks to events: as few `BlockStored` as chains of blocks fit in.

Belongs here: what makes one event of several blocks. Does not belong here: which blocks are said, and when
(announcer.py).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from hicache_ext.events.model import AnyEvent, BlockStored, CostedBlockStored, LoadCost, Medium
from storage_backends.base import Notes

#: Blocks of one BlockStored.
CHAIN = 128


class Page(Protocol):
    """hash, parent: of the event; parent 0: it begins a prompt. tokens: u32le. salt, lora: "" = none."""

    hash: int
    parent: int
    tokens: bytes
    salt: str
    lora: str


class Chains:
    """Takes blocks in the order in which they are to be said. events: what says it. blocks: how many."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.blocks = 0
        self._last: BlockStored | None = None
        self._cost: LoadCost | None = None

    def add(self, medium: Medium, page: Page, cost: LoadCost | None = None) -> None:
        tokens = np.frombuffer(page.tokens, "<u4").tolist()
        last = self._last
        self.blocks += 1
        if (
            last is not None
            and last.block_hashes[-1] == page.parent
            and len(last.block_hashes) < CHAIN
            and (last.medium, last.cache_salt or "", last.lora_name or "", last.block_size, self._cost)
            == (medium.value, page.salt, page.lora, len(tokens), cost)
            and page.hash not in last.block_hashes
        ):
            last.block_hashes.append(page.hash)
            last.token_ids.extend(tokens)
            return
        fields: dict[str, Any] = {
            "block_hashes": [page.hash], "parent_block_hash": page.parent or None, "token_ids": tokens,
            "block_size": len(tokens), "lora_id": None, "medium": medium.value, "cache_salt": page.salt or None,
            "lora_name": page.lora or None,
        }  # fmt: skip
        self._last = BlockStored(**fields) if cost is None else CostedBlockStored(**fields, load_cost=cost)
        self._cost = cost
        self.events.append(self._last)


def rows(notes: Notes, count: int) -> tuple[list[int], list[int], list[bytes]]:
    """Hashes, parents' hashes and tokens, of each page."""
    if len(notes.hashes) != count or len(notes.tokens) != count:
        raise ValueError(f"notes of {len(notes.hashes)} pages for {count}")
    hashes: list[int] = notes.hashes[:, 0].tolist()
    parents: list[int] = notes.hashes[:, 1].tolist()
    width = 4 * notes.tokens.shape[1]
    flat = np.ascontiguousarray(notes.tokens, "<u4").tobytes()
    return hashes, parents, [flat[i * width : (i + 1) * width] for i in range(count)]

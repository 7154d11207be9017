"""Pages of a request and the blocks that they lie in: what is loaded or saved together.

Belongs here: the one noun that scheduler and worker share. Does not belong here: how it travels (metadata).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hicache_ext.page import KEY_BYTES
from storage_backends.base import Notes

#: In a block table: there is none here, its tokens have left the window.
NO_BLOCK = 0


@dataclass(frozen=True)
class Pages:
    """Pages of one request, a run of its chain. keys: n x 32 bytes. parent: the page before, empty where there is none.

    blocks: numbers of the blocks that the pages' tokens lie in. skip: tokens of the first block before the first page.
    lead: tokens of the first page that are in their blocks already, when pages are to be loaded. Both are 0 where a
    page is a block. notes: what KV events say of pages that are to be saved. group: of vLLM's groups of blocks.
    """

    request: str
    keys: bytes
    parent: bytes
    blocks: tuple[int, ...]
    skip: int = 0
    lead: int = 0
    notes: Notes | None = None
    group: int = 0

    @property
    def count(self) -> int:
        """Pages."""
        return len(self.keys) // KEY_BYTES


def blocks_under(
    blocks: Sequence[int], first: int, last: int, page_size: int, block_size: int
) -> tuple[tuple[int, ...], int]:
    """The blocks of this table that pages `first` to `last` lie in, and the tokens of the first one before them."""
    begin, end = first * page_size, last * page_size
    return tuple(blocks[begin // block_size : -(-end // block_size)]), begin % block_size


def parent_of(keys: bytes, page: int) -> bytes:
    """Of a page, by its number in a chain's packed keys: the key before it, empty for the first."""
    return keys[(page - 1) * KEY_BYTES : page * KEY_BYTES] if page else b""

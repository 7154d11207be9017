"""Pages of a request and the blocks that they lie in: what is loaded or saved together.

Belongs here: the one noun that scheduler and worker share. Does not belong here: how it travels (metadata).
"""

from __future__ import annotations

from dataclasses import dataclass

from hicache_ext.page import KEY_BYTES
from storage_backends.base import Notes


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

"""What moves pages between blocks and the store: one interface, for blocks in host memory and for those on a device.

Belongs here: the interface, and the way of host memory, where blocks are the store's own buffers. Does not belong here:
blocks on a device (device_moves), or what became of whose pages (worker).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from hicache_ext.page import Namespace
from hicache_ext.store import TieredStore
from hicache_ext.store.copies import CopyBudget
from hicache_ext.store.inject import FaultyStore
from hicache_ext.vllm.blocks import Blocks
from hicache_ext.vllm.pages import Pages
from hicache_ext.vllm.sharing import SharedBlocks
from storage_backends.base import Completion, Outcome, PageBatch

logger = logging.getLogger(__name__)

Loaded = Callable[[Sequence[int], bytes], None]
"""(blocks that did not get all of their bytes, an outcome for each page); on any thread, once."""
Saved = Callable[[int, bytes, int], None]
"""(group, outcomes of pages that were sent to the tiers, how many others will not be); on any thread, until all are
known."""


class Moves(Protocol):
    """Nothing here raises for a page that cannot be moved, or waits for a tier."""

    def load(self, pages: Pages, space: Namespace, deadline: float, loaded: Loaded) -> None:
        """Into the blocks, by `deadline` (time.monotonic() seconds)."""

    def save(self, pages: Sequence[Pages], spaces: Sequence[Namespace], saved: Saved) -> int:
        """Pages of any groups; spaces: of each group. How many are on their way, of which `saved` will tell."""

    def make_way(self, blocks: Sequence[int]) -> None:
        """The forward is about to write into these blocks."""

    def close(self) -> None:
        """Blocks are not touched any more when this returns."""


class HostMoves:
    """Loads have a deadline and go through memory of the store's own, so nothing is written into a block after the
    request was told. Saves are copied before the step ends, within a limit, so nothing reads a block that vLLM has
    given to somebody else; whatever finds no room is not stored."""

    def __init__(
        self, store: TieredStore | FaultyStore, blocks: Sequence[Blocks | SharedBlocks], save_bytes: int,
        count: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        """blocks: of each group. count: of a statistic by name."""
        self._store, self._blocks, self._count = store, tuple(blocks), count
        self._copies = CopyBudget(save_bytes)

    def load(self, pages: Pages, space: Namespace, deadline: float, loaded: Loaded) -> None:
        batch = None
        try:
            batch = self._blocks[pages.group].incoming(space, pages)
            if batch is None:
                sent = Completion.finished(pages.count, Outcome.REJECTED)
            else:
                sent = self._store.read(batch, deadline)
        except Exception:
            logger.exception("hicache_ext: a load could not be started; its pages are recomputed")
            sent = Completion.finished(pages.count, Outcome.FAILED)
        sent.on_done(partial(self._loaded, pages, batch, loaded))

    def _loaded(self, pages: Pages, batch: PageBatch | None, loaded: Loaded, done: Completion) -> None:
        bad: Sequence[int] = pages.blocks
        outcomes = bytes(done.outcomes)
        if batch is not None:
            try:
                bad = self._blocks[pages.group].arrived(pages, batch, outcomes)
            except Exception:
                logger.exception("hicache_ext: loaded pages could not be put into their blocks; they are recomputed")
                outcomes = bytes([Outcome.FAILED]) * pages.count
            self._blocks[pages.group].release(batch)
        loaded(bad, outcomes)

    def save(self, pages: Sequence[Pages], spaces: Sequence[Namespace], saved: Saved) -> int:
        since, sent = time.monotonic(), 0
        copies: dict[tuple[int, bool], list[PageBatch]] = {}
        for one in pages:
            try:
                copy = self._blocks[one.group].outgoing(spaces[one.group], one, self._copies)
            except Exception:
                logger.exception("hicache_ext: pages could not be stored")
                self._count("save_failed", one.count)
                continue
            if copy is None:
                self._count("save_no_room", one.count)
                continue
            if one.notes is not None:
                copy = replace(copy, tokens=one.notes.tokens, event_hashes=one.notes.hashes)
            copies.setdefault((one.group, one.notes is None), []).append(copy)
        self._count("save_copy_us", int((time.monotonic() - since) * 1e6))
        for (group, _), some in copies.items():
            # A batch costs the tiers nearly the same whatever its pages, but it has no page twice.
            if len({copy.key(page) for copy in some for page in range(len(copy))}) == sum(map(len, some)):
                sent += self._write(group, some, saved)
            else:
                sent += sum(self._write(group, [copy], saved) for copy in some)
        return sent

    def _write(self, group: int, copies: Sequence[PageBatch], saved: Saved) -> int:
        batch = copies[0] if len(copies) == 1 else _together(copies)

        def stored(done: Completion) -> None:
            for copy in copies:
                self._copies.give(copy)
            saved(group, bytes(done.outcomes), 0)

        try:
            done = self._store.write(batch)
        except Exception:
            logger.exception("hicache_ext: pages could not be stored")
            done = Completion.finished(len(batch), Outcome.FAILED)
        done.on_done(stored)
        return len(batch)

    def make_way(self, blocks: Sequence[int]) -> None:
        """Saves have read their blocks already."""

    def close(self) -> None:
        self._copies.close()


def _together(parts: Sequence[PageBatch]) -> PageBatch:
    """One batch of the pages of all of these: with notes of each, or of none."""
    buffers = np.concatenate([np.diff(part.offsets) for part in parts])
    tokens = [part.tokens for part in parts if part.tokens is not None]
    hashes = [part.event_hashes for part in parts if part.event_hashes is not None]
    return PageBatch(
        parts[0].namespace, b"".join(part.keys for part in parts), b"".join(part.parents or b"" for part in parts),
        np.concatenate([part.addresses for part in parts]), np.concatenate([part.lengths for part in parts]),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(buffers, dtype=np.int64)]), [part.owner for part in parts],
        np.concatenate(tokens) if tokens else None, np.concatenate(hashes) if hashes else None,
    )  # fmt: skip

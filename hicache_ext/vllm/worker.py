"""The worker's half: pages from the tiers into blocks, and from blocks into the tiers, beside the forward.

Belongs here: loads and saves of one worker, and what became of them. Does not belong here: which pages (scheduler), or
where blocks are (blocks).

A load has a deadline and goes through memory of the store's own, so nothing is written into a block after the request
was told. A save copies the blocks before the step ends, within a limit, so nothing reads a block that vLLM has given to
somebody else; whatever finds no room is not stored. Nothing here raises into the forward.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hicache_ext.page import Namespace
from hicache_ext.store import TieredStore
from hicache_ext.store.copies import CopyBudget
from hicache_ext.store.inject import FaultyStore
from hicache_ext.vllm.blocks import Blocks
from hicache_ext.vllm.identity import at_epoch
from hicache_ext.vllm.metadata import StepMetadata, WorkerReport
from hicache_ext.vllm.pages import Pages
from hicache_ext.vllm.settings import Settings
from hicache_ext.vllm.sharing import SharedBlocks
from storage_backends.base import CLOSE_SECONDS, Completion, Notes, Outcome, PageBatch, Residency

logger = logging.getLogger(__name__)

#: Longest wait of a step that computes nothing while loads are on their way: vLLM would ask again at once, and take
#: the processor that the loads need.
_IDLE_SECONDS = 0.002
#: Changes on servers that wait for the next step; older ones are forgotten, and what they say is not announced.
_CHANGES = 1 << 14


class WorkerHalf:
    """Called by vLLM's model runner, on its thread; completions come on the store's."""

    def __init__(
        self, settings: Settings, store: TieredStore | FaultyStore, blocks: Sequence[Blocks | SharedBlocks],
        spaces: Sequence[Namespace], writes: bool, reports: bool = False,
    ) -> None:  # fmt: skip
        """blocks, spaces: of each group. writes: whether this rank stores pages; several may hold the same bytes.

        reports: whether the scheduler wants to hear of pages on servers; where it is in this process it hears the store
        itself, and `report` says nothing.
        """
        self._settings, self._store, self._blocks, self._told = settings, store, tuple(blocks), tuple(spaces)
        self._spaces, self._epoch = self._told, ""
        self._writes = writes
        self._copies = CopyBudget(int(settings.options.save_bytes))
        self._cond = threading.Condition()
        self._loading: Counter[str] = Counter()  # by request: of several groups, several
        self._saving = 0
        self._arrived: set[str] = set()
        self._invalid: set[int] = set()
        self._failed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._changes: deque[tuple[int, Residency, bytes, bytes, Notes | None]] = deque(maxlen=_CHANGES)
        if reports:
            store.on_residency(self._heard)

    @property
    def spaces(self) -> tuple[Namespace, ...]:
        """Where the pages of each group are, before any reset."""
        return self._told

    # ---- loads

    def load(self, meta: StepMetadata) -> None:
        """Start the loads of this step."""
        self._follow(meta.epoch)
        deadline = time.monotonic() + self._settings.options.load_timeout
        with self._cond:
            self._loading.update(pages.request for pages in meta.loads)
        for pages in meta.loads:
            since = time.monotonic()
            batch = None
            try:
                batch = self._blocks[pages.group].incoming(self._spaces[pages.group], pages)
                if batch is None:
                    sent = Completion.finished(pages.count, Outcome.REJECTED)
                else:
                    sent = self._store.read(batch, deadline)
            except Exception:
                logger.exception("hicache_ext: a load could not be started; its pages are recomputed")
                sent = Completion.finished(pages.count, Outcome.FAILED)
            sent.on_done(partial(self._loaded, pages, batch, since))
        if meta.idle:
            with self._cond:
                if self._loading and not self._arrived:
                    self._cond.wait(_IDLE_SECONDS)

    def _loaded(self, pages: Pages, batch: PageBatch | None, since: float, done: Completion) -> None:
        bad: Sequence[int] = pages.blocks
        outcomes: bytes | bytearray = done.outcomes
        if batch is not None:
            try:
                bad = self._blocks[pages.group].arrived(pages, batch, outcomes)
            except Exception:
                logger.exception("hicache_ext: loaded pages could not be put into their blocks; they are recomputed")
                outcomes = bytes([Outcome.FAILED]) * pages.count
            self._blocks[pages.group].release(batch)
        with self._cond:
            self._invalid.update(bad)
            if bad:
                self._failed.add(pages.request)
            self._loading[pages.request] -= 1
            if not self._loading[pages.request]:
                del self._loading[pages.request]
                self._arrived.add(pages.request)
            self._account("load", outcomes, since)
            self._counts["load_bytes"] += outcomes.count(Outcome.HIT) * self._bytes(pages)
            self._cond.notify_all()

    def finished_loads(self) -> tuple[set[str], set[int], set[str]]:
        """Requests whose loads have ended since the last call, the blocks that did not arrive, and which of the
        requests miss some: together, since vLLM must know of bad blocks no later than of the end."""
        with self._cond:
            arrived, self._arrived = self._arrived, set()
            invalid, self._invalid = self._invalid, set()
            failed = self._failed & arrived
            self._failed -= failed
            return arrived, invalid, failed

    # ---- saves

    def save(self, meta: StepMetadata) -> None:
        """Copy this step's pages out of their blocks, and store the copies in the background."""
        self._follow(meta.epoch)
        if not self._writes:
            return
        for pages in meta.saves:
            try:
                self._save(pages)
            except Exception:
                logger.exception("hicache_ext: pages could not be stored")
                self._count("save_failed", pages.count)

    def _save(self, pages: Pages) -> None:
        since = time.monotonic()
        copy = self._blocks[pages.group].outgoing(self._spaces[pages.group], pages, self._copies)
        if copy is None:
            self._count("save_no_room", pages.count)
            return
        if pages.notes is not None:
            copy = replace(copy, tokens=pages.notes.tokens, event_hashes=pages.notes.hashes)
        with self._cond:
            self._saving += 1
            self._counts["save_copy_us"] += int((time.monotonic() - since) * 1e6)

        def stored(done: Completion) -> None:
            self._copies.give(copy)
            with self._cond:
                self._saving -= 1
                self._account("save", done.outcomes, since)
                self._counts["save_bytes"] += done.outcomes.count(Outcome.HIT) * self._bytes(pages)
                self._cond.notify_all()

        try:
            self._store.write(copy).on_done(stored)
        except Exception:
            stored(Completion.finished(len(copy), Outcome.FAILED))
            raise

    # ---- the rest

    def _heard(self, index: int, change: Residency, namespace: bytes, keys: bytes, notes: Notes | None) -> None:
        if not self._store.tiers[index].backend.capabilities.knows:
            self._changes.append((index, change, namespace, keys, notes))

    def report(self) -> WorkerReport | None:
        """What became of pages on servers since the last call; None for nothing."""
        changes = [self._changes.popleft() for _ in range(len(self._changes))]
        return WorkerReport(changes) if changes else None

    def counts(self) -> dict[str, int]:
        """What happened since the start, by name."""
        with self._cond:
            return dict(self._counts)

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call, by name."""
        with self._cond:
            taken = self._counts - self._taken
            self._taken = self._counts.copy()
            return dict(taken)

    def close(self) -> None:
        """Wait, not for ever, until nothing is on its way: blocks and copies are free then."""
        with self._cond:
            self._cond.wait_for(lambda: not (self._loading or self._saving), CLOSE_SECONDS)

    def _follow(self, epoch: str) -> None:
        if epoch != self._epoch:
            self._epoch, self._spaces = epoch, tuple(at_epoch(space, epoch) for space in self._told)

    def _bytes(self, pages: Pages) -> int:
        """Of one of these pages."""
        return self._told[pages.group].layout.payload_bytes

    def _count(self, name: str, number: int) -> None:
        with self._cond:
            self._counts[name] += number

    def _account(self, what: str, outcomes: bytes | bytearray, since: float) -> None:
        for outcome in Outcome:
            if number := outcomes.count(outcome):
                self._counts[f"{what}_{outcome.name.lower()}"] += number
        self._counts[f"{what}_us"] += int((time.monotonic() - since) * 1e6)
        self._counts[f"{what}_batches"] += 1

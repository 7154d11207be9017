"""The worker's half: pages from the tiers into blocks, and from blocks into the tiers, beside the forward.

Belongs here: loads and saves of one worker, and what became of them. Does not belong here: which pages (scheduler), or
how bytes move (moves, device_moves).

A load has a deadline, and nothing is written into a block after its request was told. Nothing reads a block any more
once somebody else writes into it. Nothing here raises into the forward.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

from hicache_ext.page import Namespace
from hicache_ext.store import TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.vllm.identity import at_epoch
from hicache_ext.vllm.metadata import StepMetadata, WorkerReport
from hicache_ext.vllm.moves import Moves
from hicache_ext.vllm.pages import Pages
from hicache_ext.vllm.settings import Settings
from storage_backends.base import CLOSE_SECONDS, Notes, Outcome, Residency

logger = logging.getLogger(__name__)

#: Longest wait of a step that computes nothing while loads are on their way: vLLM would ask again at once, and take
#: the processor that the loads need.
_IDLE_SECONDS = 0.002
#: Changes on servers that wait for the next step; older ones are forgotten, and what they say is not announced.
_CHANGES = 1 << 14

Count = Callable[[str, int], None]


class WorkerHalf:
    """Called by vLLM's model runner, on its thread; completions come on the store's."""

    def __init__(
        self, settings: Settings, store: TieredStore | FaultyStore, moves: Callable[[Count], Moves],
        spaces: Sequence[Namespace], writes: bool, reports: bool = False,
    ) -> None:  # fmt: skip
        """moves: made with where statistics are counted. spaces: of each group. writes: whether this rank stores pages;
        several may hold the same bytes.

        reports: whether the scheduler wants to hear of pages on servers; where it is in this process it hears the store
        itself, and `report` says nothing.
        """
        self._settings, self._store, self._told = settings, store, tuple(spaces)
        self._spaces, self._epoch = self._told, ""
        self._writes = writes
        self._cond = threading.Condition()
        self._loading: Counter[str] = Counter()  # by request: of several groups, several
        self._saving = 0
        self._arrived: set[str] = set()
        self._invalid: set[int] = set()
        self._failed: set[str] = set()
        self._counts: Counter[str] = Counter()  # until the last taking
        self._recent: Counter[str] = Counter()  # since then
        self._changes: deque[tuple[int, Residency, bytes, bytes, Notes | None]] = deque(maxlen=_CHANGES)
        self._moves = moves(self._count)
        if reports:
            store.on_residency(self._heard)

    @property
    def spaces(self) -> tuple[Namespace, ...]:
        """Where the pages of each group are, before any reset."""
        return self._told

    # ---- loads

    def load(self, meta: StepMetadata) -> None:
        """Start the loads of this step; of one that computes nothing the saves as well, since vLLM before 0.32 asks for
        nothing more then."""
        self._follow(meta.epoch)
        if meta.loads:
            self._begin(meta.loads)
        if meta.idle:
            self._save(meta)
            with self._cond:
                if self._loading and not self._arrived:
                    self._cond.wait(_IDLE_SECONDS)

    def _begin(self, loads: Sequence[Pages]) -> None:
        deadline = time.monotonic() + self._settings.options.load_timeout
        with self._cond:
            self._loading.update(pages.request for pages in loads)
        for pages in loads:
            loaded = partial(self._loaded, pages, time.monotonic())
            try:
                self._moves.load(pages, self._spaces[pages.group], deadline, loaded)
            except Exception:
                logger.exception("hicache_ext: a load could not be started; its pages are recomputed")
                loaded(pages.blocks, bytes([Outcome.FAILED]) * pages.count)

    def _loaded(self, pages: Pages, since: float, bad: Sequence[int], outcomes: bytes) -> None:
        with self._cond:
            self._invalid.update(bad)
            if bad:
                self._failed.add(pages.request)
            self._loading[pages.request] -= 1
            if not self._loading[pages.request]:
                del self._loading[pages.request]
                self._arrived.add(pages.request)
            self._account("load", outcomes, since)
            self._recent["load_bytes"] += outcomes.count(Outcome.HIT) * self._bytes(pages.group)
            self._cond.notify_all()

    def finished_loads(self) -> tuple[set[str], set[int], set[str]]:
        """Requests whose loads have ended since the last call, the blocks that did not arrive, and which of the
        requests miss some: together, since vLLM must know of bad blocks no later than of the end."""
        if not self._arrived:  # as in nearly every step: no lock for it
            return set(), set(), set()
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
        if not meta.idle:
            self._save(meta)

    def _save(self, meta: StepMetadata) -> None:
        if not self._writes:
            return
        # Apart, and first: where blocks are given away before they are copied, all that is saved with them is lost.
        for pages in (meta.leaving, meta.saves):
            if pages:
                self._send(pages)

    def _send(self, pages: Sequence[Pages]) -> None:
        with self._cond:
            self._saving += 1  # until all are counted
        sent = 0
        try:
            sent = self._moves.save(pages, self._spaces, partial(self._saved, time.monotonic()))
        except Exception:
            logger.exception("hicache_ext: pages could not be stored")
        with self._cond:
            self._saving += sent - 1
            self._cond.notify_all()

    def make_way(self, meta: StepMetadata) -> None:
        """Before this step's forward: it writes into blocks that had other pages before."""
        self._moves.make_way(meta.fresh)

    def _saved(self, since: float, group: int, outcomes: bytes, dropped: int) -> None:
        with self._cond:
            self._saving -= len(outcomes) + dropped
            self._recent["save_no_room"] += dropped
            if outcomes:
                self._account("save", outcomes, since)
            self._recent["save_bytes"] += outcomes.count(Outcome.HIT) * self._bytes(group)
            self._cond.notify_all()

    # ---- the rest

    def _heard(self, index: int, change: Residency, namespace: bytes, keys: bytes, notes: Notes | None) -> None:
        if not self._store.tiers[index].backend.capabilities.knows:
            self._changes.append((index, change, namespace, keys, notes))

    def report(self) -> WorkerReport | None:
        """What became of pages on servers since the last call; None for nothing."""
        if not self._changes:
            return None
        changes = [self._changes.popleft() for _ in range(len(self._changes))]
        return WorkerReport(changes)

    def counts(self) -> dict[str, int]:
        """What happened since the start, by name."""
        with self._cond:
            counts = self._counts.copy()
            counts.update(self._recent)
            return dict(counts)

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call, by name."""
        if not self._recent:
            return {}
        with self._cond:
            taken, self._recent = self._recent, Counter()
            self._counts.update(taken)
        return {name: number for name, number in taken.items() if number}

    def close(self) -> None:
        """Wait, not for ever, until nothing is on its way: blocks and copies are free then."""
        with self._cond:
            self._cond.wait_for(lambda: not (self._loading or self._saving), CLOSE_SECONDS)
        self._moves.close()

    def _follow(self, epoch: str) -> None:
        if epoch != self._epoch:
            self._epoch, self._spaces = epoch, tuple(at_epoch(space, epoch) for space in self._told)

    def _bytes(self, group: int) -> int:
        """Of a page."""
        return self._told[group].layout.payload_bytes

    def _count(self, name: str, number: int) -> None:
        with self._cond:
            self._recent[name] += number

    def _account(self, what: str, outcomes: bytes, since: float) -> None:
        for outcome in Outcome:
            if number := outcomes.count(outcome):
                self._recent[f"{what}_{outcome.name.lower()}"] += number
        self._recent[f"{what}_us"] += int((time.monotonic() - since) * 1e6)
        self._recent[f"{what}_batches"] += 1

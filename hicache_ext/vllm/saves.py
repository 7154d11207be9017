"""The scheduler's half of saving: which pages of which requests go to the tiers after a step.

Belongs here: requests' block tables, as far as the scheduler tells of them, and what is stored already. Does not belong
here: how long a page waits (held), or copying (moves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from hicache_ext.page import KEY_BYTES, Namespace, chain_parents
from hicache_ext.store import NO_TIER, TieredStore
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.tier import Recent
from hicache_ext.vllm import held
from hicache_ext.vllm.chains import RequestChain
from hicache_ext.vllm.events import TierEvents
from hicache_ext.vllm.held import Held, Run
from hicache_ext.vllm.metadata import StepMetadata
from hicache_ext.vllm.pages import NO_BLOCK, Pages, blocks_under, parent_of
from hicache_ext.vllm.settings import Settings
from storage_backends.base import KeyBatch, Notes

#: Pages that were sent on their way lately, to tiers that cannot tell from memory what they hold.
_SENT_PAGES, _SENT_SECONDS = 1 << 17, 600.0


@dataclass(eq=False)
class Table:
    """What a request has. blocks: its block table in each group. computed: pages that its steps have computed, which
    are saved or wait for it. chain: None where it must not be cached."""

    request: Any
    chain: RequestChain | None
    blocks: list[list[int]] = field(default_factory=list)
    computed: int = 0


@dataclass(frozen=True)
class _Run:
    """Pages `first` to `last` of a request. keys: of the first `last` pages. to: the saves of a step that they join."""

    table: Table
    keys: bytes
    first: int
    last: int
    to: list[Pages]


class Saves:
    """On the scheduler's thread only."""

    def __init__(
        self, settings: Settings, store: TieredStore | FaultyStore, block_size: int, windows: Sequence[int]
    ) -> None:
        """block_size, windows: as SchedulerHalf's."""
        self._settings, self._store, self._block_size, self._page_size = settings, store, block_size, block_size
        self._windows = tuple(windows)
        self._spaces: Sequence[Sequence[Namespace]] = ()
        self._events: TierEvents | None = None
        self._sent = Recent(_SENT_PAGES, _SENT_SECONDS)
        self._held: Held[Table] = Held()
        self._drafts = False

    @property
    def waiting(self) -> int:
        """Pages that wait."""
        return self._held.pages

    def told(self, page_size: int, page_bytes: int) -> None:
        """Tokens of a page, and its bytes in all groups."""
        self._page_size = page_size
        self._held = Held(held.limit(int(self._settings.options.save_bytes), page_bytes))

    def finish(self, table: Table) -> None:
        """The request is over."""
        self._held.finish(table)

    def clear(self) -> None:
        """What waits is not saved any more."""
        self._held.clear()

    def take_given_up(self) -> int:
        """Pages that were given up since the last call."""
        given_up = self._held.given_up
        if given_up:
            self._held.given_up = 0
        return given_up

    def step(
        self, meta: StepMetadata, output: Any, tables: Mapping[str, Table], spaces: Sequence[Sequence[Namespace]],
        events: TierEvents | None,
    ) -> None:  # fmt: skip
        """Add to `meta`, which knows the step's loads and blocks, what is to be saved after this step of vLLM's
        SchedulerOutput. tables: by request. spaces: by group. events: where they are published."""
        self._spaces, self._events = spaces, events
        if meta.loads:
            self._held.begin(chain(meta.fresh, *(pages.blocks for pages in meta.loads)))
        else:
            self._held.begin(meta.fresh)
        if not self._drafts and getattr(output, "scheduled_spec_decode_tokens", None):
            self._drafts = True
        scheduled, size = output.num_scheduled_tokens, self._page_size
        for new in output.scheduled_new_reqs:
            table = tables.get(new.req_id)
            if table is not None:
                self._begin(table, new.block_ids)
                self._compute(table, new.num_computed_tokens + scheduled[new.req_id])
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        # Each decode step comes through here with every request: in most of them a request completes no page.
        told = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for name, blocks, computed in told:
            table = tables.get(name)
            if table is None:
                continue
            if name in resumed:
                self._begin(table, blocks or ())
            elif blocks is not None:
                for numbers, more in zip(table.blocks, blocks, strict=True):
                    numbers += more
            if (computed + scheduled[name]) // size > table.computed:
                self._compute(table, computed + scheduled[name])
        if self._held:
            self._save(meta, self._held.take(_known))

    def _begin(self, table: Table, blocks: Sequence[Sequence[int]]) -> None:
        """A request is scheduled, for the first time or after a preemption."""
        self._held.drop(table)
        table.blocks, table.computed = [list(numbers) for numbers in blocks], 0

    def _compute(self, table: Table, tokens: int) -> None:
        """After this step the request's first `tokens` are computed, some of which may be drafts."""
        if table.chain is None:
            return
        room = min(map(len, table.blocks), default=0) * self._block_size // self._page_size
        last, first = min(tokens // self._page_size, room), table.computed
        # Drafts may be rejected, and a session's last token replaced: there only what is known now is what is computed.
        if self._drafts or getattr(table.request, "resumable", False):
            last = min(last, table.chain.whole_pages())
        if last > first:
            table.computed = last
            # Behind a window blocks are given away; decoding takes it at most one page further in a step.
            left = min(_steps_left(table.request), *(window - 1 for window in self._windows if window), held.STEPS)
            self._held.add(table, first, last, partial(self._blocks_under, table), left)

    def _blocks_under(self, table: Table, page: int) -> list[int]:
        """The blocks that this page of the request lies in, of all groups."""
        found: list[int] = []
        for numbers in table.blocks:
            found += blocks_under(numbers, page, page + 1, self._page_size, self._block_size)[0]
        return [block for block in found if block != NO_BLOCK]

    def _save(self, meta: StepMetadata, taken: Sequence[Run[Table]]) -> None:
        """Those of these pages that no tier is known to hold. Tiers are asked once for all requests."""
        saves: list[Pages] = []
        leaving: list[Pages] = []
        runs = [
            _Run(run.owner, run.owner.chain.keys(run.last), run.first, run.last, leaving if run.over else saves)
            for run in taken if run.owner.chain is not None
        ]  # fmt: skip
        if not runs:
            return
        meta.saves, meta.leaving = saves, leaving
        notes = [self._know(run) for run in runs]
        parts = [run.keys[run.first * KEY_BYTES : run.last * KEY_BYTES] for run in runs]
        parents = [parent_of(run.keys, run.first) for run in runs]
        packed = b"".join(parts)
        before = b"".join(chain_parents(part, parent) for part, parent in zip(parts, parents, strict=True))
        for group in range(len(self._windows)):
            missing, at = self._missing(group, packed, before), 0
            for run, note in zip(runs, notes, strict=True):
                count = run.last - run.first
                wanted = np.flatnonzero(missing[at : at + count]) + run.first
                at += count
                if len(wanted):
                    self._send(run, group, wanted, note)

    def _send(self, run: _Run, group: int, wanted: np.ndarray, notes: Notes | None) -> None:
        """wanted: numbers of the pages of this request to store, of this group."""
        blocks = run.table.blocks[group]
        if self._windows[group]:  # what has left the window has no block any more
            wanted = wanted[[blocks[page] != NO_BLOCK for page in wanted]]
        # One message for each run without a gap: a page's parent is then the one before it.
        gaps = np.flatnonzero(np.diff(wanted) > 1) + 1 if len(wanted) > 1 else ()
        for part in np.split(wanted, gaps) if len(gaps) else [wanted] if len(wanted) else []:
            begin, end = int(part[0]), int(part[-1]) + 1
            run.to.append(
                Pages(
                    run.table.request.request_id, run.keys[begin * KEY_BYTES : end * KEY_BYTES],
                    parent_of(run.keys, begin), *blocks_under(blocks, begin, end, self._page_size, self._block_size), 0,
                    notes.only(list(range(begin - run.first, end - run.first))) if notes is not None else None, group,
                )
            )  # fmt: skip

    def _know(self, run: _Run) -> Notes | None:
        """What events say of these pages, and let them know it."""
        if self._events is None:
            return None
        digest, request = self._spaces[0][0].digest, run.table.request
        return self._events.know(digest, request, run.keys, run.first, run.last, self._page_size)

    def _missing(self, group: int, keys: bytes, parents: bytes) -> np.ndarray:
        """bool[n]: the pages to store, of this group. keys, parents: packed, of any requests."""
        missing = np.zeros(len(keys) // KEY_BYTES, bool)
        for space in self._spaces[group]:
            missing |= self._store.lookup_local(KeyBatch(space, keys, parents)) == NO_TIER
        if not self._knows:
            digest = self._spaces[group][0].digest
            for page in np.flatnonzero(missing):
                missing[page] = self._sent.add(digest, keys[page * KEY_BYTES : (page + 1) * KEY_BYTES]) == 1
        return missing

    @property
    def _knows(self) -> bool:
        """Whether what the first tier does not show from memory is not there."""
        return self._store.tiers[0].backend.capabilities.knows


def fresh(output: Any, block_size: int) -> list[int]:
    """Blocks that requests were given for this step and that it computes; what was computed before lies in others."""
    found: list[int] = []
    for new in output.scheduled_new_reqs:
        for blocks in new.block_ids:
            found += blocks[new.num_computed_tokens // block_size :]
    cached = output.scheduled_cached_reqs
    if not any(cached.new_block_ids):
        return found
    for name, more, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        for blocks in more or ():
            found += blocks[computed // block_size :] if name in cached.resumed_req_ids else blocks
    return found


def _known(table: Table) -> int:
    """Pages all of whose tokens are known."""
    return table.chain.whole_pages() if table.chain is not None else 0


def _steps_left(request: Any) -> int:
    """Steps that a request has after this one, if it takes as many tokens as it may."""
    known = request.num_output_tokens + getattr(request, "num_output_placeholders", 0)
    return max(0, int(request.max_tokens) - known - 1)

"""The scheduler's half: what of a request the tiers hold, and which blocks to load and to save in the next step.

Belongs here: vLLM's requests and block tables, as far as the scheduler tells of them. Does not belong here: any byte of
a block (worker), or waiting: everything here answers from memory.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from hicache_ext.page import KEY_BYTES, Namespace, chain_parents
from hicache_ext.store import NO_TIER, TieredStore, policies
from hicache_ext.store.inject import FaultyStore
from hicache_ext.store.tier import Recent
from hicache_ext.vllm import held
from hicache_ext.vllm.chains import Adapters, RequestChain
from hicache_ext.vllm.events import TierEvents, notes_of
from hicache_ext.vllm.held import Held, Run
from hicache_ext.vllm.identity import at_epoch
from hicache_ext.vllm.lookups import Lookups
from hicache_ext.vllm.metadata import StepMetadata
from hicache_ext.vllm.pages import Pages
from hicache_ext.vllm.settings import Settings
from storage_backends.base import KeyBatch, Notes

logger = logging.getLogger(__name__)

#: Pages that were sent on their way lately, to tiers that cannot tell from memory what they hold.
_SENT_PAGES, _SENT_SECONDS = 1 << 17, 600.0
#: In a block table: there is none here, its tokens have left the window.
_NO_BLOCK = 0


@dataclass(eq=False)
class _Tracked:
    """One request. blocks: its block table in each group. computed: pages that its steps have computed, which are saved
    or wait for it. planned: a load to come, its first token and the tiers of its pages. found: what the tiers hold for
    some groups, while others have not answered.

    loading: blocks of its last load. failed: not all of it came; what is missing is computed, not asked for again.
    """

    request: Any
    chain: RequestChain | None
    blocks: list[list[int]] = field(default_factory=list)
    computed: int = 0
    planned: tuple[int, np.ndarray] | None = None
    loading: frozenset[int] = frozenset()
    failed: bool = False
    found: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """Pages `first` to `last` of a request. keys: of the first `last` pages."""

    tracked: _Tracked
    keys: bytes
    first: int
    last: int


class SchedulerHalf:
    """Called by vLLM's scheduler, on its thread only."""

    def __init__(
        self, settings: Settings, store: TieredStore | FaultyStore, block_size: int, windows: Sequence[int] = (0,)
    ) -> None:
        """block_size: tokens of vLLM's blocks. A page is one block, or, where it is shared with other engines, as many
        tokens as the workers say. windows: of each group of blocks, how many of a prefix's last blocks are needed; 0:
        all of them.
        """
        self._settings, self._store, self._block_size, self._page_size = settings, store, block_size, block_size
        self._windows = tuple(windows)
        self._told: list[list[Namespace]] = []
        self._spaces: list[list[Namespace]] = []
        """By group, those of this epoch."""
        self._epoch = ""
        self._adapters = Adapters()
        self._tracked: dict[str, _Tracked] = {}
        self._lookups = Lookups(store, settings.options.lookup_timeout)
        self._loads: list[Pages] = []
        self._sent = Recent(_SENT_PAGES, _SENT_SECONDS)
        self._held: Held[_Tracked] = Held()
        self._drafts = False
        self._counts: Counter[str] = Counter()
        self.events: TierEvents | None = None
        """Where vLLM publishes KV events."""

    def served(self) -> bytes | None:
        """Digest of the namespace whose pages can be loaded now. Of several ranks' it is the first one's."""
        return self._spaces[0][0].digest if self._spaces else None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._page_size

    def workers(self, told: Sequence[Sequence[Namespace]]) -> None:
        """The namespaces of each worker's pages, by group, from their hand-shake."""
        sizes = {space.layout.page_size for spaces in told for space in spaces}
        if len(sizes) > 1:
            logger.error(
                "hicache_ext: some workers share pages with other engines and some cannot, so nothing is cached. "
                "Fix: the reason is in their logs; or remove `share: engines`"
            )
            return
        self._page_size = sizes.pop() if sizes else self._block_size
        # Ranks that hold the same part share one.
        self._told = self._spaces = [list(dict.fromkeys(spaces)) for spaces in zip(*told, strict=True)]
        page_bytes = sum(spaces[0].layout.payload_bytes for spaces in self._spaces)
        self._held = Held(held.limit(int(self._settings.options.save_bytes), page_bytes))

    # ---- requests

    def begin(self, request: Any) -> None:
        """A request has arrived."""
        self._track(request)

    def matched(self, request: Any, computed: int) -> int | None:
        """Tokens after the first `computed` ones that can be loaded; None: not known yet, ask again."""
        tracked = self._track(request)
        tracked.planned = None
        if tracked.chain is None or not self._settings.loads or not self._spaces:
            return 0
        if tracked.failed or getattr(request, "skip_reading_prefix_cache", False):
            return 0
        first, last = computed // self._page_size, self._last(request.num_tokens, computed)
        keys = tracked.chain.keys(last)
        if first >= last or len(keys) <= first * KEY_BYTES:
            return 0
        asked, parent = keys[first * KEY_BYTES :], self._parent(keys, first)
        found = self._found(tracked, first, asked, parent)
        if found is None:
            return None
        pages = self._usable(found)
        end = (first + pages) * self._page_size
        tokens = max(0, end - end % self._block_size - computed)
        self._counts["queried_tokens"] += last * self._page_size - computed
        self._counts["hit_tokens"] += tokens
        if tokens:
            # Of a group that needs them all, where there is one.
            tiers = found[self._windows.index(0) if 0 in self._windows else 0]
            tiers = np.where(tiers == NO_TIER, tiers[pages - 1], tiers)
            tracked.planned = (computed, tiers[: (computed + tokens) // self._page_size - first])
        return tokens

    def _last(self, tokens: int, computed: int) -> int:
        """Pages of a prompt that are worth to be asked for. The last token is computed whatever there is: vLLM takes it
        off a load of the whole prompt, and a step of one token is a decode, which costs a fraction of a prefill. For
        that token alone nothing is loaded."""
        last = (tokens - 1) // self._page_size
        if computed // self._page_size < last and not any(self._windows):  # a window's blocks end with the prefix
            return tokens // self._page_size
        return last

    def _found(self, tracked: _Tracked, first: int, asked: bytes, parent: bytes) -> list[np.ndarray] | None:
        """By group, the tiers of these pages, which begin with number `first`; None while a server has not answered."""
        found = {}
        for group, spaces in enumerate(self._spaces):
            name = (group, first, len(asked))
            known = tracked.found.get(name)
            if known is None:
                known = self._lookups.tiers(_lookup(tracked.request, group), spaces, asked, parent)
            if known is not None:
                found[name] = known
        # An answer is given once, so it is kept until the others are there.
        whole = len(found) == len(self._spaces)
        tracked.found = {} if whole else found
        return list(found.values()) if whole else None

    def _usable(self, found: Sequence[np.ndarray]) -> int:
        """Pages of the longest prefix that every group can serve."""
        present = [tiers != NO_TIER for tiers in found]
        if self._windows == (0,):
            return policies.prefix_length(present[0])
        whole = [flags for flags, window in zip(present, self._windows, strict=True) if not window]
        trailing = [
            policies.usable_trailing(flags, window)
            for flags, window in zip(present, self._windows, strict=True) if window
        ]  # fmt: skip
        every = np.logical_and.reduce(whole) if whole else np.ones(len(present[0]), bool)
        lengths = policies.usable_lengths(every, trailing)
        return lengths[-1] if lengths else 0

    def allocated(self, request: Any, blocks: Sequence[list[int]], tokens: int) -> None:
        """The request's block table by group; `tokens` of it are to be loaded (0: nothing is, from here at least)."""
        tracked = self._track(request)
        planned, tracked.planned = tracked.planned, None
        if not tokens or planned is None or tracked.chain is None:
            return
        begin, end = planned[0], planned[0] + tokens
        first, last = begin // self._page_size, end // self._page_size
        keys = tracked.chain.keys(last)
        tracked.loading = frozenset(blocks[0][begin // self._block_size : end // self._block_size])
        self._know(tracked, keys, first, last)
        for group, window in enumerate(self._windows):
            start = max(first, last - window) if window else first
            while window and start < last and blocks[group][start] == _NO_BLOCK:
                start += 1
            if start < last:
                part, skip = self._blocks_of(blocks[group], start, last)
                self._loads.append(
                    Pages(
                        request.request_id, keys[start * KEY_BYTES :], self._parent(keys, start), part, skip,
                        max(0, begin - start * self._page_size), group=group,
                    )
                )  # fmt: skip
        # What vLLM asks next, of these tokens: which tier they come from.
        tracked.planned = planned

    def tiers_of(self, request: Any) -> dict[int, int]:
        """Tokens by tier number of the load that was just planned for this request."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.planned is None:
            return {}
        begin, tiers = tracked.planned
        tokens = np.full(len(tiers), self._page_size)
        tokens[0] -= begin % self._page_size
        return {int(tier): int(tokens[tiers == tier].sum()) for tier in np.unique(tiers)}

    def loaded(self, requests: set[str], invalid: set[int], failed: Collection[str] = ()) -> None:
        """The loads of these requests have ended, without these blocks; those of `failed` as a whole."""
        for name in requests:
            tracked = self._tracked.get(name)
            if tracked is not None:
                tracked.failed = name in failed or bool(tracked.loading & invalid)
                tracked.loading = frozenset()

    def finished(self, request: Any) -> None:
        """The request is over. A load on its way goes on: vLLM keeps its blocks until the worker reports it. Its pages
        that wait are saved in the next step, which vLLM makes even if there is nothing to compute."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            self._held.finish(tracked)
        self._forget(request)

    # ---- steps

    def step(self, output: Any) -> StepMetadata:
        """What the workers are to do in this step of vLLM's SchedulerOutput."""
        meta = StepMetadata(epoch=self._epoch, idle=output.total_num_scheduled_tokens == 0)
        if self._loads:
            meta.loads, self._loads = self._loads, []
        meta.fresh = _fresh(output, self._block_size)
        if not self._settings.saves or not self._spaces:
            return meta
        self._held.begin(chain(meta.fresh, *(pages.blocks for pages in meta.loads)))
        if not self._drafts and getattr(output, "scheduled_spec_decode_tokens", None):
            self._drafts = True
        scheduled, size = output.num_scheduled_tokens, self._page_size
        for new in output.scheduled_new_reqs:
            tracked = self._tracked.get(new.req_id)
            if tracked is not None:
                self._begin(tracked, new.block_ids)
                self._compute(tracked, new.num_computed_tokens + scheduled[new.req_id])
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        # Each decode step comes through here with every request: in most of them a request completes no page.
        told = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for name, blocks, computed in told:
            tracked = self._tracked.get(name)
            if tracked is None:
                continue
            if name in resumed:
                self._begin(tracked, blocks or ())
            elif blocks is not None:
                for table, more in zip(tracked.blocks, blocks, strict=True):
                    table += more
            if (computed + scheduled[name]) // size > tracked.computed:
                self._compute(tracked, computed + scheduled[name])
        if self._held:
            self._save(meta, self._held.take(_known))
        return meta

    def reset(self) -> None:
        """Nothing that was stored before is served from now on, and what is on its way to be stored neither."""
        old, self._epoch = [space for spaces in self._spaces for space in spaces], uuid.uuid4().hex
        self._spaces = [[at_epoch(space, self._epoch) for space in spaces] for spaces in self._told]
        self._loads.clear()
        self._held.clear()
        for tracked in self._tracked.values():
            tracked.planned, tracked.found = None, {}
            self._forget(tracked.request)
        self._store.clear(old)

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call, by name."""
        if self._held.given_up:
            self._counts["save_given_up"] += self._held.given_up
            self._held.given_up = 0
        if not self._counts:
            return {}
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        self._lookups.close()
        if self.events is not None:
            self.events.close()

    def _begin(self, tracked: _Tracked, blocks: Sequence[Sequence[int]]) -> None:
        """A request is scheduled, for the first time or after a preemption."""
        self._held.drop(tracked)
        tracked.blocks, tracked.computed = [list(table) for table in blocks], 0

    def _compute(self, tracked: _Tracked, tokens: int) -> None:
        """After this step the request's first `tokens` are computed, some of which may be drafts."""
        if tracked.chain is None:
            return
        room = min(map(len, tracked.blocks), default=0) * self._block_size // self._page_size
        last, first = min(tokens // self._page_size, room), tracked.computed
        if self._drafts:  # of which some will be rejected: only what is known now is what is computed
            last = min(last, tracked.chain.whole_pages())
        if last > first:
            tracked.computed = last
            # Behind a window blocks are given away; decoding takes it at most one page further in a step.
            left = min(_steps_left(tracked.request), *(window - 1 for window in self._windows if window), held.STEPS)
            self._held.add(tracked, first, last, partial(self._blocks_under, tracked), left)

    def _blocks_under(self, tracked: _Tracked, page: int) -> list[int]:
        """The blocks that this page of the request lies in, of all groups."""
        return [
            block for table in tracked.blocks for block in self._blocks_of(table, page, page + 1)[0]
            if block != _NO_BLOCK
        ]  # fmt: skip

    def _save(self, meta: StepMetadata, taken: Sequence[Run[_Tracked]]) -> None:
        """Those of these pages that no tier is known to hold. Tiers are asked once for all requests."""
        runs = [
            _Run(run.owner, run.owner.chain.keys(run.last), run.first, run.last)
            for run in taken if run.owner.chain is not None
        ]  # fmt: skip
        if not runs:
            return
        notes = [self._know(run.tracked, run.keys, run.first, run.last) for run in runs]
        parts = [run.keys[run.first * KEY_BYTES : run.last * KEY_BYTES] for run in runs]
        parents = [self._parent(run.keys, run.first) for run in runs]
        packed = b"".join(parts)
        before = b"".join(chain_parents(part, parent) for part, parent in zip(parts, parents, strict=True))
        for group in range(len(self._windows)):
            missing, at = self._missing(group, packed, before), 0
            for run, note in zip(runs, notes, strict=True):
                count = run.last - run.first
                wanted = np.flatnonzero(missing[at : at + count]) + run.first
                at += count
                if len(wanted):
                    self._send(meta, run, group, wanted, note)

    def _send(self, meta: StepMetadata, run: _Run, group: int, wanted: np.ndarray, notes: Notes | None) -> None:
        """wanted: numbers of the pages of this request to store, of this group."""
        blocks = run.tracked.blocks[group]
        if self._windows[group]:  # what has left the window has no block any more
            wanted = wanted[[blocks[page] != _NO_BLOCK for page in wanted]]
        # One message for each run without a gap: a page's parent is then the one before it.
        gaps = np.flatnonzero(np.diff(wanted) > 1) + 1 if len(wanted) > 1 else ()
        for part in np.split(wanted, gaps) if len(gaps) else [wanted] if len(wanted) else []:
            begin, end = int(part[0]), int(part[-1]) + 1
            meta.saves.append(
                Pages(
                    run.tracked.request.request_id, run.keys[begin * KEY_BYTES : end * KEY_BYTES],
                    self._parent(run.keys, begin), *self._blocks_of(blocks, begin, end), 0,
                    notes.only(list(range(begin - run.first, end - run.first))) if notes is not None else None, group,
                )
            )  # fmt: skip

    def _know(self, tracked: _Tracked, keys: bytes, first: int, last: int) -> Notes | None:
        """What events say of these pages, and let them know it."""
        if self.events is None:
            return None
        notes = notes_of(tracked.request, first, last, self._page_size)
        if notes is not None:
            for space in self._spaces[0][:1]:
                self.events.announcer.know(space.digest, keys[first * KEY_BYTES : last * KEY_BYTES], notes)
        return notes

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

    def _track(self, request: Any) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.request is not request:
            tracked = _Tracked(request, RequestChain.of(request, self._page_size, self._adapters))
            self._tracked[request.request_id] = tracked
        return tracked

    def _forget(self, request: Any) -> None:
        for group in range(len(self._windows)):
            self._lookups.forget(_lookup(request, group))

    def _blocks_of(self, blocks: list[int], first: int, last: int) -> tuple[tuple[int, ...], int]:
        """The blocks that these pages lie in, and the tokens of the first block before the first page."""
        begin, end, size = first * self._page_size, last * self._page_size, self._block_size
        return tuple(blocks[begin // size : -(-end // size)]), begin % size

    def _parent(self, keys: bytes, page: int) -> bytes:
        return keys[(page - 1) * KEY_BYTES : page * KEY_BYTES] if page else b""


def _fresh(output: Any, block_size: int) -> list[int]:
    """Blocks that requests were given for this step and that it computes; what was computed before lies in others."""
    fresh: list[int] = []
    for new in output.scheduled_new_reqs:
        for blocks in new.block_ids:
            fresh += blocks[new.num_computed_tokens // block_size :]
    cached = output.scheduled_cached_reqs
    if not any(cached.new_block_ids):
        return fresh
    for name, more, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        for blocks in more or ():
            fresh += blocks[computed // block_size :] if name in cached.resumed_req_ids else blocks
    return fresh


def _known(tracked: _Tracked) -> int:
    """Pages all of whose tokens are known."""
    return tracked.chain.whole_pages() if tracked.chain is not None else 0


def _steps_left(request: Any) -> int:
    """Steps that a request has after this one, if it takes as many tokens as it may."""
    known = request.num_output_tokens + getattr(request, "num_output_placeholders", 0)
    return max(0, int(request.max_tokens) - known - 1)


def _lookup(request: Any, group: int) -> str:
    """What a lookup is called."""
    return str(request.request_id) if not group else f"{request.request_id}#{group}"

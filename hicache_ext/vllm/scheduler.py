"""The scheduler's half: what of a request the tiers hold, and which blocks to load in the next step.

Belongs here: vLLM's requests, as far as the scheduler tells of them. Does not belong here: which blocks to save
(saves), any byte of a block (worker), or waiting: everything here answers from memory.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hicache_ext.page import KEY_BYTES, Namespace
from hicache_ext.store import NO_TIER, TieredStore, policies
from hicache_ext.store.inject import FaultyStore
from hicache_ext.vllm.chains import Adapters, RequestChain
from hicache_ext.vllm.events import TierEvents
from hicache_ext.vllm.identity import at_epoch
from hicache_ext.vllm.lookups import Lookups
from hicache_ext.vllm.metadata import StepMetadata
from hicache_ext.vllm.pages import NO_BLOCK, Pages, blocks_under, parent_of
from hicache_ext.vllm.saves import Saves, Table, fresh
from hicache_ext.vllm.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Tracked(Table):
    """One request. planned: a load to come, its first token and the tiers of its pages. found: what the tiers hold for
    some groups, while others have not answered.

    loading: blocks of its last load. failed: not all of it came; what is missing is computed, not asked for again.
    """

    planned: tuple[int, np.ndarray] | None = None
    loading: frozenset[int] = frozenset()
    failed: bool = False
    found: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)


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
        self._saves = Saves(settings, store, block_size, windows)
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
        self._saves.told(self._page_size, sum(spaces[0].layout.payload_bytes for spaces in self._spaces))

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
        asked, parent = keys[first * KEY_BYTES :], parent_of(keys, first)
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
        if self.events is not None:
            self.events.know(self._spaces[0][0].digest, request, keys, first, last, self._page_size)
        for group, window in enumerate(self._windows):
            start = max(first, last - window) if window else first
            while window and start < last and blocks[group][start] == NO_BLOCK:
                start += 1
            if start < last:
                part, skip = blocks_under(blocks[group], start, last, self._page_size, self._block_size)
                self._loads.append(
                    Pages(
                        request.request_id, keys[start * KEY_BYTES :], parent_of(keys, start), part, skip,
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
            self._saves.finish(tracked)
        self._forget(request)

    # ---- steps

    def step(self, output: Any) -> StepMetadata:
        """What the workers are to do in this step of vLLM's SchedulerOutput."""
        meta = StepMetadata(epoch=self._epoch, idle=output.total_num_scheduled_tokens == 0)
        if self._loads:
            meta.loads, self._loads = self._loads, []
        meta.fresh = fresh(output, self._block_size)
        if self._settings.saves and self._spaces:
            self._saves.step(meta, output, self._tracked, self._spaces, self.events)
        return meta

    def reset(self) -> None:
        """Nothing that was stored before is served from now on, and what is on its way to be stored neither."""
        old, self._epoch = [space for spaces in self._spaces for space in spaces], uuid.uuid4().hex
        self._spaces = [[at_epoch(space, self._epoch) for space in spaces] for spaces in self._told]
        self._loads.clear()
        self._saves.clear()
        for tracked in self._tracked.values():
            tracked.planned, tracked.found = None, {}
            self._forget(tracked.request)
        self._store.clear(old)

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call, by name."""
        if given_up := self._saves.take_given_up():
            self._counts["save_given_up"] += given_up
        if not self._counts:
            return {}
        counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        self._lookups.close()
        if self.events is not None:
            self.events.close()

    def _track(self, request: Any) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.request is not request:
            tracked = _Tracked(request, RequestChain.of(request, self._page_size, self._adapters))
            self._tracked[request.request_id] = tracked
        return tracked

    def _forget(self, request: Any) -> None:
        for group in range(len(self._windows)):
            self._lookups.forget(_lookup(request, group))


def _lookup(request: Any, group: int) -> str:
    """What a lookup is called."""
    return str(request.request_id) if not group else f"{request.request_id}#{group}"

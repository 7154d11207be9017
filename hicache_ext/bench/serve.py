"""A running engine, asked for the same prompts with their prefixes in one tier after the other.

Belongs here: the order of things: asking, waiting, moving prompts to a tier, and a replayed trace. Does not belong
here: HTTP (serve_client), an engine's routes (serve_engines), prompts (serve_matrix), percentiles (serve_summary),
starting engines (hicache_ext.cli.serve_subjects).

    none     prompts that nothing has seen
    device   the same again, at once
    host     the same after other prompts have pushed them out of device memory
    local,   the same after the engine has lost its memory: flushed, or restarted by someone else between `fill` and
    remote   `read`

A group's prompts are asked in bursts of its concurrency, each burst from the device right after it was new: so a device
that holds one burst is large enough. Between bursts the storage tier finishes its writes.

The output after the device hit is what all others are compared with: it has the same cached prefix and is computed
alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hicache_ext.bench.serve_client import EngineError, Reply
from hicache_ext.bench.serve_engines import Engine, Facts, settle
from hicache_ext.bench.serve_matrix import STORAGE, Draw, Group, Tier, TraceRequest, fillers, too_large
from hicache_ext.bench.serve_summary import Cell, Sample

_SHORT_WARM_UP = 300


@dataclass(frozen=True)
class Plan:
    """tiers: which are measured; the device hit is always asked for, since the others are compared with it.

    until: `time.monotonic()` from which no further group is begun; None: no limit.
    """

    groups: tuple[Group, ...]
    tiers: frozenset[Tier]
    draw: Draw
    new_tokens: int = 8
    until: float | None = None


@dataclass
class Course:
    """One subject's engine (or engines, one after the other: `engine` and `facts` may be exchanged between calls).

    say: takes lines that the user should know, once each. kept: called whenever `samples` has grown. expected: outputs
    after a device hit, by group; `read` needs them, from `fill` or from a file.
    """

    subject: str
    plan: Plan
    engine: Engine
    facts: Facts
    say: Callable[[str], None]
    progress: Callable[[str], None] = lambda _: None
    kept: Callable[[], None] = lambda: None
    expected: dict[Group, list[list[int]]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    _filled: bool = False

    def warm_up(self, restarted: bool = False) -> None:
        """What an engine's first requests do besides answering; `restarted`: they come from storage.

        Raises EngineError if they fail: nothing else would work either.
        """
        self.progress("warming up")
        lengths = {_SHORT_WARM_UP, min(group.prompt_tokens for group in self.plan.groups)} if self.plan.groups else ()
        for tokens in sorted(lengths or {_SHORT_WARM_UP}):
            for again in (False, True):
                if error := self._ask([self.plan.draw.warm(tokens)], 1, new=not (again or restarted))[0][0].error:
                    raise EngineError(error)

    def fill(self, then: Callable[[Group], None] = lambda _: None) -> None:
        """Ask for each group's prompts: new, from the device, from the host. `then`: called after each group."""
        for line in too_large(self.plan.groups, self.plan.new_tokens, self.facts.longest, self.facts.device_tokens):
            self.say(f"{self.subject}: left out: {line}")
        for group in self._possible():
            if not self._time_left(group):
                continue
            cold, warm = _Pass(), _Pass()
            for burst in self._bursts(group):
                cold.add(*self._asked(group, Tier.NONE, burst))
                warm.add(*self._asked(group, Tier.DEVICE, burst))
            expected = None
            if not any(reply.error for reply in warm.replies):
                expected = self.expected[group] = [reply.tokens for reply in warm.replies]
            self._keep(group, Tier.NONE, cold, expected)
            self._keep(group, Tier.DEVICE, warm, expected)
            if Tier.HOST in self.plan.tiers and self._push_out():
                self._keep(group, Tier.HOST, self._all(group, Tier.HOST), expected)
            then(group)
        outputs = [output for group in self.expected.values() for output in group]
        if len(outputs) > 1 and all(output == outputs[0] for output in outputs):
            self.say(f"{self.subject}: all prompts have the same output, so that `identical` says little of this model")

    def read(self, tier: Tier, only: Group | None = None) -> None:
        """Ask for the groups that have been filled, whose pages now lie in a storage tier alone."""
        for group in [only] if only else self._possible():
            if group not in self.expected:
                if only is None:
                    self.say(f"{self.subject}: {tier}: {_named(group)} left out: it was not filled")
                continue
            if only is None and not self._time_left(group):
                continue
            self._keep(group, tier, self._all(group, tier), self.expected[group])

    def flush_and_read(self, tier: Tier, group: Group) -> None:
        """For an engine that cannot be restarted: its memory is emptied instead."""
        self.progress("flushing")
        self.engine.flush()
        if problem := drop_page_cache():
            self.say(f"{self.subject}: {tier}: {problem}")
        self.read(tier, group)

    def replay(self, requests: Sequence[TraceRequest], concurrency: int, speed: float) -> tuple[list[Reply], float]:
        """A trace's requests in their order: so many at a time, or, with concurrency 0, at their times over `speed`."""
        self.progress(f"replaying {len(requests)} requests")
        bodies = [self.engine.body(request.prompt, self.plan.new_tokens) for request in requests]
        before = self._stored()
        client = self.engine.client
        if concurrency:
            replies, seconds = client.closed_loop(bodies, self.engine, concurrency)
        else:
            times = [request.at_s / speed for request in requests]
            replies, seconds = client.open_loop(bodies, self.engine, times)
        self._check_alive(replies)
        self._settle(before, replies, shared=True)
        return replies, seconds

    def _possible(self) -> list[Group]:
        longest, device = self.facts.longest, self.facts.device_tokens
        return [each for each in self.plan.groups if not too_large([each], self.plan.new_tokens, longest, device)]

    def _time_left(self, group: Group) -> bool:
        left = self.plan.until is None or time.monotonic() < self.plan.until
        if not left:
            self.say(f"{self.subject}: {_named(group)} left out: the time limit is over")
        return left

    def _bursts(self, group: Group) -> Iterator[list[list[int]]]:
        prompts = group.prompts(self.plan.draw)
        return (prompts[at : at + group.concurrency] for at in range(0, len(prompts), group.concurrency))

    def _all(self, group: Group, tier: Tier) -> _Pass:
        found = _Pass()
        for burst in self._bursts(group):
            found.add(*self._asked(group, tier, burst))
        return found

    def _asked(self, group: Group, tier: Tier, prompts: list[list[int]]) -> tuple[list[Reply], float]:
        self.progress(f"{_named(group)} from {tier}")
        replies, seconds = self._ask(prompts, group.concurrency, new=tier is Tier.NONE)
        self._check_alive(replies)
        return replies, seconds

    def _ask(self, prompts: list[list[int]], concurrency: int, new: bool) -> tuple[list[Reply], float]:
        """Ask; what is new is waited for until the storage tier has it: no later request shares the disk with it."""
        bodies = [self.engine.body(prompt, self.plan.new_tokens) for prompt in prompts]
        before = self._stored()
        replies, seconds = self.engine.client.closed_loop(bodies, self.engine, concurrency)
        if new:
            self._settle(before, replies)
        return replies, seconds

    def _keep(self, group: Group, tier: Tier, found: _Pass, expected: list[list[int]] | None) -> None:
        if tier in self.plan.tiers:
            cell = Cell(self.subject, tier, group.prompt_tokens, group.concurrency)
            self.samples.append(Sample(cell, found.replies, found.seconds, expected))
            self.kept()

    def _push_out(self) -> bool:
        """Ask for more other tokens than device memory holds; they too stay in the host's."""
        if not self.facts.device_tokens:
            self.say(f"{self.subject}: host left out: the engine does not say how many tokens device memory holds")
            return False
        self.progress("filling device memory with other prompts")
        for number, tokens in enumerate(fillers(self.facts.device_tokens, self.facts.longest)):
            self._ask([self.plan.draw.filler(number, tokens)], 1, new=not self._filled)
        self._filled = True
        return True

    def _check_alive(self, replies: Sequence[Reply]) -> None:
        """Raises EngineError where nothing was answered and the engine is gone: there is no use in going on."""
        if all(reply.error for reply in replies):
            self.engine.facts()

    def _stored(self) -> float:
        return (self.engine.stored_tokens() or 0.0) if self.facts.storage else 0.0

    def _settle(self, before: float, replies: Sequence[Reply], shared: bool = False) -> None:
        if not self.facts.storage:
            return
        page = max(1, self.facts.page_tokens)
        # The last token generated has no KV yet, and only whole pages are stored.
        expected = before + sum(
            max(0, (reply.prompt_tokens + len(reply.tokens) - 1) // page * page - sum(reply.cached.values()))
            for reply in replies
            if not reply.error
        )
        # Prompts that share a prefix and were under way together store it once: then less comes than is computed.
        arrived = settle(self.engine, expected, first=before == 0)
        if not arrived and not shared:
            self.say(f"{self.subject}: not all that was computed reached the storage tier")


@dataclass
class _Pass:
    """A group's replies from one tier; seconds: while requests were under way."""

    replies: list[Reply] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, replies: list[Reply], seconds: float) -> None:
        self.replies += replies
        self.seconds += seconds


def _named(group: Group) -> str:
    return f"{group.requests} prompts of {group.prompt_tokens:,} tokens, {group.concurrency} at a time"


def drop_page_cache() -> str:
    """Make reads of files come from the disk; empty, or why that could not be done."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError as error:
        why = error.strerror or str(error)
        return f"the page cache was not dropped ({why}): what reads through it may come from memory. Fix: run as root"
    return ""


def storage_tiers(tiers: frozenset[Tier]) -> list[Tier]:
    """Those of `tiers` that outlive the engine, fast to slow."""
    return [tier for tier in STORAGE if tier in tiers]

"""What is asked of an engine: which prompts, in which groups, and from which tier.

Belongs here: pure and repeatable choices. Does not belong here: asking (hicache_ext.bench.serve).

Every token is drawn from the run's seed, so that two engines get the same prompts, a restarted one gets them again, and
another run (with another seed) meets nothing that an earlier one stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from hicache_ext.bench.trace import BLOCK_TOKENS, TraceError, compile_trace

#: Ids below are special in many vocabularies.
_FIRST_ID = 10
_PROMPT, _FILLER, _WARM, _BLOCK, _TAIL = range(5)


class Tier(StrEnum):
    """Where a prompt's prefix lies when it is asked for; `none`: nowhere, it is computed."""

    NONE = "none"
    DEVICE = "device"
    HOST = "host"
    LOCAL = "local"
    REMOTE = "remote"


STORAGE = (Tier.LOCAL, Tier.REMOTE)


@dataclass(frozen=True)
class Draw:
    """Draws token ids. vocabulary: ids lie below it."""

    seed: int
    vocabulary: int

    def _ids(self, tokens: int, *key: int) -> list[int]:
        return np.random.default_rng([self.seed, *key]).integers(_FIRST_ID, self.vocabulary, tokens).tolist()

    def filler(self, number: int, tokens: int) -> list[int]:
        """What pushes other prompts out of device memory."""
        return self._ids(tokens, _FILLER, number)

    def warm(self, tokens: int) -> list[int]:
        """What is asked before anything is measured."""
        return self._ids(tokens, _WARM, tokens)


@dataclass(frozen=True)
class Group:
    """Prompts of one length that share no prefix and are asked together. requests: how many."""

    prompt_tokens: int
    concurrency: int
    requests: int

    def prompts(self, draw: Draw) -> list[list[int]]:
        length, concurrency = self.prompt_tokens, self.concurrency
        return [draw._ids(length, _PROMPT, length, concurrency, i) for i in range(self.requests)]

    def digest(self, draw: Draw) -> str:
        """Names the prompts: what was drawn elsewhere with the same seed must be the same."""
        return hashlib.sha256(np.array(self.prompts(draw), np.uint32).tobytes()).hexdigest()[:16]


def groups(lengths: Iterable[int], concurrencies: Iterable[int], requests: int) -> list[Group]:
    """One group for each length and concurrency, each with at least as many requests as are under way at a time."""
    return [
        Group(length, concurrency, max(requests, concurrency))
        for length in sorted(set(lengths))
        for concurrency in sorted(set(concurrencies))
    ]


def too_large(wanted: Sequence[Group], new_tokens: int, longest: int, device_tokens: int) -> list[str]:
    """A line for each group that the engine cannot take. 0: the engine does not say."""
    lines = []
    for group in wanted:
        whole = group.prompt_tokens + new_tokens
        if longest and whole > longest:
            lines.append(f"prompts of {group.prompt_tokens:,} tokens: the engine takes {longest - new_tokens:,}")
        elif device_tokens and whole > device_tokens:
            lines.append(f"prompts of {group.prompt_tokens:,} tokens: device memory holds {device_tokens:,}")
    return lines


def fillers(device_tokens: int, longest: int) -> list[int]:
    """Lengths of prompts that are together more than device memory holds, while each fits in with room to spare."""
    count = max(3, -(-device_tokens // max(1, min(longest or device_tokens, device_tokens // 2) - 64)))
    return [-(-device_tokens // count) + 64] * count


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace. at_s: seconds after the first."""

    at_s: float
    prompt: list[int]


def from_trace(path: Path, draw: Draw, limit: int, block_tokens: int, longest: int) -> list[TraceRequest]:
    """The first requests of a trace (Mooncake's format); TraceError for what is none.

    Equal blocks become equal tokens, `block_tokens` for each of the trace's 512; what does not fill a block is the
    request's own. Prompts are cut to `longest` tokens.
    """
    found = []
    blocks: dict[int, list[int]] = {}
    with TemporaryDirectory(prefix="hicache-bench-") as folder:
        for number, (length, seconds, chain) in enumerate(compile_trace(path, Path(folder), limit)):
            ids: list[int] = []
            for node in chain[: -(-longest // block_tokens)]:
                if node not in blocks:
                    blocks[node] = draw._ids(block_tokens, _BLOCK, node & ((1 << 63) - 1))
                ids += blocks[node]
            rest = (length - len(chain) * BLOCK_TOKENS) * block_tokens // BLOCK_TOKENS
            ids += draw._ids(max(0, min(rest, longest - len(ids))), _TAIL, number)
            found.append(TraceRequest(seconds, ids[:longest] or draw._ids(1, _TAIL, number)))
    if not found:
        raise TraceError(f"{path}: no requests in it")
    start = min(request.at_s for request in found)
    return [TraceRequest(request.at_s - start, request.prompt) for request in found]

"""Requests of a published trace, turned into prompts of token ids.

What belongs here: reading the trace and drawing tokens, both pure and repeatable. What does not: sending them.

The trace names each 512-token block of a prompt by an id; equal ids mean equal prefixes. A block here is
fewer tokens, drawn from a generator that is seeded with the id: so prompts share exactly the prefixes that they
shared in the trace, and a replay sends exactly the same tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOKENS_PER_BLOCK = 64
LONGEST_PROMPT = 3584


@dataclass(frozen=True)
class TraceRequest:
    """One line of the trace. hash_ids: the ids of the prompt's blocks, first to last."""

    hash_ids: tuple[int, ...]


def load_trace(path: Path, limit: int) -> list[TraceRequest]:
    """The first `limit` requests of a JSON-lines trace. Raises ValueError naming the line that is no request."""
    requests: list[TraceRequest] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(requests) == limit:
                break
            if not line.strip():
                continue
            try:
                requests.append(TraceRequest(tuple(int(block) for block in json.loads(line)["hash_ids"])))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a request with `hash_ids`: {error!r}") from error
    return requests


def block_tokens(hash_id: int, vocabulary: int, tokens: int = TOKENS_PER_BLOCK) -> list[int]:
    """The tokens that stand for a block, each in [0, vocabulary)."""
    return np.random.default_rng(hash_id).integers(0, vocabulary, tokens).tolist()


def prompt_tokens(
    request: TraceRequest, vocabulary: int, block: int = TOKENS_PER_BLOCK, longest: int = LONGEST_PROMPT
) -> list[int]:
    """A request's prompt, cut to `longest` tokens."""
    tokens: list[int] = []
    for hash_id in request.hash_ids:
        if len(tokens) >= longest:
            break
        tokens += block_tokens(hash_id, vocabulary, block)
    return tokens[:longest]

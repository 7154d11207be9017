"""A trace's requests, sent twice: rows of what the second time brought from where.

Belongs here: sums over a replay's replies. Does not belong here: sending (hicache_ext.bench.serve).

Requests of a trace share prefixes, so each comes from several tiers; a row holds the requests of one pass that got most
of their tokens from its tier. The first pass is what the engine computes anyway; in the second its memory is empty.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hicache_ext.bench.serve_client import Reply
from hicache_ext.bench.serve_matrix import Tier
from hicache_ext.bench.serve_summary import Cell, Sample, rows

PASSES = ("first", "replay")


def most_from(reply: Reply, storage: Tier) -> Tier:
    """The tier that gave most of a prompt's tokens; `none`: most were computed."""
    computed = reply.prompt_tokens - sum(reply.cached.values())
    order = {Tier.NONE: computed, Tier.DEVICE: reply.cached.get("device", 0), Tier.HOST: reply.cached.get("host", 0)}
    order[storage] = reply.cached.get("storage", 0)
    return max(order, key=lambda tier: order[tier])


def trace_rows(
    subject: str,
    which: str,
    replies: Sequence[Reply],
    before: Sequence[Reply] | None,
    concurrency: int,
    storage: Tier,
) -> list[dict[str, Any]]:
    """Rows of one pass; `before`: the replies of the pass whose outputs these must equal.

    concurrency 0: requests came at the trace's times. prompt_tokens is the row's median.
    """
    groups: dict[Tier, list[int]] = {}
    for number, reply in enumerate(replies):
        if not reply.error:
            groups.setdefault(most_from(reply, storage), []).append(number)
    found = []
    for tier, numbers in sorted(groups.items(), key=lambda each: list(Tier).index(each[0])):
        mine = [replies[number] for number in numbers]
        length = round(statistics.median(reply.prompt_tokens for reply in mine))
        expected = [before[number].tokens for number in numbers] if before is not None else None
        sample = Sample(Cell(subject, tier, length, concurrency), mine, 0.0, expected)
        (row,) = rows([sample], 1, {subject: storage})
        del row["reached"]
        found.append({**row, "pass": which})
    return found


def pass_line(which: str, replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """A whole pass: throughput, errors, seconds."""
    good = [reply for reply in replies if not reply.error]
    return {
        "pass": which,
        "seconds": round(seconds, 2),
        "requests": len(good),
        "errors": len(replies) - len(good),
        "prompt_tokens": sum(reply.prompt_tokens for reply in good),
        "prompt_tokens_per_s": round(sum(reply.prompt_tokens for reply in good) / seconds, 1),
        "output_tokens_per_s": round(sum(len(reply.tokens) for reply in good) / seconds, 1),
    }

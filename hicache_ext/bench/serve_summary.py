"""What the replies say: percentiles, rows, and the prompt lengths at which a tier loses to computing.

Belongs here: pure functions of what was measured. Does not belong here: measuring (hicache_ext.bench.serve).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hicache_ext.bench.serve_client import Reply
from hicache_ext.bench.serve_matrix import STORAGE, Tier

#: Of the tokens that a tier could have given, the part from which on a row counts as that tier's.
_REACHED = 0.9


@dataclass(frozen=True)
class Cell:
    """What a row is about."""

    subject: str
    tier: Tier
    prompt_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Sample:
    """Replies to prompts that were asked together. seconds: for all of them.

    expected: the output ids after a device hit of the same prefix length, one list for each reply; None: there was no
    device hit to compare with.
    """

    cell: Cell
    replies: Sequence[Reply]
    seconds: float
    expected: Sequence[list[int]] | None = None


def percentile(values: Sequence[float], part: float) -> float:
    """Linear between the values next to it; `values` need no order. ValueError for none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    at = part * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def rows(samples: Iterable[Sample], page_tokens: int, storage: Mapping[str, Tier]) -> list[dict[str, Any]]:
    """One row for each cell, in the order in which cells first appear.

    page_tokens: the engine's; the last token of a prompt is always computed, and pages are cached whole.
    storage: for each subject, what its storage tier is called.
    """
    cells: dict[Cell, list[Sample]] = {}
    for sample in samples:
        cells.setdefault(sample.cell, []).append(sample)
    return [_row(cell, found, page_tokens, storage.get(cell.subject, Tier.LOCAL)) for cell, found in cells.items()]


def _row(cell: Cell, samples: Sequence[Sample], page_tokens: int, storage: Tier) -> dict[str, Any]:
    if cell.tier in STORAGE:
        storage = cell.tier
    good = [reply for sample in samples for reply in sample.replies if not reply.error]
    errors = [reply.error for sample in samples for reply in sample.replies if reply.error]
    first = [reply.first_s * 1e3 for reply in good]
    between = [seconds * 1e3 for reply in good if (seconds := reply.per_token_s) is not None]
    seconds = sum(sample.seconds for sample in samples)
    tokens = tokens_from(good, storage)
    compared = [
        reply.tokens == expected
        for sample in samples
        if sample.expected is not None
        for reply, expected in zip(sample.replies, sample.expected, strict=True)
        if not reply.error
    ]
    return {
        "subject": cell.subject,
        "tier": str(cell.tier),
        "prompt_tokens": cell.prompt_tokens,
        "concurrency": cell.concurrency,
        "ttft_ms": _rounded(first, 0.5),
        "ttft_p90_ms": _rounded(first, 0.9),
        "ttft_p99_ms": _rounded(first, 0.99),
        "tpot_ms": _rounded(between, 0.5),
        "prompt_tokens_per_s": round(sum(reply.prompt_tokens for reply in good) / seconds, 1) if seconds else None,
        "output_tokens_per_s": round(sum(len(reply.tokens) for reply in good) / seconds, 1) if seconds else None,
        "requests": len(good),
        "errors": len(errors),
        "error": errors[0] if errors else "",
        "tokens_from": tokens,
        "reached": reached(cell.tier, good, tokens, page_tokens),
        "identical": all(compared) if compared else None,
        "different": sum(not same for same in compared),
    }


def _rounded(values: Sequence[float], part: float) -> float | None:
    return round(percentile(values, part), 2) if values else None


def tokens_from(replies: Iterable[Reply], storage: Tier) -> dict[str, int]:
    """Prompt tokens by where they came from; `storage` names the storage tier."""
    found = {"computed": 0, "device": 0, "host": 0, str(storage): 0}
    for reply in replies:
        found["device"] += reply.cached.get("device", 0)
        found["host"] += reply.cached.get("host", 0)
        found[str(storage)] += reply.cached.get("storage", 0)
        found["computed"] += reply.prompt_tokens - sum(reply.cached.values())
    return found


def reached(tier: Tier, replies: Sequence[Reply], tokens: Mapping[str, int], page_tokens: int) -> bool:
    """Whether the prompts came from the tier that they were meant to come from."""
    whole = sum((reply.prompt_tokens - 1) // max(1, page_tokens) * max(1, page_tokens) for reply in replies)
    mine = tokens["computed"] if tier is Tier.NONE else tokens.get(str(tier), 0)
    return bool(replies) and mine >= _REACHED * whole


@dataclass(frozen=True)
class Span:
    """Prompt lengths, from and to; at_edge: whether it begins or ends where measuring did, so that it may go on."""

    first: float
    last: float
    at_edge: tuple[bool, bool]

    def __str__(self) -> str:
        first = f"{self.first:,.0f}" + (" (the shortest measured)" if self.at_edge[0] else "")
        last = f"{self.last:,.0f}" + (" (the longest measured)" if self.at_edge[1] else "")
        return f"{first} to {last}"


def losing(tier: Mapping[int, float], computing: Mapping[int, float]) -> list[Span]:
    """Prompt lengths at which the tier takes longer than computing.

    Both map prompt tokens to milliseconds. Only lengths that both have count; between two of them the difference is
    taken as linear, so that a crossing lies where that line meets zero. A tie is no loss.
    """
    at = sorted(tier.keys() & computing.keys())
    late = {tokens: tier[tokens] - computing[tokens] for tokens in at}
    spans: list[Span] = []
    start: tuple[float, bool] | None = None
    if at and late[at[0]] > 0:
        start = (at[0], True)
    for here, there in pairwise(at):
        before, after = late[here], late[there]
        if (before > 0) == (after > 0):
            continue
        crossing = here + (there - here) * before / (before - after)
        if start is None:
            start = (crossing, False)
        else:
            spans.append(Span(start[0], crossing, (start[1], False)))
            start = None
    if start is not None:
        spans.append(Span(start[0], at[-1], (start[1], True)))
    return spans


#: Milliseconds by prompt tokens, by subject, tier and concurrency.
Curves = Mapping[tuple[str, str, int], Mapping[int, float]]


def curves(found: Sequence[Mapping[str, Any]]) -> Curves:
    """Rows that did not come from their tier are left out."""
    made: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in found:
        if row["reached"] and row["ttft_ms"] is not None:
            key = (row["subject"], row["tier"], row["concurrency"])
            made.setdefault(key, {})[row["prompt_tokens"]] = row["ttft_ms"]
    return made


def computing(measured: Curves, subject: str, concurrency: int) -> tuple[str, Mapping[int, float]]:
    """What computing takes: by the subject `recompute` where it was measured, else the subject's own prompts that
    nothing had cached. Its name and its curve."""
    against = "recompute" if ("recompute", "none", concurrency) in measured else subject
    return against, measured.get((against, "none", concurrency), {})


def verdicts(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each subject, storage tier and concurrency: the lengths at which it loses to computing."""
    measured = curves(found)
    lines = []
    for (subject, tier, concurrency), curve in measured.items():
        if tier not in STORAGE:
            continue
        against, alone = computing(measured, subject, concurrency)
        common = sorted(curve.keys() & alone.keys())
        if common:
            lines.append(
                {
                    "subject": subject,
                    "tier": tier,
                    "concurrency": concurrency,
                    "against": against,
                    "measured": [common[0], common[-1]],
                    "loses": [
                        {"from": round(span.first), "to": round(span.last), "open": list(span.at_edge)}
                        for span in losing(curve, alone)
                    ],
                }
            )
    return lines


def against_cold(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each subject, how many outputs of cold prompts are not those after a device hit: what another order of sums
    does to near ties, with no tier below the device in play."""
    counts: dict[str, list[int]] = {}
    for row in found:
        if row["tier"] == Tier.NONE and row["identical"] is not None:
            count = counts.setdefault(row["subject"], [0, 0])
            count[0] += row["requests"]
            count[1] += row["different"]
    return [{"subject": name, "requests": all_, "different": some} for name, (all_, some) in counts.items()]


def disk_bounds(
    found: Sequence[Mapping[str, Any]], read_gb_per_s: Mapping[str, float], kv_bytes: int
) -> list[dict[str, Any]]:
    """Each row of a storage tier beside what its disk allows: its bytes at the plain read speed, and a host hit on top.

    read_gb_per_s: by subject. kv_bytes: of one token. Only single requests: others share the disk.
    """
    host = {
        (row["subject"], row["prompt_tokens"]): row["ttft_ms"]
        for row in found
        if row["tier"] == "host" and row["concurrency"] == 1 and row["reached"]
    }
    lines = []
    for row in found:
        speed = read_gb_per_s.get(row["subject"])
        if not (speed and kv_bytes and row["tier"] == "local" and row["concurrency"] == 1 and row["reached"]):
            continue
        disk_ms = row["prompt_tokens"] * kv_bytes / speed / 1e6
        bound_ms = disk_ms + (host.get((row["subject"], row["prompt_tokens"])) or 0.0)
        lines.append(
            {
                "subject": row["subject"],
                "prompt_tokens": row["prompt_tokens"],
                "ttft_ms": row["ttft_ms"],
                "disk_ms": round(disk_ms, 1),
                "disk_and_host_hit_ms": round(bound_ms, 1),
                "ratio": round(row["ttft_ms"] / bound_ms, 3),
            }
        )
    return lines


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """A verdict as a sentence."""
    who = f"{verdict['subject']}, {verdict['tier']}, {verdict['concurrency']} at a time"
    low, high = verdict["measured"]
    if not verdict["loses"]:
        return f"{who}: loses to recompute nowhere from {low:,} to {high:,} tokens"
    spans = [Span(each["from"], each["to"], tuple(each["open"])) for each in verdict["loses"]]
    return f"{who}: loses to recompute from " + ", and from ".join(map(str, spans)) + " tokens"

"""Measuring block copies: pages between paged device pools and page buffers, beside what else can move them.

Belongs here: cells, rounds, checks and rows of `bench copy`. Does not belong here: subjects (copy_subjects,
copy_sgl), a decode beside a load (copy_decode), tables and files (hicache_ext.cli.bench_copy).

A page is TOKENS x 64 KiB: 32 layers, K and V, 4 KV heads of 128 in bfloat16 (Llama-3.1-8B at tensor parallelism 2). The
pools have as many pages as are moved, in random order on both sides. A round is the time between two CUDA events around
the call, so the host's part counts as far as the device waits for it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hicache_ext.bench.copy_sgl import by_sgl_kernel
from hicache_ext.bench.copy_subjects import TORCH_BYTES, Cell, Subject, by_torch, memcpy, ours
from hicache_ext.cuda import CudaUnavailable, open_device
from hicache_ext.cuda.layouts import BlockShape

LAYERS, HEADS, HEAD_BYTES = 32, 4, 256
TOKEN_BYTES = 2 * LAYERS * HEADS * HEAD_BYTES
LAYOUTS = ("page_first", "page_first_direct", "layer_first", "page_head", "canonical")
OPS = ("h2d", "d2h")
#: Larger cells are timed and not compared byte for byte: the smaller ones ran the same code.
_CHECKED_BYTES = 160 << 20
#: Of the largest cells fewer rounds are taken.
_LARGE_BYTES, _LARGE_ROUNDS = 1 << 30, 3


@dataclass(frozen=True)
class Plan:
    """tokens: page sizes in units of 64 KiB. pages: how many at a time."""

    tokens: tuple[int, ...] = (1, 4, 16, 64, 128)
    pages: tuple[int, ...] = (1, 8, 64, 512)
    layouts: tuple[str, ...] = LAYOUTS
    rounds: int = 7


QUICK = Plan((1, 4, 64), (8, 64), rounds=3)


def facts() -> dict[str, Any]:
    """The device and what runs on it. CudaUnavailable without a device or torch with CUDA."""
    device = open_device()
    try:
        import torch
    except ImportError as error:
        raise CudaUnavailable(f"the yardsticks need torch: {error}") from error
    if not torch.cuda.is_available():
        raise CudaUnavailable("this torch has no CUDA")
    driver = f"{device.driver // 1000}.{device.driver % 1000 // 10}"
    found = {"gpu": device.name, "multiprocessors": device.multiprocessors, "cuda_driver": driver}
    try:
        import sgl_kernel

        found["sgl-kernel"] = sgl_kernel.__version__
    except Exception as error:  # it looks for its binaries at import, and raises what it likes
        found["sgl-kernel"] = f"not here: {error}".splitlines()[0][:120]
    return found


def run(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of every cell. RuntimeError when a copy is wrong."""
    import torch

    # As in an engine, copies have a stream of their own: the default stream takes no batches.
    with torch.cuda.stream(torch.cuda.Stream()):
        return _run(plan, say)


def _run(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    import torch

    most = max(plan.tokens) * max(plan.pages) * TOKEN_BYTES
    device = torch.empty(most, dtype=torch.uint8, device="cuda")
    host = torch.empty(most, dtype=torch.uint8, pin_memory=True)
    rows = []
    for layout in plan.layouts:
        for tokens in plan.tokens:
            for pages in plan.pages:
                shape = BlockShape(LAYERS, 2, tokens, HEADS, HEAD_BYTES)
                for op in OPS:
                    draw = np.random.default_rng(tokens * 1000 + pages)
                    numbers = draw.permutation(pages), draw.permutation(pages)
                    cell = Cell(layout, shape, pages, op, device, host, *numbers)
                    say(f"{layout} {op} {pages} x {tokens * 64} KiB")
                    rows += _cell(cell, plan.rounds)
    return rows


def _cell(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    taking_part = [memcpy(cell), *ours(cell), *by_sgl_kernel(cell)]
    if cell.bytes <= TORCH_BYTES:
        taking_part.append(by_torch(cell))
    if cell.bytes <= _CHECKED_BYTES:
        for subject in taking_part:
            _check(cell, subject)
    samples: dict[str, list[float]] = {}
    draw = random.Random(1)
    rounds = min(rounds, _LARGE_ROUNDS) if cell.bytes > _LARGE_BYTES else rounds
    for round_ in range(rounds + 1):
        # Drawn anew: who comes after whom tells in the device's address translation, and in caches.
        for subject in draw.sample(taking_part, len(taking_part)):
            if round_ > subject.most_rounds:
                continue
            seconds = _timed(subject)
            if round_:  # the first warms up
                samples.setdefault(f"{subject.name}/{subject.way}", []).append(seconds)
    return [_row(cell, subject, samples[f"{subject.name}/{subject.way}"]) for subject in taking_part]


def _timed(subject: Subject) -> float:
    """Seconds on the device's clock."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    try:
        subject.go()
        end.record()
        torch.cuda.synchronize()
    except Exception as error:
        raise RuntimeError(f"{subject.name} ({subject.way}): {error}") from error
    return begin.elapsed_time(end) / 1e3


def _check(cell: Cell, subject: Subject) -> None:
    """Random bytes on the source's side, others on the target's: afterwards both are the same where they should be."""
    import torch

    load = cell.op == "h2d"
    source, target = (cell.host, cell.device) if load else (cell.device, cell.host)
    fresh = torch.randint(0, 256, (cell.bytes,), dtype=torch.uint8, device="cuda")
    source[: cell.bytes].copy_(fresh)
    target[: cell.bytes].copy_(fresh ^ 0xFF)
    torch.cuda.synchronize()
    subject.go()
    torch.cuda.synchronize()
    if not cell.moved(subject.whole):
        raise RuntimeError(f"{subject.name} ({subject.way}) copied wrongly: {cell}")


def _row(cell: Cell, subject: Subject, seconds: list[float]) -> dict[str, Any]:
    speeds = sorted(cell.bytes / 1e9 / each for each in seconds)
    return {
        "subject": subject.name,
        "op": cell.op,
        "layout": cell.layout,
        "page": cell.shape.page_bytes,
        "pages": cell.pages,
        "gb_per_s": round(statistics.median(speeds), 3),
        "spread": [round(speeds[0], 3), round(speeds[-1], 3)],
        "way": subject.way,
        "multiprocessors": subject.multiprocessors,
        "rounds": len(speeds),
    }


def limits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the goals ask, for each cell of 64 pages or more: ours beside memcpy and the best of sgl-kernel."""
    found = []
    for row in rows:
        if row["subject"] != "ours" or row["pages"] < 64:
            continue
        like = [
            other
            for other in rows
            if all(other[name] == row[name] for name in ("op", "layout", "page", "pages"))
        ]  # fmt: skip
        best = {
            name: max((other["gb_per_s"] for other in like if other["subject"] == name), default=0.0)
            for name in ("memcpy", "sgl-kernel")
        }
        of_memcpy = row["gb_per_s"] / best["memcpy"] if best["memcpy"] else 0.0
        goal = 0.9 if row["page"] >= 256 << 10 else 0.7
        found.append(
            {
                **{name: row[name] for name in ("op", "layout", "page", "pages", "way")},
                "of_memcpy": round(of_memcpy, 3),
                "goal": goal,
                "of_sgl_kernel": round(row["gb_per_s"] / best["sgl-kernel"], 3) if best["sgl-kernel"] else None,
                "met": of_memcpy >= goal and row["gb_per_s"] >= best["sgl-kernel"],
            }
        )
    return found


def curve(say: Callable[[str], None], rounds: int) -> list[dict[str, Any]]:
    """Ours by kernel and by stage on more and fewer multiprocessors, 64 pages of 1 MiB, page_first."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        return _curve(say, rounds)


def _curve(say: Callable[[str], None], rounds: int) -> list[dict[str, Any]]:
    import torch

    shape, pages = BlockShape(LAYERS, 2, 16, HEADS, HEAD_BYTES), 64
    device = torch.empty(pages * shape.page_bytes, dtype=torch.uint8, device="cuda")
    host = torch.empty(pages * shape.page_bytes, dtype=torch.uint8, pin_memory=True)
    rows = []
    for op in OPS:
        draw = np.random.default_rng(1)
        cell = Cell("page_first", shape, pages, op, device, host, draw.permutation(pages), draw.permutation(pages))
        for limit in (1, 2, 3, 4, 6, 8, 16, 32):
            say(f"{limit} multiprocessors, {op}")
            for subject in ours(cell, limit):
                if subject.name in ("ours-kernel", "ours-stage", "ours-layers"):
                    taken = [_timed(subject) for _ in range(rounds + 1)]
                    rows.append(_row(cell, subject, taken[1:]))
    return rows

"""`hicache-ext bench policy`: what each order of eviction would have saved on a trace.

Belongs here: which policies and capacities are run, rows for scripts, the plot. Does not belong here: the replay
itself (replay.py), options and tables (hicache_ext.cli).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hicache_ext.bench.replay import Outcome, belady, replay
from hicache_ext.bench.trace import Trace, compile_trace
from storage_backends.local.policy import DEFAULT, ORDERS, Admission, Always, SecondHit, Tier, WriteBudget

CAPACITIES = (0.01, 0.05, 0.10, 0.25, 0.50)
QUICK_CAPACITIES = (0.01, 0.10)
QUICK_REQUESTS = 15_000
ADMISSIONS = ("always", "second-hit", "write-budget")
BOUND = "belady"


@dataclass(frozen=True)
class Setup:
    """admission: one of ADMISSIONS, for every order. budget: pages a day. front: part of the footprint."""

    capacities: Sequence[float] = CAPACITIES
    admission: str = "always"
    budget: float = 0.0
    front: float = 0.0

    def admit(self, capacity: int) -> Admission:
        if self.admission == "second-hit":
            return SecondHit(capacity)
        if self.admission == "write-budget":
            return WriteBudget(self.budget, burst=self.budget / 24)  # an idle hour may be caught up with
        return Always()


@contextmanager
def opened(path: Path, limit: int | None, progress: Callable[[str], None]) -> Iterator[Trace]:
    """The trace as arrays in a temporary folder (TMPDIR says where), gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="hicache-trace-") as folder:
        yield compile_trace(path, Path(folder), limit, progress)


def run(trace: Trace, setup: Setup, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per capacity and policy, the bound first."""
    rows = []
    front = round(setup.front * trace.distinct)
    for fraction in setup.capacities:
        capacity = max(1, round(fraction * trace.distinct))
        for policy in (BOUND, *ORDERS):
            progress(f"{policy} at {fraction:.0%} of {trace.distinct:,} pages")
            if policy == BOUND:
                outcome = belady(trace, capacity + front)
            else:
                outcome = replay(trace, Tier(ORDERS[policy](capacity), setup.admit(capacity)), front)
            rows.append(_row(trace, policy, fraction, capacity, outcome, setup))
    return rows


def _row(trace: Trace, policy: str, fraction: float, capacity: int, outcome: Outcome, setup: Setup) -> dict[str, Any]:
    per_read = outcome.written_per_read()
    row: dict[str, Any] = {
        "policy": policy,
        "capacity_fraction": fraction,
        "token_hit_ratio": round(outcome.token_hit_ratio(trace), 6),
        "bytes_written_per_byte_read": None if per_read is None else round(per_read, 4),
        "capacity_pages": capacity,
        "pages": {"front": outcome.front, "read": outcome.read, "written": outcome.written},
    }
    if policy != BOUND:
        row |= {
            "admission": setup.admission,
            "evicted": dict(sorted(outcome.evicted.items())),
            "rejected": dict(sorted(outcome.rejected.items())),
        }
    if policy == DEFAULT:
        row["default"] = True
    return row


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Token hit ratio and bytes written per byte read over capacity. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (hits, writes) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["capacity_fraction"])
        x = [100 * row["capacity_fraction"] for row in mine]
        bound = policy == BOUND
        label = "Belady's bound" if bound else f"{policy} (default)" if policy == DEFAULT else policy
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if bound else {"marker": "o"}
        style |= {"label": label, "linewidth": 2.4 if policy == DEFAULT else 1.4}
        hits.plot(x, [row["token_hit_ratio"] for row in mine], **style)
        if not bound:
            per_read = [row["bytes_written_per_byte_read"] for row in mine]
            writes.plot(x, [float("nan") if value is None else value for value in per_read], **style)
    hits.set(ylabel="token hit ratio", ylim=(0, None))
    writes.set(ylabel="bytes written per byte read back", yscale="log")
    decades = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
    low, high = writes.get_ylim()
    writes.set_yticks([tick for tick in decades if low <= tick <= high], minor=False)
    writes.yaxis.set_major_formatter("{x:g}")
    ticks = sorted({100 * row["capacity_fraction"] for row in rows})
    for axes in (hits, writes):
        axes.set(xlabel="capacity, % of the footprint", xscale="log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    hits.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

"""The picture of `bench serve`: time to first token over prompt length, a line for each subject and tier.

Belongs here: drawing. Does not belong here: what is drawn (hicache_ext.bench.serve_summary).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLES = {"none": ":", "device": "-.", "host": "--", "local": "-", "remote": (0, (5, 1, 1, 1, 1, 1))}


def title_of(subjects: Mapping[str, Mapping[str, Any]]) -> str:
    """The subjects of a result, and which of them store in memory."""
    return ", ".join(
        f"{name} (pages in memory)" if about.get("ram_backed") else name for name, about in subjects.items()
    )


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Medians, with a bar up to the 90th percentile; one panel for each concurrency. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["ttft_ms"] is not None and row.get("reached", True)]
    panels = sorted({row["concurrency"] for row in rows}) or [1]
    width = 2.0 + 4.5 * len(panels)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width, 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    for concurrency, panel in zip(panels, axes[0], strict=True):
        mine = [row for row in rows if row["concurrency"] == concurrency]
        for subject, tier in dict.fromkeys((row["subject"], row["tier"]) for row in mine):
            line = sorted(
                (row for row in mine if (row["subject"], row["tier"]) == (subject, tier)),
                key=lambda row: row["prompt_tokens"],
            )
            middle = [row["ttft_ms"] for row in line]
            above = [max(0.0, row["ttft_p90_ms"] - row["ttft_ms"]) for row in line]
            panel.errorbar(
                [row["prompt_tokens"] for row in line],
                middle,
                yerr=[[0.0] * len(line), above],
                label=f"{subject}, {tier}",
                color=f"C{subjects.index(subject) % 10}",
                linestyle=_STYLES[tier],
                marker="o",
                markersize=4,
                capsize=2,
            )
        panel.set(xscale="log", yscale="log", xlabel="prompt tokens", title=f"{concurrency} at a time")
        ticks = sorted({row["prompt_tokens"] for row in mine})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].set(ylabel="time to first token, ms")
    low, high = axes[0][0].get_ylim()
    steps = [digit * 10**power for power in range(-1, 7) for digit in (1, 2, 5)]
    shown = [step for step in steps if low <= step <= high]
    axes[0][0].set_yticks(shown, [f"{step:,g}" for step in shown])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="medium")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

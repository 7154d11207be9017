"""What `bench tiers` should show: the goals, and what rows say of them.

Belongs here: goals over rows. Does not belong here: measuring, tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hicache_ext.bench.io_goals import Verdict, size_name
from hicache_ext.bench.tiers import ALL, CASCADE, CHECKSUMS, Row
from hicache_ext.bench.tiers_rounds import Role

#: Speed and CPU of the plain client's, or of a tool's where there is no plain client. Neither checks anything, and
#: where they cost less than checksums do no tier that checks can come near: so CPU is also held against theirs plus one
#: pass of checksums over the same bytes. Of a tool, which has no Python either, only against that.
SPEED, CPU = 0.9, 1.2
#: Reads whose pages are all in the first tier, of the first tier's alone: with further tiers, and with a dead one.
ALL_LOCAL, ONE_DEAD = 0.97, 0.98


def verdicts(rows: Sequence[Row]) -> Iterator[Verdict]:
    """The goals that these rows can speak of."""
    for row in rows:
        if row["role"] != Role.OURS or row["case"] == "lookup":
            continue
        what = f"{row['tier']}, {row['case']} of {size_name(row['page'])}"
        if row["tier"] == CASCADE:
            if row["case"] == "read":
                limit = ALL_LOCAL if row["subject"] == ALL else ONE_DEAD
                for other, ratio in row["beside"].items():
                    yield Verdict(f"{what}, {row['subject']}: {{}} of {other}", ratio["speed"], limit, True)
            continue
        beside = {name: _like(rows, row, name) for name in row["beside"]}
        plain = [name for name, other in beside.items() if other["role"] == Role.PLAIN]
        for name in plain or beside:
            yield Verdict(f"{what}: {{}} of {name}'s speed", row["beside"][name]["speed"], SPEED, True)
            if plain:
                yield Verdict(f"{what}: {{}} of {name}'s CPU", row["beside"][name]["cpu"] or 0.0, CPU, False)
            checked = with_pass(rows, row, name)
            if checked is not None:
                yield Verdict(f"{what}: {{}} of {name}'s CPU and one pass of checksums", checked, CPU, False)


def add_passes(rows: Sequence[Row]) -> None:
    """To each ratio of ours to another `cpu_with_pass`: CPU beside the other's plus one pass of checksums."""
    for row in rows:
        for name, ratio in row["beside"].items():
            ratio["cpu_with_pass"] = with_pass(rows, row, name)


def with_pass(rows: Sequence[Row], row: Row, subject: str) -> float | None:
    """CPU of this row over that of `subject` and one pass of checksums together; None where one was not measured."""
    checks = [other["cpu_s_per_gb"] for other in rows if other["tier"] == CHECKSUMS and other["page"] == row["page"]]
    ours, floor = row["cpu_s_per_gb"], _like(rows, row, subject)["cpu_s_per_gb"]
    return float(f"{ours / (floor + checks[0]):.5g}") if checks and ours is not None and floor is not None else None


def _like(rows: Sequence[Row], row: Row, subject: str) -> Row:
    """Another subject's row of the same tier, case and page."""
    same = ("tier", "case", "page")
    return next(
        other for other in rows if other["subject"] == subject and all(other[name] == row[name] for name in same)
    )

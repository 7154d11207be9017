"""What `bench tiers` should show: the goals, and what rows say of them.

Belongs here: goals over rows. Does not belong here: measuring, tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hicache_ext.bench.io_goals import Verdict, size_name
from hicache_ext.bench.tiers import ALL, CASCADE, CHECKSUMS, Row
from hicache_ext.bench.tiers_rounds import Role

#: Speed and CPU of the plain client's. Where there is only a tool, which has no Python and checks nothing: the same of
#: its speed, and of its CPU plus one pass of checksums.
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
            else:
                checks = [other["cpu_s_per_gb"] for other in rows if other["tier"] == CHECKSUMS
                          and other["page"] == row["page"]]  # fmt: skip
                floor = beside[name]["cpu_s_per_gb"] + sum(checks)
                words = f"{what}: {{}} of {name}'s CPU and one pass of checksums"
                yield Verdict(words, row["cpu_s_per_gb"] / floor, CPU, False)


def _like(rows: Sequence[Row], row: Row, subject: str) -> Row:
    """Another subject's row of the same tier, case and page."""
    same = ("tier", "case", "page")
    return next(
        other for other in rows if other["subject"] == subject and all(other[name] == row[name] for name in same)
    )

"""What is compared with what: ratios of rows of one run, and whether ours is where it should be.

Belongs here: the goals and their arithmetic over rows. Does not belong here: measuring, tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from storage_backends.local.engine import PREFERENCE

Row = dict[str, Any]

#: Speed of fio's at depth 32, by block.
FIO_SPEED = {256 << 10: 0.9, 2 << 20: 0.95}
STOCK_READ_SPEED = 5.0
NIXL_READ_SPEED = 1.2
STOCK_CPU = 1 / 20
PASSES_OVER_FIO = 1.3
TICKER_MS = 2.0
_DEPTH = 32


@dataclass(frozen=True)
class Verdict:
    """what: in words, what of ours. value, limit: as far as it got, and where it should be (at least, or at most)."""

    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        goal = f"{'at least' if self.at_least else 'at most'} {self.limit:.3g}"
        return f"{self.what.format(f'{self.value:.3g}')} (goal: {goal}): {'met' if self.met else 'MISSED'}"

    def row(self) -> Row:
        return {"goal": self.line(), "value": round(self.value, 4), "limit": round(self.limit, 4), "met": self.met}


def ratio(row: Row, rows: Iterable[Row], subject: str, key: str = "gb_per_s") -> float | None:
    """This row's value over the subject's in the same case, block and memory; None where there is nothing like it.

    At the same depth, but a subject that was measured at one depth only (stock knows none) stands for all.
    """
    if row["subject"] == subject:
        return None
    like = [
        other
        for other in rows
        if other["subject"] == subject
        and all(other[name] == row[name] for name in ("case", "block", "pages"))
        and other.get("dir") == row.get("dir")
    ]
    same = [other for other in like if other["depth"] == row["depth"]] or (like if len(like) == 1 else [])
    return row[key] / same[0][key] if same and same[0][key] else None


def verdicts(rows: list[Row], suite: str) -> list[Verdict]:
    """The goals that these rows can speak of, for the first of our engines, in huge pages (else in what there is)."""
    return list(_engine(rows) if suite == "engine" else _adapter(rows)) + list(_ticker(rows))


def _ours(rows: list[Row]) -> list[Row]:
    ours = [row for row in rows if row["subject"] == "ours"]
    order = {name: place for place, name in enumerate(PREFERENCE)}
    best = min((order.get(row["engine"], len(order)) for row in ours), default=0)
    pages = "huge" if any(row["pages"] == "huge" for row in ours) else "4k"
    return [row for row in ours if order.get(row["engine"], len(order)) == best and row["pages"] == pages]


def _engine(rows: list[Row]) -> Iterator[Verdict]:
    for row in _ours(rows):
        limit = FIO_SPEED.get(row["block"])
        of_fio = ratio(row, rows, "fio")
        if limit and of_fio and row["depth"] == _DEPTH and row["op"] != "mixed":
            yield Verdict(f"{_name(row)} depth {row['depth']}: {{}} of fio", of_fio, limit, True)


def _adapter(rows: list[Row]) -> Iterator[Verdict]:
    passes = [row for row in rows if row["subject"] == "verified_pass"]
    for row in _ours(rows):
        if row["op"] == "read":
            for subject, limit in (("stock-file", STOCK_READ_SPEED), ("nixl-posix", NIXL_READ_SPEED)):
                if speed := ratio(row, rows, subject):
                    yield Verdict(f"{_name(row)}: {{}} times {subject}", speed, limit, True)
        if cpu := ratio(row, rows, "stock-file", "cpu_s_per_gb"):
            yield Verdict(f"{_name(row)}: {{}} of stock-file's CPU", cpu, STOCK_CPU, False)
        fio = ratio({**row, "cpu_s_per_gb": 1.0}, rows, "fio", "cpu_s_per_gb")
        check = [one for one in passes if (one["block"], one["pages"]) == (row["block"], row["pages"])]
        if fio and check:
            limit = 1 / fio + PASSES_OVER_FIO * check[0]["cpu_s_per_gb"]
            what = f"{_name(row)}: {{}} CPU s/GB, fio {1 / fio:.3g} and verified pass {check[0]['cpu_s_per_gb']:.3g}"
            yield Verdict(what, row["cpu_s_per_gb"], limit, False)


def _ticker(rows: list[Row]) -> Iterator[Verdict]:
    ours = _ours(rows)
    if ours:
        worst = max(ours, key=lambda row: row["ticker_p99_ms"]["load"] - row["ticker_p99_ms"]["idle"])
        added = worst["ticker_p99_ms"]["load"] - worst["ticker_p99_ms"]["idle"]
        what = f"ticker p99, worst case ({_name(worst)} depth {worst['depth']}): {{}} ms more than idle"
        yield Verdict(what, added, TICKER_MS, False)


def _name(row: Row) -> str:
    case = "read" if row["op"] == "read" else row["case"]
    return f"{case} {size_name(row['block'])}"


def size_name(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"

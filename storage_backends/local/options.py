"""Options of the local tier: what a configuration may say, and whether it can work on this machine.

Belongs here: the keys, their checks, and the admission rule that they ask for. Does not belong here: anything that
opens the tier (backend.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, model_validator

from storage_backends.base import BackendOptions, OptionError
from storage_backends.local.policy import DEFAULT, Admission, Always, SecondHit, WriteBudget
from storage_backends.local.rules import Duration, NamespaceRule, Rules

_MIN_CAPACITY = 1 << 20
#: Refused pages that second-hit admission remembers at most, for each namespace.
_REMEMBERED = 1 << 18


class LocalOptions(BackendOptions):
    """path: directory on the disk. capacity: bytes of disk for all processes that use the directory together.

    engine: what moves the bytes ("auto": the best that works here). eviction: the order in which pages go when room is
    short, always the ends of chains first. admission: which pages are worth a write once the tier is full
    ("second_hit": those offered before, "write_budget": as many as write_bytes_per_day pay for). ttl: time to live of
    pages, from when they were stored ("24h"; never, if not given). namespaces: rules for single namespaces, of which
    the first that matches counts (rules.py).
    """

    path: Path
    capacity: ByteSize = Field(ge=_MIN_CAPACITY)
    engine: Literal["auto", "native", "liburing", "threads"] = "auto"
    eviction: Literal["credit", "lru", "s3fifo"] = DEFAULT  # type: ignore[assignment]
    admission: Literal["always", "second_hit", "write_budget"] = "always"
    write_bytes_per_day: ByteSize | None = Field(default=None, gt=0)
    ttl: Duration = None
    namespaces: tuple[NamespaceRule, ...] = ()

    @model_validator(mode="after")
    def _budget_has_a_size(self) -> LocalOptions:
        if (self.admission == "write_budget") != (self.write_bytes_per_day is not None):
            raise ValueError("admission: write_budget and write_bytes_per_day go together; give both or neither")
        return self

    def rules(self) -> Rules:
        return Rules(self.namespaces, self.ttl)


def check(options: LocalOptions) -> None:
    """Raise OptionError for a place that cannot hold the tier. Changes nothing."""
    place = options.path
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise OptionError("path", str(options.path), f"{place} is not a directory", "name a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OptionError(
            "path", str(options.path), f"{place} is not writable for this user", "chown it, or name another"
        )
    disk = os.statvfs(place)
    ours = sum(extent.stat().st_size for extent in options.path.glob("w*/e*.ext"))
    room = disk.f_bavail * disk.f_frsize + ours
    if options.capacity > room:
        raise OptionError(
            "capacity", options.capacity.human_readable(), f"the disk has {ByteSize(room).human_readable()}",
            "lower it, or name a directory on a larger disk",
        )  # fmt: skip


def admission(options: LocalOptions, slot_bytes: int) -> Admission:
    """A rule for pages of this size; asked only when the tier is full."""
    if options.admission == "second_hit":
        return SecondHit(max(1, min(_REMEMBERED, options.capacity // slot_bytes)))
    if options.write_bytes_per_day is not None:
        # A quiet time saves up at most an hour's bytes, so that a burst is no day's wear.
        return WriteBudget(options.write_bytes_per_day, max(options.write_bytes_per_day / 24, slot_bytes))
    return Always()

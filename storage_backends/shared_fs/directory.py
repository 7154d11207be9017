"""Where segments lie on the share: PATH/v1/BUCKET/NAMESPACE/, and how little of that has to be listed.

Belongs here: names of directories, as pure functions. Does not belong here: what is in a segment, or when to look.

    PATH/v1/                     format version
      clock                      touched to ask for the share's time (share.py)
      20261122T0215/             a quarter of an hour, UTC, by the share's clock: when its segments were born
        NAMESPACE/               32 hex digits
          ID-ENTRIES-BYTES.seg
          ID.tmp                 a segment that is being written, or was when its writer died

Old buckets only lose segments, so that new ones are found by listing the bucket names and the few recent buckets: a
busy fleet's directory holds a quarter of an hour of one namespace's segments, not all that there are. Temporaries lie
beside the segments that they become, since not every share renames from one directory to another as one step.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from datetime import UTC, datetime

VERSION_DIRECTORY = "v1"
CLOCK = "clock"
BUCKET_SECONDS = 900
#: A bucket is recent while a writer whose clock is an hour late may still write there.
_RECENT_SECONDS = 3600 + 2 * BUCKET_SECONDS
_BUCKET = re.compile(r"[0-9]{8}T[0-9]{4}")
_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_NS = 10**9


def bucket_of(time_ns: int) -> str:
    """The bucket of segments born then (ns since 1970)."""
    seconds = time_ns // _NS // BUCKET_SECONDS * BUCKET_SECONDS
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y%m%dT%H%M")


def bucket_ns(bucket: str) -> int:
    """When a bucket began (ns since 1970). ValueError for a name that is none."""
    return int(datetime.strptime(bucket, "%Y%m%dT%H%M").replace(tzinfo=UTC).timestamp()) * _NS


def is_recent(bucket: str, now_ns: int) -> bool:
    """Whether segments may still be born in it: always so in one that is of the future, by somebody's clock."""
    return bucket_ns(bucket) > now_ns - _RECENT_SECONDS * _NS


def buckets(names: Iterable[str]) -> list[str]:
    """The buckets among the names in PATH/v1, oldest first."""
    found = []
    for name in names:
        if _BUCKET.fullmatch(name):
            try:
                bucket_ns(name)
            except ValueError:
                continue
            found.append(name)
    return sorted(found)


def namespaces(names: Iterable[str]) -> list[str]:
    """The namespaces, as hex digits, among the names in a bucket."""
    return [name for name in names if _NAMESPACE.fullmatch(name)]


def to_list(names: list[str], known: Container[str], now_ns: int, turn: int) -> list[str]:
    """Which buckets to list in one look: the unknown and the recent ones, and one of the others in turn, newest first.

    names: all buckets there are, oldest first. turn: counts looks.
    """
    old = [name for name in names if name in known and not is_recent(name, now_ns)]
    again = {old[turn % len(old)]} if old else set()
    return [name for name in reversed(names) if name not in known or name in again or is_recent(name, now_ns)]

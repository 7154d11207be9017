"""Which vLLM this is, and whether this adapter knows it.

Belongs here: the supported range and the one line said outside it. Does not belong here: what differs inside it.
"""

from __future__ import annotations

import re

OLDEST = (0, 25)
NEWEST = (0, 32)


class UnsupportedVersion(RuntimeError):
    """This vLLM is outside the tested range; `str()` is all that needs to be said."""


def check(version: str) -> tuple[int, ...]:
    """(major, minor) of a supported version. Raises UnsupportedVersion."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    found = tuple(map(int, match.groups())) if match else ()
    if not found or not OLDEST <= found <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        known = oldest if oldest == newest else f"{oldest} to {newest}"
        raise UnsupportedVersion(
            f"hicache_ext supports vLLM {known}, this is {version or 'unknown'}. "
            "Fix: install a supported vLLM, or a newer hicache-ext"
        )
    return found

"""Which SGLang this is, and whether this adapter knows it.

Belongs here: the supported range and the one line said outside it. Does not belong here: what differs between the
versions inside the range (each module looks at what SGLang has, not at its number, wherever it can).
"""

from __future__ import annotations

import re

OLDEST = (0, 5, 17)
NEWEST = (0, 5, 23)


class UnsupportedVersion(RuntimeError):
    """This SGLang is outside the tested range; `str()` is all that needs to be said."""


def release(version: str) -> tuple[int, ...]:
    """The release numbers of a version string: "0.5.21.post1+cpu" is (0, 5, 21)."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


def check(version: str) -> tuple[int, ...]:
    """The release numbers of a supported version. Raises UnsupportedVersion.

    Outside the range the adapter refuses: hooks on functions that moved would be missing silently, and a page layout
    that changed would be served as if it had not.
    """
    found = release(version)
    if not found or not OLDEST <= found <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise UnsupportedVersion(
            f"hicache_ext supports SGLang {oldest} to {newest}, this is {version or 'unknown'}. "
            f"Fix: install a supported SGLang, or a newer hicache-ext"
        )
    return found


def installed() -> str:
    """SGLang's version in this process."""
    from sglang.version import __version__

    return str(__version__)

"""Pages past their time: a MISS at once, and gone soon after.

Belongs here: which namespaces have a time to live, and the moment before which their pages count no more. Does not
belong here: whose time to live is what (rules.py), or how an index finds such pages (index.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hicache_ext.page import Namespace
from storage_backends.local.index import Page
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.rules import Rules

#: Pages that one round removes at most, of all namespaces together: the backend's lock is held meanwhile.
SWEEP = 512


class Expiry:
    """Not thread-safe: the backend's lock is around it. A page's age counts from when it was stored."""

    def __init__(self, rules: Rules, index: AnyIndex, clock: Callable[[], int] = time.time_ns) -> None:
        """clock: ns since 1970, which may go back: pages of the future are as new."""
        self._rules = rules
        self._index = index
        self.clock = clock
        self._ttl_ns: dict[bytes, int] = {}
        self._met: set[bytes] = set()

    def meet(self, namespace: Namespace) -> None:
        """This namespace is asked for: from now on its pages age."""
        if self._rules.any_ttl and namespace.digest not in self._met:
            self.know(namespace.digest, namespace.description)

    def know(self, digest: bytes, description: bytes) -> None:
        """The same, of a namespace that has extents here, asked for or not."""
        if not self._rules.any_ttl or digest in self._met:
            return
        self._met.add(digest)
        ttl = self._rules.of(digest, description).ttl
        if ttl is not None:
            self._ttl_ns[digest] = int(ttl * 1e9)
            self._advance(digest)

    def advance(self) -> None:
        """Time has gone by: more pages are past theirs."""
        for digest in self._ttl_ns:
            self._advance(digest)

    def sweep(self, forget: Callable[[list[Page], str], None]) -> None:
        """Remove some of our pages that are past their time. forget: given pages and the reason."""
        left = SWEEP
        # Whoever comes first must not keep the others from their turn for ever.
        for digest in list(self._ttl_ns):
            if left <= 0:
                break
            pages = self._index.expired(digest, left)
            if pages:
                left -= len(pages)
                forget(pages, "expired")
                self._ttl_ns[digest] = self._ttl_ns.pop(digest)

    def _advance(self, digest: bytes) -> None:
        self._index.set_oldest(digest, max(0, self.clock() - self._ttl_ns[digest]))

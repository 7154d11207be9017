"""What the fault tests of remote tiers do again and again: store pages, read them back, wait until both work again."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hicache_ext.page import Namespace
from storage_backends.base import Backend, Outcome
from tests import pages
from tests.pages import HostPool


@dataclass(frozen=True)
class Asking:
    """space, keys: of the pages that are meant where nothing else is said. seconds: that a batch may take. recovery:
    seconds until a tier works again, which is looked at every `pause` seconds.
    """

    space: Namespace
    keys: list[bytes]
    seconds: float
    recovery: float
    pause: float = 0.05

    def store(self, backend: Backend, keys: list[bytes] | None = None, space: Namespace | None = None) -> list[Outcome]:
        keys = self.keys if keys is None else keys
        return backend.write(HostPool(space or self.space, len(keys)).write_batch(keys)).result(self.seconds)

    def served(
        self, backend: Backend, keys: list[bytes] | None = None, space: Namespace | None = None
    ) -> list[Outcome]:
        """Read, and insist that hits are right and that nothing moves afterwards."""
        keys = self.keys if keys is None else keys
        return pages.served_and_quiet(backend, space or self.space, keys, self.seconds)

    def recovers(self, backend: Backend, seconds: float | None = None) -> None:
        """Written and read again in full, without anybody's help."""
        hits = [Outcome.HIT] * len(self.keys)
        deadline = time.monotonic() + (self.recovery if seconds is None else seconds)
        while self.store(backend) != hits or self.served(backend) != hits:
            assert time.monotonic() < deadline, backend.stats()
            time.sleep(self.pause)
        assert backend.stats()["state"] == "ok"

"""Ours in `bench tiers`: a tier by itself, and several as the store that an engine uses.

Belongs here: subjects that are this package's. Does not belong here: what they are measured beside.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache_ext.bench.tiers_rounds import Batch, Role, Subject
from hicache_ext.store.tiered import NO_TIER, TieredStore
from storage_backends import checksum
from storage_backends.base import Backend, Completion, Dispatcher, Outcome

_SECONDS = 120.0
_SETTLE_SECONDS = 60.0


class OneTier(Subject):
    """A backend as the store calls it. Closed with it: its dispatcher."""

    name, role = "ours", Role.OURS

    def __init__(self, backend: Backend, dispatcher: Dispatcher, cases: tuple[str, ...], keeps: bool) -> None:
        self._backend, self._dispatcher = backend, dispatcher
        self.cases, self.keeps = cases, keeps
        self.way = type(backend).__name__

    def write(self, batch: Batch) -> None:
        _whole(self._backend.write(batch.pages), self._state)

    def read(self, batch: Batch) -> None:
        _whole(self._backend.read(batch.pages), self._state)

    def lookup(self, batch: Batch) -> int:
        return int((self._backend.lookup(batch.pages) != 0).sum())

    def miss(self, batch: Batch) -> None:
        self._backend.lookup(batch.pages)

    def remove(self, batch: Batch) -> None:
        self._backend.remove(batch.pages)

    def processes(self) -> list[int]:
        return self._backend.processes()

    def close(self) -> None:
        self._backend.close()
        self._dispatcher.close()

    def _state(self) -> str:
        return str(self._backend.stats().get("state", ""))


class VerifiedPass(Subject):
    """One thread computes the checksums of a batch's pages, and does nothing with them."""

    name, role = "verified pass", Role.TOOL
    cases = ("write",)
    keeps = True

    way = checksum.implementation()

    def write(self, batch: Batch) -> None:
        checksum.chunk_crcs(batch.pages.addresses, batch.pages.lengths)

    read = remove = write

    def lookup(self, batch: Batch) -> int:
        raise NotImplementedError("holds no pages")


class Cascade(Subject):
    """A store over several tiers. Its reads count as good only when the first tier served them.

    cleared: numbers of the tiers from which pages are removed between rounds: those that are there and do not evict.
    dead: a tier of it cannot be reached: what is on its way there is not waited for.
    """

    cases = ("write", "read", "lookup")

    def __init__(self, name: str, store: TieredStore, cleared: Sequence[int], dead: bool, alone: bool) -> None:
        self.name, self._store, self._cleared, self._dead = name, store, cleared, dead
        self.role = Role.PLAIN if alone else Role.OURS  # type: ignore[misc]
        self.way = " + ".join(tier.name for tier in store.tiers)

    def write(self, batch: Batch) -> None:
        _whole(self._store.write(batch.pages), self._state)

    def read(self, batch: Batch) -> None:
        before = self._store.tiers[0].counts["read_hit"]
        _whole(self._store.read(batch.pages), self._state)
        if self._store.tiers[0].counts["read_hit"] - before != len(batch):
            raise RuntimeError(f"the first tier did not serve all of it: {self._state()}")

    def lookup(self, batch: Batch) -> int:
        return int((self._store.lookup(batch.pages) != NO_TIER).sum())

    def miss(self, batch: Batch) -> None:
        self._store.lookup(batch.pages)

    def remove(self, batch: Batch) -> None:
        for tier in self._cleared:
            self._store.tiers[tier].backend.remove(batch.pages)

    def settle(self) -> None:
        if not self._dead and not self._store.settled(_SETTLE_SECONDS):
            raise RuntimeError(f"copies for further tiers were not done within {_SETTLE_SECONDS:g} s: {self._state()}")

    def processes(self) -> list[int]:
        return [pid for tier in self._store.tiers for pid in tier.backend.processes()]

    def close(self) -> None:
        self._store.close()

    def _state(self) -> str:
        return "; ".join(f"{name}: {stats.get('state', 'ok')}" for name, stats in self._store.stats().items())


def _whole(done: Completion, state: object) -> None:
    """RuntimeError unless every page is a HIT."""
    if not done.wait(_SECONDS):
        raise RuntimeError(f"no answer within {_SECONDS:g} s")
    if done.outcomes.count(Outcome.HIT) != len(done.outcomes):
        bad = next(Outcome(value) for value in done.outcomes if value != Outcome.HIT)
        said = state() if callable(state) else ""
        raise RuntimeError(f"a page ended as {bad.name}" + (f" ({said})" if said and said != "ok" else ""))

"""LocalBackend: the local tier as the cascade sees it; one process's view of a directory shared with others.

Belongs here: the contract, opening, upkeep and closing. Does not belong here: reads (reads.py), writes (writes.py), who
gets room (room.py), the format (storage_backends.format), files and folders (directory.py, writer.py), or I/O
(engine.py).
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from pydantic import ByteSize

from hicache_ext.page import KEY_BYTES, Namespace
from storage_backends import checksum
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
    ResidencyListener,
)
from storage_backends.local import options as local_options
from storage_backends.local.engine import IoEngine
from storage_backends.local.index_choice import open_index
from storage_backends.local.news import News
from storage_backends.local.options import LocalOptions
from storage_backends.local.reads import Reads
from storage_backends.local.room import Room
from storage_backends.local.slots import SlotEngine, slot_engine
from storage_backends.local.tier import Tier
from storage_backends.local.writes import Writes

logger = logging.getLogger(__name__)


class LocalBackend(Backend):
    """Slots in a directory of this machine, shared with other processes that open it. Thread-safe.

    Of no use in a forked child, where nothing is found, everything is rejected and nothing of the parent's is touched:
    a child opens a tier of its own.
    """

    Options = LocalOptions
    foresees = True
    options: LocalOptions

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        assert isinstance(options, LocalOptions)
        local_options.check(options)

    def __init__(self, options: LocalOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._pid = os.getpid()
        local_options.distinct(options)
        self._closed = False
        self._index = open_index(options.eviction)
        rules = options.rules()
        tier = self._tier = Tier(options, dispatcher, self.report, self._index, rules, self._slots)
        self._disks, self._lock = tier.disks, tier.lock
        self._engine = self._disks.in_use[0].engine
        alignment = max(disk.direct.alignment for disk in self._disks.in_use)
        self.capabilities = Capabilities(persistent=True, shared=True, alignment=alignment, medium="DISK", knows=True)
        self._reads = Reads(tier)
        self._writes = Writes(tier, Room(self._index, tier.writers, rules))
        self._news: News | None = None
        for disk in self._disks.in_use:
            logger.info(
                "local tier %s: %s, engine %s, %s, checksums by %s, %s index; %d pages known from the logs",
                disk.path, ByteSize(disk.capacity).human_readable(), disk.engine.name,
                "O_DIRECT" if disk.direct.works else f"buffered I/O ({disk.direct.reason})",
                checksum.implementation(), self._index.name, len(self._index),
            )  # fmt: skip
        self._disks.start()

    def _slots(self, engine: IoEngine) -> SlotEngine:
        """What moves a disk's slots by `engine`. For every disk, whenever it comes into use."""
        return slot_engine(engine)

    @property
    def _elsewhere(self) -> bool:
        """Whether this is a forked child: it has none of the tier's threads, and its lock as some thread left it."""
        return os.getpid() != self._pid

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        if self._elsewhere:
            return np.zeros(len(batch), np.uint8)
        self._disks.refresh()
        with self._lock:
            self._tier.expiry.meet(batch.namespace)
            return self._index.lookup(batch.namespace.digest, batch.keys, batch.parents, True)

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        if self._elsewhere:
            return np.zeros(len(batch), np.uint8)
        with self._lock:
            self._tier.expiry.meet(batch.namespace)
            return self._index.lookup(batch.namespace.digest, batch.keys, batch.parents, True)

    def read(self, batch: PageBatch) -> Completion:
        if self._elsewhere:
            return _settled(batch, Outcome.MISS)
        self._check(batch)
        return self._reads.read(batch)

    def write(self, batch: PageBatch) -> Completion:
        if self._elsewhere:
            return _settled(batch, Outcome.REJECTED)
        self._check(batch)
        return self._writes.write(batch)

    def remove(self, batch: KeyBatch) -> int:
        tier, removed = self._tier, 0
        if self._elsewhere:
            return 0
        with tier.writers.claiming:
            with self._lock:
                held = self._index.pin(batch.namespace.digest, batch.keys, None, False)
                pages = [self._index.pinned(handle) for handle in held.handles]
                ours = [(p, extent) for p in pages if p.own and (extent := tier.extent(p.folder, p.extent)) is not None]
                for _, extent in ours:
                    extent.pins += 1
                for page in range(len(batch)):
                    there = self._index.get(batch.namespace.digest, batch.key(page))
                    if there is not None:
                        tier.drop(there, "removed")
                        removed += 1
            # Their slots are nobody's yet. The log says that they are gone before these are cleared.
            tier.writers.flush()
            for known, extent in ours:
                if known.pins == 1:  # nobody reads it
                    tier.erase(extent, known.slot)
            with self._lock:
                freed = dict(zip(pages, self._index.unpin(held.handles), strict=True))
                for known, extent in ours:
                    tier.let_go(extent, known.slot, bool(freed[known]))
        return removed

    def going(self, most: int) -> list[tuple[bytes, bytes]]:
        """Of each namespace a tenth of what it holds here, those that are used the most first. What goes with an extent
        that another namespace takes is not foreseen."""
        found: list[tuple[bytes, bytes]] = []
        if self._elsewhere:
            return found
        with self._lock:
            for namespace, pages in self._tier.writers.short_of_a_tenth():
                keys = self._index.going(namespace, min(pages, most))
                most -= len(keys) // KEY_BYTES
                if keys:
                    found.append((namespace, keys))
                if not most:
                    break
        return found

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        if self._elsewhere:
            return
        with self._tier.writers.claiming, self._lock:
            for disk in self._disks.in_use:
                disk.directory.clear({namespace.digest for namespace in namespaces})
        self._tier.writers.flush()

    def register_memory(self, address: int, length: int) -> None:
        if not self._elsewhere:
            self._disks.register_memory(address, length)

    def on_residency(self, listener: ResidencyListener | None) -> None:
        super().on_residency(listener)
        with self._lock:
            self._news = None if listener is None else News(self._tier)
            self._index.heard = None if self._news is None else self._news.heard

    def tell(self, namespace: bytes) -> bool:
        news = self._news
        return news is not None and not self._elsewhere and not self._closed and news.tell(namespace)

    def recheck(self, namespace: bytes, keys: bytes) -> None:
        news = self._news
        if news is not None and not self._elsewhere and not self._closed:
            news.recheck(namespace, keys)

    def versions(self) -> dict[str, str]:
        return {"engine": self._engine.name, "checksums": checksum.implementation(), "index": self._index.name}

    def stats(self) -> Mapping[str, int | float | str]:
        if self._elsewhere:
            return {"state": "forked"}
        with self._lock:
            disks, bays = self._disks.in_use, self._disks.bays
            writers = [disk.directory.writer for disk in disks if disk.directory.writer is not None]
            upkeep = Counter[str]()
            for disk in disks:
                upkeep.update(disk.upkeep.stats())
            direct = next((disk.direct for disk in disks if not disk.direct.works), disks[0].direct if disks else None)
            single: dict[str, int | str] = {}
            if self._tier.several:
                single = {
                    f"disk_{bay.number}_{name}": value
                    for bay in bays
                    for name, value in (
                        ("path", str(bay.path)),
                        ("state", bay.state),
                        ("bytes", bay.bytes),
                        ("errors", bay.errors),
                    )
                }
            return {
                "pages": len(self._index),
                "own_bytes": sum(writer.disk_bytes for writer in writers),
                "share_bytes": sum(disk.directory.share for disk in disks),
                "engine": self._engine.name,
                "index": self._index.name,
                "index_bytes": self._index.memory(),
                "engines_passed_over": "; ".join(f"{k}: {v}" for k, v in self._engine.passed_over.items()),
                "direct_io": "none" if direct is None else "yes" if direct.works else direct.reason,
                "log_errors": sum(writer.log.errors for writer in writers),
                "log_bytes": sum(writer.log.size for writer in writers),
                "compactions": sum(writer.log.compactions for writer in writers),
                "state": self._state(),
                "disks": len(bays),
                "disks_out": len(bays) - len(disks),
                **single,
                **upkeep,
                **self._tier.counts,
            }

    def close(self) -> None:
        if self._elsewhere or self._closed:
            return
        self._closed = True
        if not self._disks.close(time.monotonic() + CLOSE_SECONDS - 1.0):
            logger.error("local tier: the device did not answer before the close; its files stay open")

    def _check(self, batch: PageBatch) -> None:
        if batch.memory not in self.capabilities.memory:
            raise ValueError(f"this tier takes pages in {' and '.join(self.capabilities.memory)} memory alone")

    def _state(self) -> str:
        """Of the tier: the first disk that is not well."""
        states = [(bay.path, bay.state) for bay in self._disks.bays]
        if not self._tier.several:
            return states[0][1]
        return "; ".join(f"{path}: {state}" for path, state in states if state != "ok") or "ok"


def _settled(batch: PageBatch, outcome: Outcome) -> Completion:
    """Every page with the same outcome, without the dispatcher, whose thread a forked child does not have."""
    completion = Completion(len(batch), None)
    completion.settle_many(range(len(batch)), [outcome] * len(batch))
    return completion

"""LocalBackend: the local tier as the cascade sees it; one process's view of a directory shared with others.

Belongs here: the contract, opening, upkeep and closing. Does not belong here: reads (reads.py), writes (writes.py), who
gets room (room.py), the format (storage_backends.format), files and folders (directory.py, writer.py), or I/O
(engine.py).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping

import numpy as np

from hicache_ext.page import Namespace
from storage_backends import checksum
from storage_backends.base import (
    CLOSE_SECONDS,
    Backend,
    BackendOptions,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    OptionError,
    Outcome,
    PageBatch,
)
from storage_backends.format import FormatError
from storage_backends.local import options as local_options
from storage_backends.local.directory import Directory
from storage_backends.local.engine import IoEngine, open_engine
from storage_backends.local.extents import ExtentFiles
from storage_backends.local.files import probe_direct
from storage_backends.local.index_choice import open_index
from storage_backends.local.options import LocalOptions
from storage_backends.local.reads import Reads
from storage_backends.local.room import Room
from storage_backends.local.slots import CancelFlag, slot_engine
from storage_backends.local.supply import Supply
from storage_backends.local.tier import Tier
from storage_backends.local.upkeep import Upkeep
from storage_backends.local.writer import Writer
from storage_backends.local.writes import Writes

logger = logging.getLogger(__name__)

_MAINTENANCE_SECONDS = 0.2
#: Lets another thread have the lock, which is not fair by itself.
_YIELD_SECONDS = 0.0005


class LocalBackend(Backend):
    """Slots in a directory of this machine, shared with other processes that open it. Thread-safe.

    Of no use in a forked child, where nothing is found, everything is rejected and nothing of the parent's is touched:
    a child opens a tier of its own.
    """

    Options = LocalOptions
    options: LocalOptions

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        assert isinstance(options, LocalOptions)
        local_options.check(options)

    def __init__(self, options: LocalOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._pid = os.getpid()
        self._closing = CancelFlag()
        self._index = open_index(options.eviction)
        options.path.mkdir(parents=True, exist_ok=True)
        direct = self._direct = probe_direct(options.path)
        try:
            self._directory = Directory(
                options.path, options.capacity, ExtentFiles(direct), self._index, options.rules()
            )
        except FormatError as error:  # a folder of a version that we do not know
            raise OptionError(
                "path", str(options.path), f"holds another format: {error}",
                "use the program version that wrote it, or another directory, or delete this one",
            ) from error  # fmt: skip
        self.capabilities = Capabilities(
            persistent=True, shared=True, alignment=direct.alignment, medium="DISK", knows=True
        )
        # An engine that is asked for by name is taken as it is.
        hints = {"direct": direct.works} if options.engine == "auto" else {}
        self._engine: IoEngine = open_engine(options.engine, **hints)
        tier = self._tier = Tier(
            options, dispatcher, self.report, self._index, direct, self._directory, self._engine,
            slot_engine(self._engine),
        )  # fmt: skip
        self._lock = tier.lock
        self._reads = Reads(tier)
        self._writes = Writes(tier, Room(self._index, self._directory, self._claim))
        self._open_files: list[int] = []
        logger.info(
            "local tier %s: %s, engine %s, %s, checksums by %s, %s index; %d pages known from the logs",
            options.path, options.capacity.human_readable(), self._engine.name,
            "O_DIRECT" if direct.works else f"buffered I/O ({direct.reason})",
            checksum.implementation(), self._index.name, len(self._index),
        )  # fmt: skip
        self._upkeep = Upkeep(self._index, self._lock, self._closing)
        self._maintenance = threading.Thread(target=self._maintain, name="hicache-local", daemon=True)
        self._maintenance.start()
        self._supply = Supply(self._directory, self._index, self._lock)

    @property
    def _elsewhere(self) -> bool:
        """Whether this is a forked child: it has none of the tier's threads, and its lock as some thread left it."""
        return os.getpid() != self._pid

    def lookup(self, batch: KeyBatch) -> np.ndarray:
        if self._elsewhere:
            return np.zeros(len(batch), np.uint8)
        with self._lock:
            self._tier.expiry.meet(batch.namespace)
            self._directory.refresh()
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
        return self._reads.read(batch)

    def write(self, batch: PageBatch) -> Completion:
        if self._elsewhere:
            return _settled(batch, Outcome.REJECTED)
        return self._writes.write(batch)

    def remove(self, batch: KeyBatch) -> int:
        tier, removed = self._tier, 0
        if self._elsewhere:
            return 0
        with self._lock:
            for page in range(len(batch)):
                known = self._index.get(batch.namespace.digest, batch.key(page))
                if known is None:
                    continue
                extent = tier.extent(known.folder, known.extent)
                if known.own and extent is not None and not known.pins:
                    tier.erase(extent, known.slot)
                tier.drop(known, "removed")
                removed += 1
        return removed

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        if self._elsewhere:
            return
        with self._lock:
            self._directory.clear({namespace.digest for namespace in namespaces})

    def register_memory(self, address: int, length: int) -> None:
        self._engine.register_memory(address, length)

    def stats(self) -> Mapping[str, int | float | str]:
        if self._elsewhere:
            return {"state": "forked"}
        with self._lock:
            writer = self._directory.writer
            return {
                "pages": len(self._index),
                "own_bytes": writer.disk_bytes if writer else 0,
                "share_bytes": self._directory.share,
                "engine": self._engine.name,
                "index": self._index.name,
                "index_bytes": self._index.memory(),
                "engines_passed_over": "; ".join(f"{k}: {v}" for k, v in self._engine.passed_over.items()),
                "direct_io": "yes" if self._direct.works else self._direct.reason,
                "log_errors": writer.log.errors if writer else 0,
                "log_bytes": writer.log.size if writer else 0,
                "compactions": writer.log.compactions if writer else 0,
                "state": "directory gone" if self._tier.gone else "disk full" if self._disk_full() else "ok",
                **self._upkeep.stats(),
                **self._tier.counts,
            }

    def close(self) -> None:
        if self._elsewhere or self._closing.is_set():
            return
        self._closing.set()
        self._supply.close()
        until = time.monotonic() + CLOSE_SECONDS - 1.0
        quiet = self._engine.close(until - time.monotonic())
        for thread in (self._maintenance, self._supply.thread, *self._upkeep.threads):
            thread.join(max(0.0, until - time.monotonic()))
        if not quiet:
            logger.error("local tier: the device did not answer before the close; its files stay open")
        with self._lock:
            self._directory.close(quiet)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _claim(self, namespace: bytes) -> Writer:
        """The folder that we write, taken when the first page wants room. OSError when there is none to have."""
        if self._tier.gone:
            raise OSError(errno.ENOENT, "the tier's directory is gone")
        writer = self._directory.writer
        if writer is None:
            writer = self._directory.claim(namespace, self._tier.removed)
            self._upkeep.claimed(writer)
        return writer

    def _disk_full(self) -> bool:
        writer = self._directory.writer
        return writer is not None and time.monotonic() < writer.disk_full_until

    def _retain_files(self) -> None:
        """Tell the engine which extents are still open: what it registered of the others holds their space."""
        writer = self._directory.writer
        holders = [folder.extents for folder in self._directory.folders.values()]
        if writer is not None:
            holders.append(writer.extents)
        serials = [extent.serial for extents in holders for extent in extents.values()]
        if serials != self._open_files:
            self._open_files = serials
            self._tier.slots.retain_files(serials)

    def _expire(self) -> None:
        """Remove pages that are past their time, a few at a time."""
        expiry, writer = self._tier.expiry, self._directory.writer
        expiry.advance()
        if writer is not None:
            for digest, extents in writer.by_namespace.items():
                expiry.know(digest, next(iter(extents.values())).header.description)
            expiry.sweep(writer.forget)

    def _catch_up(self) -> None:
        """Read the other writers' logs to their ends, in turns with whoever wants the lock."""
        while not self._tier.gone and not self._closing.is_set():
            with self._lock:
                if self._closing.is_set():
                    return
                self._directory.refresh()
                if not self._directory.behind:
                    return
            time.sleep(_YIELD_SECONDS)

    def _maintain(self) -> None:
        failed = False
        while not self._closing.wait(_MAINTENANCE_SECONDS):
            try:
                gone = self._directory.gone()
                if gone and not self._tier.gone:
                    logger.error("local tier %s: the directory is gone; nothing more is stored", self.options.path)
                self._tier.gone = gone
                self._catch_up()
                with self._lock:
                    if gone or self._closing.is_set():
                        continue
                    self._retain_files()
                    self._expire()
                    if self._directory.writer is not None:
                        self._upkeep.turn(self._directory.writer)
            except Exception:
                if not failed:
                    failed = True
                    logger.exception("local tier %s: maintenance failed (said once)", self.options.path)


def _settled(batch: PageBatch, outcome: Outcome) -> Completion:
    """Every page with the same outcome, without the dispatcher, whose thread a forked child does not have."""
    completion = Completion(len(batch), None)
    completion.settle_many(range(len(batch)), [outcome] * len(batch))
    return completion

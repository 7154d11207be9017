"""A tier of Python's own objects, for tests that look into a backend or change what it does.

It keeps pages as bytes with a checksum, evicts the least recently used when full, and forgets everything at exit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice

import numpy as np
from pydantic import ByteSize

from hicache_ext.page import Namespace
from storage_backends.base import (
    BackendOptions,
    BlockingBackend,
    Buffers,
    Capabilities,
    Completion,
    Dispatcher,
    KeyBatch,
    Outcome,
    PageBatch,
    Residency,
)
from storage_backends.checksum import crc32c

_NEARLY_FULL = 0.9


class DictionaryOptions(BackendOptions):
    """capacity: bytes of payload kept ("2GiB")."""

    capacity: ByteSize = ByteSize(1 << 30)


class DictionaryBackend(BlockingBackend):
    """Pages in a dictionary, least recently used first."""

    Options = DictionaryOptions
    foresees = True
    capabilities = Capabilities(persistent=False, shared=False, medium="CPU", knows=True)
    options: DictionaryOptions

    def __init__(self, options: DictionaryOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._pages: OrderedDict[tuple[bytes, bytes], tuple[bytearray, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0
        self._counts = {"evicted": 0, "rejected": 0, "corrupt": 0}

    def has(self, namespace: Namespace, key: bytes) -> bool:
        with self._lock:
            return (namespace.digest, key) in self._pages

    def lookup_local(self, batch: KeyBatch) -> np.ndarray:
        return self.lookup(batch)

    def read(self, batch: PageBatch) -> Completion:
        if batch.used:
            with self._lock:
                for page in range(len(batch)):
                    if (batch.namespace.digest, batch.key(page)) in self._pages:
                        self._pages.move_to_end((batch.namespace.digest, batch.key(page)))
        return super().read(batch)

    def get(self, namespace: Namespace, key: bytes, buffers: Buffers) -> Outcome:
        with self._lock:
            page = self._pages.get((namespace.digest, key))
            if page is None:
                return Outcome.MISS
        data, checksum = page
        if len(data) != sum(map(len, buffers)) or crc32c(data) != checksum:
            self._counts["corrupt"] += 1
            self.delete(namespace, key)
            return Outcome.CORRUPT
        start = 0
        for buffer in buffers:
            buffer[:] = data[start : start + len(buffer)]
            start += len(buffer)
        return Outcome.HIT

    def put(self, namespace: Namespace, key: bytes, buffers: Buffers) -> Outcome:
        data = bytearray().join(buffers)
        if len(data) > self.options.capacity:
            self._counts["rejected"] += 1
            return Outcome.REJECTED
        with self._lock:
            if (namespace.digest, key) in self._pages:
                self._pages.move_to_end((namespace.digest, key))
                return Outcome.HIT
            self._pages[namespace.digest, key] = (data, crc32c(data))
            self._bytes += len(data)
            evicted = []
            while self._bytes > self.options.capacity:
                victim, (gone, _) = self._pages.popitem(last=False)
                self._bytes -= len(gone)
                evicted.append(victim)
        self._counts["evicted"] += len(evicted)
        self.report(Residency.STORED, namespace.digest, key)
        for digest, old in evicted:
            self.report(Residency.REMOVED, digest, old)
        return Outcome.HIT

    def delete(self, namespace: Namespace, key: bytes) -> bool:
        with self._lock:
            page = self._pages.pop((namespace.digest, key), None)
            if page is None:
                return False
            self._bytes -= len(page[0])
        self.report(Residency.REMOVED, namespace.digest, key)
        return True

    def going(self, most: int) -> list[tuple[bytes, bytes]]:
        spaces: dict[bytes, list[bytes]] = {}
        with self._lock:
            left = self._bytes
            for (digest, key), (data, _) in islice(self._pages.items(), most):
                if left < _NEARLY_FULL * self.options.capacity:
                    break
                left -= len(data)
                spaces.setdefault(digest, []).append(key)
        return [(digest, b"".join(keys)) for digest, keys in spaces.items()]

    def clear(self, namespaces: Iterable[Namespace]) -> None:
        for namespace in namespaces:
            with self._lock:
                keys = [key for digest, key in self._pages if digest == namespace.digest]
            for key in keys:
                self.delete(namespace, key)

    def stats(self) -> Mapping[str, int | float | str]:
        return {"pages": len(self._pages), "bytes": self._bytes, "errors": self.errors, **self._counts}

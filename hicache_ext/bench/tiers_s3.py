"""The yardstick of the s3 tier: a loop over obstore on the same bucket."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import InThreads, Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject

if TYPE_CHECKING:
    from storage_backends.s3.options import S3Options


class Obstore(InThreads):
    """As many threads as the tier has, one request each. What arrived is copied into its page; nothing is checked."""

    name = "obstore"

    def __init__(self, options: S3Options) -> None:
        import obstore

        from storage_backends.s3.client import open_store

        super().__init__(options.connections)
        self.way = f"{version('obstore')}, {options.connections} threads"
        self._obstore: Any = obstore
        self._store = open_store(options)
        self._start = f"{options.prefix}-bench/{time.time_ns():x}/"

    def write_part(self, part: Batch) -> None:
        for name, buffer in zip(part.names, part.buffers, strict=True):
            self._obstore.put(self._store, self._start + name, buffer, use_multipart=False)

    def read_part(self, part: Batch) -> None:
        for name, buffer in zip(part.names, part.buffers, strict=True):
            buffer[:] = memoryview(self._obstore.get(self._store, self._start + name).bytes())

    def lookup_part(self, part: Batch) -> int:
        there = 0
        for name in part.names:
            try:
                self._obstore.head(self._store, self._start + name)
            except FileNotFoundError:
                continue
            there += 1
        return there

    def remove_part(self, part: Batch) -> None:
        self._obstore.delete(self._store, [self._start + name for name in part.names])


class S3Yardstick(Yardstick):
    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        return [Obstore(options)]

    def moved(self, options: Options, port: int) -> Options:
        kept = {name: value for name, value in options.items() if name != "tls_ca"}
        return {**kept, "endpoint": f"http://127.0.0.1:{port}", "allow_http": True}


YARDSTICK = S3Yardstick()

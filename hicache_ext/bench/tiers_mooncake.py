"""The yardstick of the mooncake tier: a loop over Mooncake's own client, in this process, on the same store."""

from __future__ import annotations

import time
from importlib.metadata import packages_distributions, version
from typing import TYPE_CHECKING, Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import InThreads, Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject

if TYPE_CHECKING:
    from storage_backends.mooncake.options import MooncakeOptions


class PlainMooncake(InThreads):
    """batch_put_from and batch_get_into on registered memory, in the tier's number of threads; nothing is checked."""

    name = "mooncake"

    def __init__(self, options: MooncakeOptions, memory: Memory) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        from storage_backends.mooncake.client import way_to

        super().__init__(options.connections)
        package = packages_distributions()["mooncake"][0]
        self.way = f"{package} {version(package)}, {options.protocol}, {options.connections} threads"
        self._config = ReplicateConfig()
        self._config.replica_num = options.replicas
        self._store = MooncakeDistributedStore()
        code = self._store.setup(
            options.host or way_to(options.address), options.metadata, 0, 0, options.protocol, options.devices,
            options.master,
        )  # fmt: skip
        if code or self._store.register_buffer(memory.address, memory.size):
            raise RuntimeError(f"Mooncake's own client does not come up ({code})")
        self._start = f"{options.prefix}-bench:{time.time_ns():x}:"

    def write_part(self, part: Batch) -> None:
        codes = self._store.batch_put_from(*self._where(part), self._config)
        if any(codes):
            raise RuntimeError(f"Mooncake: {min(codes)}")

    def read_part(self, part: Batch) -> None:
        codes = self._store.batch_get_into(*self._where(part))
        if min(codes) < 0:
            raise RuntimeError(f"Mooncake: {min(codes)}")

    def lookup_part(self, part: Batch) -> int:
        return sum(code == 1 for code in self._store.batch_is_exist([self._start + name for name in part.names]))

    def remove_part(self, part: Batch) -> None:
        self._store.batch_remove([self._start + name for name in part.names], True)

    def close(self) -> None:
        super().close()
        self._store.close()

    def _where(self, part: Batch) -> tuple[list[str], list[int], list[int]]:
        names = [self._start + name for name in part.names]
        return names, part.pages.addresses.tolist(), part.pages.lengths.tolist()


class MooncakeYardstick(Yardstick):
    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        return [PlainMooncake(options, memory)]

    def moved(self, options: Options, port: int) -> Options:
        return {**options, "master": f"127.0.0.1:{port}", "segment": 0}


YARDSTICK = MooncakeYardstick()

"""The adapter suite: the SGLang adapter beside SGLang's own backends on one host pool, and fio, in one run.

Belongs here: the pool, the subjects that are SGLang storage backends, which cells are measured. Does not belong here:
rounds (io_rounds), presentation (hicache_ext.cli.bench_io).

What is timed is what SGLang's cache controller calls for one batch of 128 pages: `batch_set_v1` and `batch_get_v1`
(ours: checksums included), for the file backend `get_data_page` + `batch_set` and `batch_get` +
`set_from_flat_data_page`. fio moves at least 256 MiB a round, at the depth of our engine.

Stock's write ends in the page cache: what the disk still has to do is not in its time, nor in its CPU seconds. Ours,
NIXL and fio bypass the page cache.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.bench import io_fio, io_nixl, io_stock
from hicache_ext.bench.io_memory import VerifiedPass, pages_name
from hicache_ext.bench.io_rounds import Setup, Subject, measure

PAGES = 128  # what the controller hands over at a time
BLOCKS = (256 << 10, 1 << 20, 2 << 20)
PAGE_TOKENS = 16
HEADS, HEAD_DIM = 8, 128
_FIO_BYTES = 256 << 20  # at least: fio counts time and CPU in milliseconds
_LAYER_BYTES = 2 * PAGE_TOKENS * HEADS * HEAD_DIM * 2  # K and V of one layer, bfloat16


class Pool:
    """SGLang's MHA host pool on the CPU: twice PAGES pages of `block` bytes, half with bytes to write, half to read.

    huge: in the plugin's memory; else where SGLang itself puts it.
    """

    def __init__(self, block: int, huge: bool) -> None:
        import torch
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

        tokens = 2 * PAGES * PAGE_TOKENS
        device = MHATokenToKVPool(
            size=PAGE_TOKENS,
            page_size=PAGE_TOKENS,
            dtype=torch.bfloat16,
            head_num=HEADS,
            head_dim=HEAD_DIM,
            layer_num=block // _LAYER_BYTES,
            device="cpu",
            enable_memory_saver=False,
            enable_alt_stream=False,
        )
        with _allocated_by_us(huge):
            self.host = MHATokenToKVPoolHost(
                device, tokens / PAGE_TOKENS, 0, PAGE_TOKENS, "page_first", pin_memory=False, device="cpu"
            )
        self.source = torch.arange(PAGES * PAGE_TOKENS, dtype=torch.int64)
        self.target = self.source + PAGES * PAGE_TOKENS
        data = self.host.kv_buffer.view(torch.int16)
        data.copy_(torch.randint(-(1 << 15), 1 << 15, data.shape, dtype=torch.int16))
        self._bytes = data.numpy()
        self.pages = pages_name(self.host.kv_buffer.data_ptr())

    # By numpy: torch's threads go on spinning for a while after their work, in the time of what comes next.

    def forget_target(self) -> None:
        self._half(self.target)[:] = 0

    def target_is_source(self) -> bool:
        return bool(np.array_equal(self._half(self.source), self._half(self.target)))

    def _half(self, tokens: Any) -> Any:
        return self._bytes[:, int(tokens[0]) : int(tokens[-1]) + 1]


@contextmanager
def _allocated_by_us(huge: bool) -> Iterator[None]:
    """What the plugin does to a server's host pool, for as long as this is entered."""
    from sglang.srt.mem_cache.pool_host.common import HostTensorAllocator

    from hicache_ext.sglang import host_memory

    original = HostTensorAllocator.allocate

    def allocate(_: Any, dims: Any, dtype: Any, device: str = "cpu") -> Any:
        return host_memory.tensor(dims, dtype)[0]

    if huge:
        HostTensorAllocator.allocate = allocate
    try:
        yield
    finally:
        HostTensorAllocator.allocate = original


class PoolSubject(Subject):
    """Batches of PAGES pages of a pool under new keys each round. Reads are of the newest round."""

    def __init__(self, pool: Pool, block: int, reused: int = 0) -> None:
        """reused: rounds after which keys come again, for a store without a capacity; 0: never."""
        self.pool, self.pages, self.bytes = pool, pool.pages, PAGES * block
        self._block, self._reused, self._written = block, reused, -1
        self._batch: list[str] = []

    @abstractmethod
    def write(self, keys: list[str], indices: Any) -> bool: ...

    @abstractmethod
    def read(self, keys: list[str], indices: Any) -> bool: ...

    def settle(self, keys: list[str]) -> None:
        """Not timed: what a write left behind reaches the disk."""

    def forget_cache(self, keys: list[str]) -> None:
        """Not timed: nothing of these pages may come from memory."""

    def before(self, case: str) -> None:
        if case in ("cold", "warm"):
            self.pool.forget_target()
            if case == "cold":
                self.forget_cache(self._batch)
            return
        self._written += 1
        round_ = self._written % self._reused if self._reused else self._written
        self._batch = [hashlib.sha256(f"{self._block}/{round_}/{n}".encode()).hexdigest() for n in range(PAGES)]

    def go(self, case: str) -> None:
        reads = case in ("cold", "warm")
        good = self.read(self._batch, self.pool.target) if reads else self.write(self._batch, self.pool.source)
        if not good:
            raise RuntimeError(f"{self.name}: {case} went wrong (block {self._block})")

    def after(self, case: str) -> None:
        if case not in ("cold", "warm"):
            self.settle(self._batch)
        elif not self.pool.target_is_source():
            raise RuntimeError(f"{self.name}: a read brought other bytes (block {self._block})")

    def fill_up(self) -> None:
        self.before("overwrite")
        self.go("overwrite")
        self.after("overwrite")


class Adapter(PoolSubject):
    """The SGLang adapter on a local tier."""

    name = "ours"

    def __init__(self, folder: Path, capacity: int, pool: Pool, block: int, engine: str = "auto") -> None:
        from hicache_ext.sglang.backend import HiCacheExtStorage

        super().__init__(pool, block)
        tier: dict[str, Any] = {"type": "storage_backends.local:LocalBackend", "name": "local", "path": str(folder)}
        tier |= {"capacity": capacity, "engine": engine}
        config = {"interface_v1": 1, "model": {"revision": "bench"}, "tiers": [tier]}
        self._storage = HiCacheExtStorage(io_stock.storage_config(config), {})
        self._storage.register_mem_pool_host(pool.host)
        store: Any = self._storage.store
        opened = store.tiers[0].backend._engine
        self.engine, self.depth = opened.name, opened.depth

    def write(self, keys: list[str], indices: Any) -> bool:
        return all(self._storage.batch_set_v1(keys, indices))

    def read(self, keys: list[str], indices: Any) -> bool:
        return all(self._storage.batch_get_v1(keys, indices))

    def settle(self, keys: list[str]) -> None:
        stored = self._storage.batch_exists(keys)
        if stored != len(keys):  # a refused page counts as written for SGLang, and must not for a benchmark
            raise RuntimeError(f"only {stored} of {len(keys)} pages were stored: {self._storage.details()}")

    def forget_cache(self, keys: list[str]) -> None:
        details = self._storage.details()["tiers"]["local"]
        if details["direct_io"] != "yes":
            raise RuntimeError(f"the local tier cannot bypass the page cache here: {details['direct_io']}")

    def close(self) -> None:
        self._storage.close()


class StockFile(PoolSubject):
    """SGLang's HiCacheFile, called as the cache controller's generic path does."""

    name, engine, depth = "stock-file", "file", 1
    cases = ("first fill", "overwrite", "cold", "warm")

    def __init__(self, folder: Path, capacity: int, pool: Pool, block: int) -> None:
        super().__init__(pool, block)
        self._store = io_stock.StockStore(folder, capacity)
        self._host = pool.host

    def write(self, keys: list[str], indices: Any) -> bool:
        data = [self._host.get_data_page(indices[i * PAGE_TOKENS]) for i in range(len(keys))]
        return bool(self._store.storage.batch_set(keys, data))

    def read(self, keys: list[str], indices: Any) -> bool:
        pages = self._store.storage.batch_get(keys, [self._host.get_dummy_flat_data_page() for _ in keys])
        for i, page in enumerate(pages):
            if page is None:
                return False
            self._host.set_from_flat_data_page(indices[i * PAGE_TOKENS], page)
        return True

    def settle(self, keys: list[str]) -> None:
        self._store.settle(keys)

    def forget_cache(self, keys: list[str]) -> None:
        self._store.forget_cache(keys)

    def close(self) -> None:
        self._store.close()


class NixlBackend(PoolSubject):
    """SGLang's NIXL backend with the POSIX plugin on io_uring, direct I/O (its default). It has no capacity."""

    name, engine, depth = "nixl-posix", "io_uring", PAGES

    def __init__(self, folder: Path, pool: Pool, block: int, rounds: int) -> None:
        from sglang.srt.mem_cache.storage.nixl.hicache_nixl import HiCacheNixl

        super().__init__(pool, block, reused=rounds + 1)
        # The variable would win over the folder that we ask for.
        os.environ.pop("SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR", None)
        config = {"plugin": {"posix": {"active": True, **io_nixl.PARAMETERS}}, "l3_cleaner_enabled": False}
        self._storage: Any = HiCacheNixl(io_stock.storage_config(config), str(folder))
        self._storage.register_mem_pool_host(pool.host)

    def write(self, keys: list[str], indices: Any) -> bool:
        return all(self._storage.batch_set_v1(keys, indices))

    def read(self, keys: list[str], indices: Any) -> bool:
        return all(self._storage.batch_get_v1(keys, indices))

    def close(self) -> None:
        self._storage.clear()


def run(
    folder: Path,
    engines: list[str],
    blocks: tuple[int, ...],
    memory: tuple[bool, ...],
    setup: Setup,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of every case. memory: huge pages or not, one after the other. say: told of subjects that take no part."""
    with_fio, without_nixl = io_fio.available(), io_nixl.unavailable()
    if not with_fio:
        say(io_fio.INSTALL)
    if without_nixl:
        say(without_nixl)
    fio_pages = {huge: io_fio.pages_of(folder, huge) if with_fio else "" for huge in memory}
    rows: list[dict[str, Any]] = []
    for block in blocks:
        for huge in memory:
            pool = Pool(block, huge)
            place = folder / f"{block}-{pool.pages}"
            # Room for all rounds of the first fill and a little more, so that these evict nothing.
            capacity = setup.rounds * PAGES * (block + 4096) * 17 // 16
            subjects: list[Subject] = []
            try:
                subjects += [Adapter(place / engine, capacity, pool, block, engine) for engine in engines]
                if with_fio:
                    depth = min(PAGES, subjects[0].depth)
                    size = max(PAGES * block, _FIO_BYTES)
                    subjects.append(io_fio.Fio(place / "fio", block, depth, size, huge, fio_pages[huge]))
                if not without_nixl:
                    subjects.append(NixlBackend(place / "nixl", pool, block, setup.rounds))
                subjects.append(StockFile(place / "stock", capacity, pool, block))
                subjects.append(VerifiedPass(block, huge))
                rows += measure(subjects, block, setup)
            finally:
                for subject in subjects:
                    subject.close()
    return rows

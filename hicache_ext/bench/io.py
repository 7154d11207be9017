"""Pages to and from disk: the SGLang adapter beside SGLang's own file backend, on one host pool, in one run.

Belongs here: the subjects, what one round of each case is, and its medians. Does not belong here: presentation
(hicache_ext.cli.bench).

What is timed is what SGLang's cache controller calls for one batch of 128 pages: for the adapter `batch_set_v1` and
`batch_get_v1` (checksums included), for the file backend `get_data_page` + `batch_set` and `batch_get` +
`set_from_flat_data_page`. Cases:

    first fill   the pages are new and so is the disk space
    overwrite    the tier is full: every page takes the place of an older one
    cold read    nothing of it is in the page cache (the adapter bypasses it; of stock's files it is dropped before)
    warm read    stock only: the file is in the page cache

Stock's write ends in the page cache: what the disk still has to do is not in its time, nor in its CPU seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from hicache_ext.bench.machine import page_kind

PAGES = 128  # what the controller hands over at a time
BLOCKS = (256 << 10, 1 << 20, 2 << 20)
PAGE_TOKENS = 16
HEADS, HEAD_DIM = 8, 128
_LAYER_BYTES = 2 * PAGE_TOKENS * HEADS * HEAD_DIM * 2  # K and V of one layer, bfloat16


class Subject(Protocol):
    """One way from a host pool to disk and back."""

    name: str
    engine: str
    depth: int

    def write(self, keys: list[str], indices: Any) -> bool: ...
    def read(self, keys: list[str], indices: Any) -> bool: ...
    def settle(self, keys: list[str]) -> None:
        """Not timed: let what a write left behind reach the disk."""

    def forget_cache(self, keys: list[str]) -> None:
        """Not timed: nothing of these pages may come from memory."""

    def close(self) -> None: ...


@dataclass
class Samples:
    """Rounds of one case. seconds: wall clock. cpu: user and system seconds of every thread of the process."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    subject: str
    engine: str
    op: str
    case: str
    block: int
    depth: int


class Pool:
    """SGLang's MHA host pool on the CPU: twice PAGES pages of `block` bytes, half with bytes to write, half to read."""

    def __init__(self, block: int) -> None:
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
        self.host = MHATokenToKVPoolHost(
            device, tokens / PAGE_TOKENS, 0, PAGE_TOKENS, "page_first", pin_memory=False, device="cpu"
        )
        self.source = torch.arange(PAGES * PAGE_TOKENS, dtype=torch.int64)
        self.target = self.source + PAGES * PAGE_TOKENS
        data = self.host.kv_buffer.view(torch.int16)
        data.copy_(torch.randint(-(1 << 15), 1 << 15, data.shape, dtype=torch.int16))
        self.pages = page_kind(self.host.kv_buffer.data_ptr())

    def forget_target(self) -> None:
        self.host.kv_buffer[:, self.target[0] : self.target[-1] + 1] = 0

    def target_is_source(self) -> bool:
        import torch

        halves = [self.host.kv_buffer[:, part[0] : part[-1] + 1] for part in (self.source, self.target)]
        return torch.equal(*(half.view(torch.int16) for half in halves))


class Adapter:
    """The SGLang adapter on a local tier."""

    name = "ours"

    def __init__(self, folder: Path, capacity: int, pool: Pool, engine: str = "auto") -> None:
        from hicache_ext.sglang.backend import HiCacheExtStorage

        tier: dict[str, Any] = {"type": "storage_backends.local:LocalBackend", "name": "local", "path": str(folder)}
        tier |= {"capacity": capacity, "engine": engine}
        config = {"interface_v1": 1, "model": {"revision": "bench"}, "tiers": [tier]}
        self._storage = HiCacheExtStorage(_storage_config(config), {})
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


class StockFile:
    """SGLang's HiCacheFile, called as the cache controller's generic path does."""

    name = "stock-file"
    engine = "file"
    depth = 1

    def __init__(self, folder: Path, capacity: int, pool: Pool) -> None:
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile

        # The variable would win over the folder that we ask for.
        os.environ.pop("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", None)
        self._storage = HiCacheFile(_storage_config({"max_size": capacity, "eviction_ratio": 1.0}), str(folder))
        self._pool = pool.host

    def write(self, keys: list[str], indices: Any) -> bool:
        data = [self._pool.get_data_page(indices[i * PAGE_TOKENS]) for i in range(len(keys))]
        return bool(self._storage.batch_set(keys, data))

    def read(self, keys: list[str], indices: Any) -> bool:
        pages = self._storage.batch_get(keys, [self._pool.get_dummy_flat_data_page() for _ in keys])
        for i, page in enumerate(pages):
            if page is None:
                return False
            self._pool.set_from_flat_data_page(indices[i * PAGE_TOKENS], page)
        return True

    def settle(self, keys: list[str]) -> None:
        for fd in self._open(keys):
            os.fdatasync(fd)

    def forget_cache(self, keys: list[str]) -> None:
        for fd in self._open(keys):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if _cached_bytes(fd):
                raise RuntimeError("the page cache kept stock's files: its reads would not be cold")

    def close(self) -> None:
        self._storage.clear()

    def _open(self, keys: list[str]) -> Iterator[int]:
        for key in keys:
            fd = os.open(Path(self._storage.file_path) / f"{self._storage._get_suffixed_key(key)}.bin", os.O_RDONLY)
            try:
                yield fd
            finally:
                os.close(fd)


def run(
    folder: Path, engines: list[str], blocks: tuple[int, ...], rounds: int, progress: Callable[[str], None]
) -> tuple[list[dict[str, Any]], str]:
    """Rows of every case (see the command's JSON file), and the kind of pages of the pool's memory."""
    samples: dict[Case, Samples] = {}
    kind = ""
    for block in blocks:
        pool = Pool(block)
        kind = pool.pages
        # Room for all rounds of the first fill and a little more, so that these evict nothing.
        capacity = rounds * PAGES * (block + 4096) * 17 // 16
        subjects: list[Subject] = []
        try:
            for engine in engines:
                opened = Adapter(folder / f"ours-{engine}-{block}", capacity, pool, engine)
                subjects.append(opened)
            subjects.append(StockFile(folder / f"stock-{block}", capacity, pool))
            _measure(subjects, pool, block, rounds, samples, progress)
        finally:
            for subject in subjects:
                subject.close()
    return [_row(case, taken) for case, taken in samples.items()], kind


def _measure(
    subjects: list[Subject],
    pool: Pool,
    block: int,
    rounds: int,
    samples: dict[Case, Samples],
    progress: Callable[[str], None],
) -> None:
    def timed(subject: Subject, op: str, case: str, round_: int, label: str = "") -> None:
        keys = _keys(block, round_)
        call, indices = (subject.write, pool.source) if op == "write" else (subject.read, pool.target)
        if op == "read":
            pool.forget_target()
        before, since = _cpu(), time.perf_counter()
        good = call(keys, indices)
        seconds, cpu = time.perf_counter() - since, _cpu() - before
        if not good or (op == "read" and not pool.target_is_source()):
            raise RuntimeError(f"{subject.name}: a {op} of round {round_} went wrong (block {block})")
        if op == "write":
            subject.settle(keys)
        taken = samples.setdefault(
            Case(label or subject.name, subject.engine, op, case, block, subject.depth), Samples()
        )
        taken.seconds.append(seconds)
        taken.cpu.append(cpu)

    def each(round_: int) -> list[Subject]:
        turn = round_ % len(subjects)
        return subjects[turn:] + subjects[:turn]

    for round_ in range(rounds):
        progress(f"{block >> 10} KiB: first fill {round_ + 1}/{rounds}")
        for subject in each(round_):
            timed(subject, "write", "first fill", round_)
    # What room is left is used up, so that what follows replaces older pages.
    for subject in subjects:
        subject.write(_keys(block, rounds), pool.source)
        subject.settle(_keys(block, rounds))
    for round_ in range(rounds + 1, 2 * rounds + 1):
        progress(f"{block >> 10} KiB: overwrite {round_ - rounds}/{rounds}")
        for subject in each(round_):
            timed(subject, "write", "overwrite", round_)
    for round_ in range(rounds):
        progress(f"{block >> 10} KiB: read {round_ + 1}/{rounds}")
        newest = 2 * rounds - round_ % 2  # of all that may be evicted, these two are the last
        for subject in each(round_):
            subject.forget_cache(_keys(block, newest))
            timed(subject, "read", "cold", newest)
            if isinstance(subject, StockFile):
                timed(subject, "read", "warm", newest, "stock-file-warm")


def _row(case: Case, taken: Samples) -> dict[str, Any]:
    gigabytes = PAGES * case.block / 1e9
    speeds = sorted(gigabytes / seconds for seconds in taken.seconds)
    return {
        "subject": case.subject,
        "engine": case.engine,
        "op": case.op,
        "case": case.case,
        "block": case.block,
        "depth": case.depth,
        "gb_per_s": round(statistics.median(speeds), 4),
        "spread": [round(speeds[0], 4), round(speeds[-1], 4)],
        "cpu_s_per_gb": round(statistics.median(taken.cpu) / gigabytes, 4),
        "rounds": len(speeds),
    }


def _keys(block: int, round_: int) -> list[str]:
    return [hashlib.sha256(f"{block}/{round_}/{page}".encode()).hexdigest() for page in range(PAGES)]


def _cached_bytes(fd: int) -> int:
    """How much of a file is in the page cache. (A read with RWF_NOWAIT would start read-ahead.)"""
    length = os.fstat(fd).st_size
    # MAP_PRIVATE and writable only so that ctypes accepts it; nothing is touched.
    with mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        start = ctypes.c_char.from_buffer(view)
        states = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), states)
        del start
    return 0 if failed else sum(state & 1 for state in states) * mmap.PAGESIZE


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _storage_config(extra: dict[str, Any]) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    values: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "bench",
        "extra_config": extra,
    }
    known = {field.name for field in fields(HiCacheStorageConfig)}
    return HiCacheStorageConfig(**{name: value for name, value in values.items() if name in known})

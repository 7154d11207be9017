"""SGLang's own storage backends as subjects need them: how they are configured, and their files in the page cache.

Belongs here: what both suites share of stock's HiCacheFile and of SGLang's NIXL backend. Does not belong here: rounds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

INSTALL = "SGLang is not installed, stock-file's rows are left out. Fix: pip install 'hicache-ext[sglang]'"


class StockStore:
    """A HiCacheFile of `capacity` bytes that throws out its oldest files when it is full."""

    def __init__(self, folder: Path, capacity: int) -> None:
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile

        # The variable would win over the folder that we ask for.
        os.environ.pop("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", None)
        self.storage: Any = HiCacheFile(storage_config({"max_size": capacity, "eviction_ratio": 1.0}), str(folder))

    def settle(self, keys: list[str]) -> None:
        """What a write left in the page cache goes to the disk."""
        for fd in self._open(keys):
            os.fdatasync(fd)

    def forget_cache(self, keys: list[str]) -> None:
        for fd in self._open(keys):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_bytes(fd):
                raise RuntimeError("the page cache kept stock's files: its reads would not be cold")

    def close(self) -> None:
        self.storage.clear()

    def _open(self, keys: list[str]) -> Iterator[int]:
        for key in keys:
            fd = os.open(Path(self.storage.file_path) / f"{self.storage._get_suffixed_key(key)}.bin", os.O_RDONLY)
            try:
                yield fd
            finally:
                os.close(fd)


def storage_config(extra: dict[str, Any]) -> Any:
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


def cached_bytes(fd: int) -> int:
    """How much of a file is in the page cache. (A read with RWF_NOWAIT would start read-ahead.)"""
    length = os.fstat(fd).st_size
    # MAP_PRIVATE and writable only so that ctypes accepts it; nothing is touched.
    with mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        start = ctypes.c_char.from_buffer(view)
        states = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), states)
        del start
    return 0 if failed else sum(state & 1 for state in states) * mmap.PAGESIZE

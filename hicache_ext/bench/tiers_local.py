"""The yardstick of the local tier: fio on the same file system."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hicache_ext.bench import io_fio
from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Role, Subject, Taken, Work
from storage_backends.base import OptionError

_CASES = {"write": "first fill", "overwrite": "overwrite", "read": "cold"}
_LEAST = 256 << 20  # fio counts time and CPU in milliseconds
_DEPTH = 32


class FioTool(Subject):
    """Sequential, direct, with registered buffers; see io_fio. Its CPU is what it counts itself."""

    name, role = "fio", Role.TOOL
    cases = tuple(_CASES)
    keeps = True

    def __init__(self, folder: Path, page: int, depth: int, size: int) -> None:
        pages = io_fio.pages_of(folder, True)
        self._page, self._fio = page, io_fio.Fio(folder, page, depth, max(size, _LEAST), True, pages)
        self.way = f"io_uring, depth {depth}, {pages} pages"

    def round(self, case: str, work: Work) -> Taken:
        self._fio.before(_CASES[case])
        timing = self._fio.timed(_CASES[case])
        return Taken(timing.seconds, timing.cpu, timing.bytes // self._page, timing.bytes)

    def write(self, batch: Batch) -> None:
        raise NotImplementedError("fio times itself")

    read = remove = write

    def lookup(self, batch: Batch) -> int:
        raise NotImplementedError("fio looks nothing up")

    def close(self) -> None:
        self._fio.close()


class LocalYardstick(Yardstick):
    """The tier gets folders of its own beside the user's, on the same disks."""

    cases = ("write", "overwrite", "read", "lookup")
    keeps = True

    def apart(self, options: Options, token: str, size: int) -> Options:
        given = options["path"]
        paths = [Path(path) for path in (given if isinstance(given, (list, tuple)) else [given])]
        for path in paths:
            if path.exists() and not path.is_dir():
                raise OptionError("path", str(path), "is no folder", "measure in a folder on a file system")
        capacity = max(size * 17 // 16, (64 << 20) * len(paths))
        return {
            **options,
            "path": [str(path / f"hicache-bench-{token}" / "tier") for path in paths],
            "capacity": capacity,
        }

    def clean(self, options: Options) -> None:
        for path in options["path"]:
            shutil.rmtree(Path(path).parent, ignore_errors=True)

    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        if not io_fio.available():
            say(io_fio.INSTALL)
            return []
        places = options.places
        if len(places) > 1:
            say("fio takes one folder: its rows are left out for a tier of several disks")
            return []
        size = memory.count * memory.block
        return [FioTool(places[0][0].parent / "fio", memory.block, min(plan.batch, _DEPTH), size)]


YARDSTICK = LocalYardstick()

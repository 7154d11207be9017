"""The yardstick of the shared_fs tier: a plain loop of preadv and pwritev over files on the same share."""

from __future__ import annotations

import os
import shutil
import threading
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import InThreads, Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject
from storage_backends.base import OptionError

if TYPE_CHECKING:
    from storage_backends.shared_fs.options import SharedFsOptions


class PlainFiles(InThreads):
    """As many threads as the tier has, each with a file for its part of a batch and one call a page. Nothing is
    checked, and nobody else could find the pages."""

    name = "preadv"
    cases = ("write", "read")

    def __init__(self, options: SharedFsOptions, folder: Path) -> None:
        super().__init__(options.threads)
        self._folder = folder
        folder.mkdir(parents=True)
        self._direct = os.O_DIRECT if options.direct and _direct_works(folder) else 0
        self.way = f"{options.threads} threads, {'O_DIRECT' if self._direct else 'buffered'}"
        self._numbers = count()
        self._places: dict[str, tuple[Path, int]] = {}
        self._lock = threading.Lock()

    def write_part(self, part: Batch) -> None:
        file = self._folder / f"{next(self._numbers)}.plain"
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._direct, 0o600)
        at = 0
        for buffer in part.buffers:
            at += _whole(os.pwritev(fd, [buffer], at), buffer)
        os.close(fd)
        with self._lock:
            for i, name in enumerate(part.names):
                self._places[name] = (file, i * len(part.buffers[0]))

    def read_part(self, part: Batch) -> None:
        opened: dict[Path, int] = {}
        for name, buffer in zip(part.names, part.buffers, strict=True):
            file, at = self._places[name]
            if file not in opened:
                opened[file] = os.open(file, os.O_RDONLY | self._direct)
            _whole(os.preadv(opened[file], [buffer], at), buffer)
        for fd in opened.values():
            os.close(fd)

    def lookup_part(self, part: Batch) -> int:
        return sum(name in self._places for name in part.names)

    def remove_part(self, part: Batch) -> None:
        with self._lock:
            files = {self._places.pop(name)[0] for name in part.names}
            used = {file for file, _ in self._places.values()}
        for file in files - used:
            file.unlink()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


class SharedFsYardstick(Yardstick):
    """The tier gets a directory of its own beside the user's, on the same share. Nothing is removed between rounds: the
    tier would remove files in the background of the next one."""

    keeps = True

    def apart(self, options: Options, token: str, size: int) -> Options:
        path = Path(options["path"])
        place = path if path.is_dir() else path.parent
        if not place.is_dir():
            raise OptionError("path", str(path), "is not there", "mount the share first")
        return {**options, "path": str(place / f"hicache-bench-{token}"), "capacity": 0, "ttl": 0}

    def clean(self, options: Options) -> None:
        shutil.rmtree(options["path"], ignore_errors=True)

    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        return [PlainFiles(options, options.path.parent / f"{options.path.name}-plain")]


def _direct_works(folder: Path) -> bool:
    probe = folder / ".probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _whole(moved: int, buffer: memoryview) -> int:
    if moved != len(buffer):
        raise OSError(f"{moved} of {len(buffer)} bytes moved")
    return moved


YARDSTICK = SharedFsYardstick()
"""What `bench tiers` measures a shared_fs tier beside."""

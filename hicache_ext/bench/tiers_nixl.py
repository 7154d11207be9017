"""The yardstick of the nixl tier: NIXL's own agent on registered memory, with one file for all pages."""

from __future__ import annotations

import os
import shutil
import uuid
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject
from storage_backends.base import OptionError
from storage_backends.nixl.agent import Agent, Side, Transfer
from storage_backends.nixl.library import load

if TYPE_CHECKING:
    from storage_backends.nixl.options import NixlOptions

_GROUP = 8
_SECONDS = 60.0


class PlainNixl(Subject):
    """Transfers of 8 pages, as many at a time as the tier has. Nothing is checked, and nobody else could find the
    pages: they follow each other in a file of the tier's capacity, whose room was taken before."""

    name = "nixl"
    cases = ("write", "overwrite", "read")
    keeps = True

    def __init__(self, options: NixlOptions, folder: Path, memory: Memory) -> None:
        folder.mkdir(parents=True)
        self._folder, self._most = folder, options.connections
        self._agent = Agent(load(options.needs_gpu), options.plugin, options.plugin_params())
        self.way = f"{options.plugin}, {options.connections} transfers of up to {_GROUP} pages, O_DIRECT"
        self._memory = self._agent.register("DRAM", [(memory.address, memory.size, 0, "")])
        self._fd = os.open(folder / "pages", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        self._room = int(options.capacity or 0)
        os.posix_fallocate(self._fd, 0, self._room)
        self._file = self._agent.register("FILE", [(0, self._room, self._fd, "")])
        self._next = 0
        self._places: dict[str, int] = {}

    def write(self, batch: Batch) -> None:
        size = int(batch.pages.lengths[0])
        for name in batch.names:
            if self._next + size > self._room:
                self._next = 0
            self._places[name], self._next = self._next, self._next + size
        self._move(batch, write=True)

    def read(self, batch: Batch) -> None:
        self._move(batch, write=False)

    def lookup(self, batch: Batch) -> int:
        return sum(name in self._places for name in batch.names)

    def remove(self, batch: Batch) -> None:
        for name in batch.names:
            del self._places[name]

    def close(self) -> None:
        self._agent.forget(self._file)
        self._agent.forget(self._memory)
        self._agent.close(self)
        os.close(self._fd)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _move(self, batch: Batch, write: bool) -> None:
        flying = deque[Transfer]()
        for at in range(0, len(batch), _GROUP):
            if len(flying) == self._most:
                self._finish(flying.popleft())
            chosen = slice(at, at + _GROUP)
            addresses, lengths = batch.pages.addresses[chosen], batch.pages.lengths[chosen]
            offsets = np.array([self._places[name] for name in batch.names[chosen]], np.uint64)
            memory = np.column_stack([addresses, lengths, np.zeros_like(addresses)])
            file = np.column_stack([offsets, lengths, np.full_like(addresses, self._fd)])
            flying.append(self._agent.start(write, Side("DRAM", memory), Side("FILE", file)))
        while flying:
            self._finish(flying.popleft())

    def _finish(self, transfer: Transfer) -> None:
        if not self._agent.wait([transfer], _SECONDS) or not transfer.good:
            raise RuntimeError("NIXL: a transfer failed")


class NixlYardstick(Yardstick):
    """A tier of files gets a directory of its own beside the user's, which the first fill fills: from then on pages
    take the files of older ones. One of objects is measured alone."""

    def measured(self, options: Options) -> tuple[tuple[str, ...], bool]:
        return (("write", "overwrite", "read", "lookup"), True) if options.get("path") else (self.cases, self.keeps)

    def apart(self, options: Options, token: str, size: int) -> Options:
        if not options.get("path"):
            return options
        path = Path(options["path"])
        place = path if path.is_dir() else path.parent
        if not place.is_dir():
            raise OptionError("path", str(path), "is not there", "make it, or mount what it is on")
        return {**options, "path": str(place / f"hicache-bench-{uuid.uuid4().hex}"), "capacity": size}

    def clean(self, options: Options) -> None:
        if options.get("path"):
            shutil.rmtree(options["path"], ignore_errors=True)

    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        if not options.files:
            say("nixl: objects are measured alone")
            return []
        return [PlainNixl(options, options.path.parent / f"{options.path.name}-plain", memory)]


YARDSTICK = NixlYardstick()
"""What `bench tiers` measures a nixl tier beside."""

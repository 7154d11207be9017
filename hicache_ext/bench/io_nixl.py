"""NIXL's POSIX plugin on io_uring, as a library and as SGLang's own NIXL backend uses it.

Belongs here: whether NIXL is here and fit to be compared with, and its calls. Does not belong here: rows.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.io_rounds import Subject

INSTALL = "pip install 'nixl[cu12]>=1.5.1'"
_OLDEST = (1, 5, 1)  # earlier ones report success on a short read
_POLL_SECONDS = 1e-4  # as SGLang's backend does
PARAMETERS = {"use_uring": "true", "use_aio": "false"}


def unavailable() -> str:
    """Why NIXL takes no part, with the fix; empty when it does."""
    found = installed()
    if not found:
        return f"NIXL is not installed, its rows are left out. Fix: {INSTALL}"
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < _OLDEST:
        return f"NIXL {found} reports success on short reads, its rows are left out. Fix: {INSTALL}"
    # It speaks on stdout, and of errors where SGLang only tries what NIXL can do. Real failures raise all the same.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    try:
        import nixl._api  # noqa: F401
    except Exception as error:  # its libraries are picky about their surroundings
        return f"NIXL cannot be loaded ({error}), its rows are left out"
    return ""


def installed() -> str:
    for name in ("nixl", "nixl-cu12", "nixl-cu13"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


class Nixl(Subject):
    """Transfers of a quarter of the depth each, four at a time, from and to one file."""

    name, engine = "nixl-posix", "io_uring"
    cases = ("first fill", "overwrite", "cold", "mixed")

    def __init__(self, folder: Path, memory: Memory, depth: int, size: int, group: int) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "nixl.data"
        self._memory, self.depth, self.bytes, self._group = memory, depth, size, group
        self.pages = memory.pages
        self._name = f"bench-{uuid.uuid4()}"
        self._agent: Any = nixl_agent(self._name, nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", PARAMETERS)
        self._memory_handle = self._register([(memory.address, memory.size, 0, "")], "DRAM")
        self._fd, self._file_handle = -1, None
        self._plan: list[tuple[str, Any, Any]] = []

    def before(self, case: str) -> None:
        if case == "first fill":
            self._close_file()
            self._path.unlink(missing_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._fd, 0, self.bytes)
            self._file_handle = self._register([(0, self.bytes, self._fd, "")], "FILE")
        if case == "cold":
            self._memory.target[:] = 0
        block = self._memory.block
        self._plan = []
        for at in range(0, self.bytes // block, self._group):
            reads = case == "cold" or (case == "mixed" and at // self._group % 2 == 0)
            numbers = range(at, min(at + self._group, self.bytes // block))
            memory = [(self._memory.address_of(number, reads), block, 0) for number in numbers]
            file = [(number * block, block, self._fd) for number in numbers]
            descriptors = (self._agent.get_xfer_descs(memory, "DRAM"), self._agent.get_xfer_descs(file, "FILE"))
            self._plan.append(("READ" if reads else "WRITE", *descriptors))

    def go(self, case: str) -> None:
        agent, flying = self._agent, deque[Any]()
        for op, memory, file in self._plan:
            if len(flying) * self._group >= self.depth:
                self._finish(flying.popleft())
            handle = agent.initialize_xfer(op, memory, file, self._name)
            if agent.transfer(handle) == "ERR":
                raise RuntimeError("nixl-posix: a transfer failed")
            flying.append(handle)
        while flying:
            self._finish(flying.popleft())

    def after(self, case: str) -> None:
        if case == "cold" and not self._memory.arrived():
            raise RuntimeError("nixl-posix: a read brought other bytes")

    def close(self) -> None:
        self._close_file()
        self._agent.deregister_memory(self._memory_handle)
        self._path.unlink(missing_ok=True)

    def _finish(self, handle: Any) -> None:
        while (state := self._agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise RuntimeError("nixl-posix: a transfer failed")
            time.sleep(_POLL_SECONDS)
        self._agent.release_xfer_handle(handle)

    def _register(self, places: list[tuple[int, int, int, str]], kind: str) -> Any:
        return self._agent.register_memory(self._agent.get_reg_descs(places, kind))

    def _close_file(self) -> None:
        if self._fd >= 0:
            self._agent.deregister_memory(self._file_handle)
            os.close(self._fd)
            self._fd = -1

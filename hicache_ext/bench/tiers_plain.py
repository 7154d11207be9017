"""What `bench tiers` knows of a type of tier besides the contract: whom to measure it beside, and where.

Belongs here: the interface, and what plain clients share. Does not belong here: any one store.

A backend in `storage_backends/X.py` or `storage_backends/X/` has its yardstick in `hicache_ext/bench/tiers_X.py`, as
`YARDSTICK = ...`; a backend without that is measured alone.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_rounds import Batch, Plan, Subject
from storage_backends.base import Backend

Options = dict[str, Any]
"""A tier's options as a configuration has them."""

Say = Callable[[str], None]


class Yardstick:
    """Every method has a default that will do.

    cases: what is measured. keeps: the tier makes room by itself, so nothing is removed between rounds.
    """

    cases: tuple[str, ...] = ("write", "read", "lookup")
    keeps = False

    def measured(self, options: Options) -> tuple[tuple[str, ...], bool]:
        """cases and keeps of a tier with these options."""
        return self.cases, self.keeps

    def apart(self, options: Options, token: str, size: int) -> Options:
        """The options under which nobody's pages are met or evicted; `size` bytes are written in all.

        Needed only where pages of a namespace of its own could harm others'. Raises OptionError.
        """
        return options

    def clean(self, options: Options) -> None:
        """Remove what `apart` made; the tier is closed. Pages on a store are removed without this."""

    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        """Who does the same with this store (options: the backend's own, checked) and this memory. say: who is left
        out, and why."""
        return []

    def moved(self, options: Options, port: int) -> Options | None:
        """The same tier with its server at 127.0.0.1:port, where somebody else plays dead; None: it has no server."""
        return None


def yardstick(backend: type[Backend]) -> Yardstick:
    """The yardstick of this type of tier."""
    package, _, rest = backend.__module__.partition(".")
    name = f"hicache_ext.bench.tiers_{rest.partition('.')[0]}"
    if package != "storage_backends" or find_spec(name) is None:
        return Yardstick()
    found = importlib.import_module(name).YARDSTICK
    assert isinstance(found, Yardstick)
    return found


class InThreads(Subject):
    """A plain client that has a part of each batch moved by each of `threads` threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bench-plain")

    @abstractmethod
    def write_part(self, part: Batch) -> None: ...

    @abstractmethod
    def read_part(self, part: Batch) -> None: ...

    @abstractmethod
    def lookup_part(self, part: Batch) -> int: ...

    @abstractmethod
    def remove_part(self, part: Batch) -> None: ...

    def write(self, batch: Batch) -> None:
        self._each(self.write_part, batch)

    def read(self, batch: Batch) -> None:
        self._each(self.read_part, batch)

    def lookup(self, batch: Batch) -> int:
        return sum(self._each(self.lookup_part, batch))

    def remove(self, batch: Batch) -> None:
        self._each(self.remove_part, batch)

    def close(self) -> None:
        self._pool.shutdown()

    def _each(self, call: Callable[[Batch], Any], batch: Batch) -> list[Any]:
        if len(batch) == 1:
            return [call(batch)]
        return list(self._pool.map(call, batch.parts(self._threads)))

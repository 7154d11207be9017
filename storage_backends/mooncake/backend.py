"""The mooncake tier: pages as objects of a Mooncake store.

Belongs here: which requests move pages, and what Mooncake's codes mean. Does not belong here: the bytes of an object
(object.py), Mooncake's process (client.py, process.py), what memory it sees (memory.py).

An object's name is `prefix:version:namespace:key`, in hex. A group of pages is one `batch_get_into_multi_buffers` or
`batch_put_from_multi_buffers`: each page's head from or to the window, its payload from or to where it lies, if that is
memory that Mooncake's process sees too, or else through the window, in one piece with its head.

Room is the store's business: what it evicted is a miss, and so is a page whose lease ran out on its way, since its
place may be another's by then. Memory that this machine gives to the store (`segment`) is held by a process of its own,
which is not ended when a transfer takes too long.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from storage_backends.base import BackendOptions, Capabilities, Dispatcher, Outcome
from storage_backends.mooncake.client import Client, Process
from storage_backends.mooncake.load import Load
from storage_backends.mooncake.memory import Part, Region, Window, shared_regions
from storage_backends.mooncake.options import MooncakeOptions
from storage_backends.object_backend import Group, ObjectBackend, Unreachable

#: Mooncake's error codes (its include/types.h): no such object, or none that is whole, or not any more.
_ABSENT = frozenset({-703, -704, -707, -710, -712})
_NO_ROOM = -200
_EXISTS = -705
#: No master that would take requests.
_AWAY = frozenset({-900, -901, -1010, -1011})
#: Requests that are not about a group of pages, from any thread: lookups and removals.
_OTHER_LANES = 4


class MooncakeBackend(ObjectBackend):
    """Pages in the memory of a Mooncake store's machines."""

    Options = MooncakeOptions
    capabilities = Capabilities(persistent=True, shared=True, native_ttl=True)
    options: MooncakeOptions

    def __init__(self, options: MooncakeOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self.bounces = options.is_direct
        self._sealed = bool(options.seal_key_env or options.seal_key_file)
        self._window = Window(int(options.buffer), options.connections)
        self._parts: queue.SimpleQueue[Part] = queue.SimpleQueue()
        for number in range(options.connections):
            self._parts.put(self._window.part(number))
        self._regions: list[Region] = []
        self._shared_with: Process | None = None
        self._region_lock = threading.Lock()
        self._files = [self._window.region]
        self._client = Client(options, lanes=1 + options.connections + _OTHER_LANES, ready=self._ready)
        self._holder = Client(options, segment=int(options.segment)) if options.segment else None

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        super().check(options)
        assert isinstance(options, MooncakeOptions)
        options.checked()

    @classmethod
    def shares_memory(cls, options: BackendOptions) -> bool:
        assert isinstance(options, MooncakeOptions)
        return options.is_direct

    def register_memory(self, address: int, length: int) -> None:
        """Memory that other processes can map is used as it is; pages in any other are copied on their way."""
        if not self.options.is_direct:
            return
        with self._region_lock:
            known = {region.address for region in self._regions}
            new = []
            for region in shared_regions(address, length):
                if region.address in known:
                    os.close(region.fd)
                else:
                    new.append(region)
            self._regions += new
            self._files += new
            process = self._shared_with
            if process is not None and process.alive() and new:
                self._attempt("register", lambda: self._share(process, new))

    def sizes(self, names: list[str]) -> list[int]:
        codes = self._ask({"do": "sizes", "keys": names})
        return [code if code >= 0 else -1 for code in codes]

    def read_group(self, group: Group) -> None:
        with self._part() as part:
            while group.open:
                process = self._client.process()
                load = Load(process, part, group)
                for page in self._at_once(group, part):
                    if not load.add(page, copied=False):
                        break
                if not load.pages:
                    self._too_large(group, Outcome.FAILED)
                    return
                codes = process.ask({"do": "get", "keys": self._keys(group, load), **load.where})
                self._count_ways(load)
                failed = [self._read_page(group, load, i, code) for i, code in enumerate(codes)]
                self._misfits(group, [page for page in failed if page is not None])
                _away(codes)

    def write_group(self, group: Group) -> None:
        replaced = [self.name(group, page) for page in group.open if page in group.misfits]
        if replaced:
            self.delete(replaced)
        with self._part() as part:
            while group.open:
                process = self._client.process()
                load = Load(process, part, group)
                for page in self._at_once(group, part):
                    if not load.add(page, copied=self._sealed):
                        break
                    load.fill()
                if not load.pages:
                    self._too_large(group, Outcome.REJECTED)
                    return
                codes = process.ask({"do": "put", "keys": self._keys(group, load), **load.where})
                self._count_ways(load)
                for page, code in zip(load.pages, codes, strict=True):
                    self._wrote(group, page, code)
                _away(codes)

    def delete(self, names: list[str]) -> list[bool]:
        codes = self._ask({"do": "remove", "keys": names})
        return [code == 0 for code in codes]

    def clear_start(self, start: str) -> None:
        self._ask({"do": "clear", "start": start})

    def stats(self) -> Mapping[str, int | float | str]:
        """direct, copied: pages that travelled from or to where they lie, and through the window. starts: of Mooncake's
        process, the first one included."""
        with self._count_lock:
            ways = {name: self.counts[name] for name in ("direct", "copied")}
        return {**super().stats(), **ways, "starts": self._client.starts}

    def processes(self) -> list[int]:
        process = self._client.running()
        return [] if process is None else [process.pid]

    def abort(self) -> None:
        self._client.close()
        if self._holder is not None:
            self._holder.close()

    def close(self) -> None:
        super().close()
        regions, self._files = self._files, []
        for region in regions:
            os.close(region.fd)

    # ---- the process

    def _ready(self, process: Process) -> None:
        if process.share([self._window.region]):
            raise Unreachable("mooncake: it does not take the memory of `buffer`")
        with self._region_lock:
            self._share(process, self._regions)
            self._shared_with = process

    def _share(self, process: Process, regions: list[Region]) -> None:
        refused = sum(region.length for region in process.share(regions))
        if refused:
            self._once("regions", "mooncake: %d bytes of the host pool cannot be registered: copied instead", refused)

    def _ask(self, request: dict[str, Any]) -> list[int]:
        codes = self._client.process().ask(request)
        _away(codes)
        return codes

    def _at_once(self, group: Group, part: Part) -> list[int]:
        """The pages of the next request: where the window has no room for all of them, requests of about one size."""
        if self.options.is_direct:
            return group.open
        requests = -(-len(group.open) // max(1, part.room(group.form.size)))
        return group.open[: -(-len(group.open) // requests)]

    def _keys(self, group: Group, load: Load) -> list[str]:
        return [self.name(group, page) for page in load.pages]

    @contextmanager
    def _part(self) -> Iterator[Part]:
        part = self._parts.get()  # there are as many as threads
        try:
            yield part
        finally:
            self._parts.put(part)

    # ---- outcomes

    def _read_page(self, group: Group, load: Load, i: int, code: int) -> int | None:
        """Settle a page that was read; the page itself where its code does not tell what it is."""
        page = load.pages[i]
        if code == group.form.size:
            load.deliver(i)
            self.arrived(group, page, bytearray(load.heads[i]))
        elif code in _ABSENT:
            self.absent(group, page)
        elif code in _AWAY:
            group.settle(page, Outcome.FAILED)
        else:
            return page
        return None

    def _misfits(self, group: Group, pages: list[int]) -> None:
        """Pages that did not come: of another size than theirs, gone meanwhile, or on a machine that is."""
        if not pages:
            return
        for page, size in zip(pages, self.sizes([self.name(group, page) for page in pages]), strict=True):
            if size == -1:
                self.absent(group, page)
            elif size != group.form.size:
                group.set_corrupt(page)
            else:
                self.count("errors")
                self._once("transfer", "mooncake: a transfer failed; the machine that has the page may be gone")
                group.settle(page, Outcome.FAILED)

    def _wrote(self, group: Group, page: int, code: int) -> None:
        if code == 0:
            self.stored(group, page)
        elif code == _EXISTS:
            self.present(group, page)
        elif code in _AWAY:
            group.settle(page, Outcome.FAILED)
        elif code == _NO_ROOM:
            self.count("rejected")
            group.settle(page, Outcome.REJECTED)
        else:
            self.count("errors")
            self._once(f"write {code}", "mooncake: a write failed (%d)", code)
            group.settle(page, Outcome.FAILED)

    def _too_large(self, group: Group, outcome: Outcome) -> None:
        self._once(
            "buffer", "mooncake: `buffer` has no room for a page of %d bytes on each connection: make it larger",
            group.form.size,
        )  # fmt: skip
        for page in list(group.open):
            group.settle(page, outcome)

    def _count_ways(self, load: Load) -> None:
        copied = len(load.through)
        self.count("copied", copied)
        self.count("direct", len(load.pages) - copied)


def _away(codes: list[int]) -> None:
    """Raise Unreachable where the master did not answer."""
    found = next((code for code in codes if code in _AWAY), 0)
    if found:
        raise Unreachable(f"mooncake: the master does not answer ({found})")

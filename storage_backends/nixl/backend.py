"""The nixl tier: pages that a plugin of NIXL moves, as files or as objects.

Belongs here: which transfers move pages, through which memory, and what their ends mean. Does not belong here: NIXL's
calls (agent.py), names and removal (files.py, objects.py), the bytes of an object (object.py).

A page goes straight between its file and the caller's memory where that memory is registered and aligned; else, and
to objects always, through memory of our own (a lane), with a copy. The pages of a group are one transfer; where that
fails each is tried by itself, so that a bad one costs itself. What goes straight is waited for, however long it takes;
a page in a lane that is late is given up, and the lane stays out of use until its bytes have landed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Union

import numpy as np

from storage_backends.base import (
    CLOSE_SECONDS,
    BackendOptions,
    Capabilities,
    Dispatcher,
    OptionError,
    Outcome,
    Residency,
)
from storage_backends.nixl import library
from storage_backends.nixl.agent import Agent, Lane, Lanes, Side, Transfer
from storage_backends.nixl.files import BLOCK, SUFFIX, Files, Full, PageFile
from storage_backends.nixl.options import NixlOptions
from storage_backends.nixl.room import Room
from storage_backends.object import VERSION, ObjectFormats
from storage_backends.object_backend import Group, ObjectBackend, TooLate
from storage_backends.secrets import load_seal

if TYPE_CHECKING:
    from storage_backends.nixl.objects import Named, Objects

logger = logging.getLogger(__name__)


_PAUSE = 0.01

Place = Union[PageFile, "Named"]
_Row = tuple[int, int, int]


@dataclass(eq=False)
class _Moving:
    """Pages on their way together, and all that must stay until they have ended.

    slots: of each page, its address in the lane: its header where it goes straight, else all of it.
    """

    places: dict[int, Place]
    straight: bool
    lane: Lane
    slots: dict[int, int]
    rows: dict[int, list[_Row]]
    registered: object = None
    transfers: list[Transfer] = field(default_factory=list)


class NixlBackend(ObjectBackend):
    """Pages in the files of a directory, or in a bucket."""

    Options = NixlOptions
    capabilities = Capabilities(persistent=True, shared=True)
    options: NixlOptions
    SEPARATOR = "/"

    def __init__(self, options: NixlOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        type(self).check(options)
        api = library.load(options.needs_gpu)
        self._agent = Agent(api, options.plugin, options.plugin_params())
        self._library = library.described(api)
        self._room: Room | None = None
        self._store: Files | Objects
        if options.files:
            self._store = self._open_files()
            self.capabilities = Capabilities(persistent=True, shared=True, alignment=BLOCK, medium="DISK")
        else:
            from storage_backends.nixl.objects import Objects

            self._store = Objects(options, dispatcher)
            self.capabilities = Capabilities(persistent=True, shared=True, native_ttl=True)
        seal = load_seal(options.seal_key_env, options.seal_key_file)
        self._sealed = seal is not None
        self._formats = ObjectFormats(self._store.step, seal, self._store.pad)
        self._most_bytes = max(1, options.in_flight // options.connections)
        self._lanes = Lanes(self._agent)
        self._late: list[_Moving] = []
        self._known = np.empty((2, 0), np.uint64)  # memory that is registered: starts, sorted, and ends
        self._registered: list[object] = []
        self._lock = threading.Lock()

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        super().check(options)
        assert isinstance(options, NixlOptions)
        options.checked()
        library.build(options.needs_gpu)
        if options.needs_gpu:
            library.require_gpu(options.plugin)

    def _open_files(self) -> Files:
        options = self.options
        assert options.path is not None
        assert options.capacity is not None
        root = options.path / options.prefix
        self._room = Room(root, options.capacity, root / "tmp", self._evicted)
        try:
            files = Files(options.path, options.prefix, self._room)
        except OSError:
            self._room.close()
            raise
        how = "O_DIRECT" if files.direct.works else f"buffered I/O ({files.direct.reason})"
        if options.needs_gpu and not files.direct.works:
            self._room.close()
            raise OptionError("path", str(options.path), f"{options.plugin} needs O_DIRECT: {how}", "plugin: POSIX")
        logger.info("nixl: %s, %s in %s, %s", self._library, options.plugin, options.path, how)
        return files

    # ---- what ObjectBackend asks

    def sizes(self, names: list[str]) -> list[int]:
        return self._store.sizes(names)

    def touch(self, names: list[str]) -> None:
        self._store.touch(names)

    def delete(self, names: list[str]) -> list[bool]:
        return self._store.delete(names)

    def clear_start(self, start: str) -> None:
        self._store.clear_start(start)

    def read_group(self, group: Group) -> None:
        for pages in self._parts(group):
            places: dict[int, Place] = {}
            try:
                for page in pages:
                    found = self._store.open(self.name(group, page), group.form.size)
                    if isinstance(found, int):
                        self._not_whole(group, page, found)
                    else:
                        places[page] = found
            except BaseException:
                _close(places)
                raise
            self._move(group, places, False)

    def write_group(self, group: Group) -> None:
        for pages in self._parts(group):
            places: dict[int, Place] = {}
            try:
                for page in pages:
                    try:
                        places[page] = self._store.create(self.name(group, page), group.form.size)
                    except Full:
                        self._reject(group, page)
            except BaseException:
                _close(places)
                raise
            self._move(group, places, True)

    def register_memory(self, address: int, length: int) -> None:
        try:
            registered = self._agent.register("DRAM", [(address, length, 0, "")])
        except Exception as error:  # whatever a plugin has against this memory
            self._once("register", "%s: memory cannot be registered, pages are copied: %s", type(self).__name__, error)
            return
        with self._lock:
            self._registered.append(registered)
            both = np.concatenate([self._known, np.array([[address], [address + length]], np.uint64)], 1)
            self._known = both[:, np.argsort(both[0])]

    def stats(self) -> Mapping[str, int | float | str]:
        """bounced: pages that were copied through a lane. retried: transfers of several pages that failed. late: that
        took longer than `timeout`. polls: questions to NIXL whether a transfer has ended."""
        with self._count_lock:
            more = {name: self.counts[name] for name in ("bounced", "retried", "late")}
        room = {} if self._room is None else {"bytes_used": self._room.used, "evicted": self._room.evicted}
        return {**super().stats(), **more, **room, "polls": self._agent.polls}

    def versions(self) -> dict[str, str]:
        return {"nixl": self._library, "plugin": self.options.plugin}

    def close(self) -> None:
        until = time.monotonic() + CLOSE_SECONDS - 1
        super().close()
        with contextlib.suppress(TooLate):
            self._reap()
        while self._late and time.monotonic() < until:
            time.sleep(_PAUSE)
            with contextlib.suppress(TooLate):
                self._reap()
        if self._agent.close(self):
            self._lanes.close()
        self._store.close()

    # ---- transfers

    def _parts(self, group: Group) -> Iterator[list[int]]:
        """The group's pages, as many at a time as one connection may have on their way."""
        pages = list(group.open)
        step = max(1, self._most_bytes // group.form.size)
        for first in range(0, len(pages), step):
            if self._closing:
                raise TooLate("closed")
            yield pages[first : first + step]

    def _move(self, group: Group, places: dict[int, Place], write: bool) -> None:
        """Move these pages, settle them and close their places. Raises what costs those that are not settled."""
        if not places:
            return
        moving: _Moving | None = None
        try:
            self._reap()
            moving = self._arrange(group, places)
            for page in places:
                (_put if write else _spoil)(group, page, moving)
            self._transfer(moving, write)
            self._ended(group, moving, write)
        finally:
            if moving is None:
                _close(places)
            elif all(transfer.poll() for transfer in moving.transfers):
                self._finish(moving)
            else:
                with self._lock:
                    self._late.append(moving)

    def _arrange(self, group: Group, places: dict[int, Place]) -> _Moving:
        form, batch, pages = group.form, group.batch, list(places)
        straight = self.options.files and self._fits(group, pages)
        size = form.head_bytes if straight else form.size
        lane = self._lanes.take(size * len(pages))
        slots = {page: lane.memory.address + i * size for i, page in enumerate(pages)}
        rows: dict[int, list[_Row]] = {page: [(slots[page], size, 0)] for page in pages}
        if straight:
            for page in pages:
                span = slice(int(batch.offsets[page]), int(batch.offsets[page + 1]))
                pairs = zip(batch.addresses[span].tolist(), batch.lengths[span].tolist(), strict=True)
                rows[page] += [(address, length, 0) for address, length in pairs]
        else:
            self.count("bounced", len(pages))
        moving = _Moving(places, straight, lane, slots, rows)
        try:
            names = [(0, form.size, place.device, place.name) for place in places.values()]
            moving.registered = self._agent.register(self._store.kind, names)
        except BaseException:
            self._lanes.give(lane)
            raise
        return moving

    def _fits(self, group: Group, pages: list[int]) -> bool:
        """Whether all buffers of these pages are registered, and aligned as their files ask."""
        batch = group.batch
        at = np.concatenate([np.arange(batch.offsets[page], batch.offsets[page + 1]) for page in pages])
        first, lengths = batch.addresses[at], batch.lengths[at]
        if self._sealed or (((first | lengths) & np.uint64(BLOCK - 1)).any()):
            return False
        starts, ends = self._known
        which = np.searchsorted(starts, first, side="right") - 1
        return bool((which >= 0).all() and (first + lengths <= ends[which]).all())

    def _transfer(self, moving: _Moving, write: bool) -> None:
        """Until all have ended. Files of a group move together, and one by one where that fails."""
        pages = list(moving.places)
        self._post(moving, [pages] if self.options.files else [[page] for page in pages], write)
        self._wait(moving)
        if self.options.files and len(pages) > 1 and not moving.transfers[0].good:
            self.count("retried")
            self._post(moving, [[page] for page in pages], write)
            self._wait(moving)

    def _post(self, moving: _Moving, together: list[list[int]], write: bool) -> None:
        moving.transfers = []
        for pages in together:
            memory, store = [], []
            for page in pages:
                at = 0
                for row in moving.rows[page]:
                    memory.append(row)
                    store.append((at, row[1], moving.places[page].device))
                    at += row[1]
            sides = Side("DRAM", np.array(memory, np.uint64)), Side(self._store.kind, np.array(store, np.uint64))
            moving.transfers.append(self._agent.start(write, *sides))

    def _wait(self, moving: _Moving) -> None:
        if self._agent.wait(moving.transfers, self.options.timeout):
            return
        self.count("late")
        if not moving.straight:
            raise TooLate(f"NIXL took longer than {self.options.timeout} s")
        self._agent.wait(moving.transfers, math.inf)  # it is the caller's memory: nothing else ends well

    def _ended(self, group: Group, moving: _Moving, write: bool) -> None:
        """Settle all pages of what has ended."""
        pages, transfers = list(moving.places), moving.transfers
        good = [one.good for one in (transfers if len(transfers) == len(pages) else transfers * len(pages))]
        failed = [page for page, well in zip(pages, good, strict=True) if not well]
        for page, well in zip(pages, good, strict=True):
            if well and write:
                stored = moving.places[page].publish(page in group.misfits)
                (self.stored if stored else self.present)(group, page)
            elif well:
                self.arrived(group, page, _take(group, page, moving))
        if failed and write:
            for page in failed:
                self._reject(group, page) if self._store.full(group.form.size) else self._fail(group, page, "write")
        elif failed:
            for page, size in zip(failed, self.sizes([self.name(group, page) for page in failed]), strict=True):
                if size == group.form.size:
                    self._fail(group, page, "read")
                else:
                    self._not_whole(group, page, size)

    def _finish(self, moving: _Moving) -> None:
        self._agent.forget(moving.registered)
        _close(moving.places)
        self._lanes.give(moving.lane)

    def _reap(self) -> None:
        """Let go of what was late and has ended. TooLate where too much of it has not."""
        with self._lock:
            ended = [one for one in self._late if all(transfer.poll() for transfer in one.transfers)]
            self._late = [one for one in self._late if one not in ended]
            left = len(self._late)
        for moving in ended:
            self._finish(moving)
        if left >= self.options.connections:
            raise TooLate(f"{left} late transfers have not ended yet")

    # ---- ends of pages

    def _not_whole(self, group: Group, page: int, size: int) -> None:
        """There is no such object (-1), or one of another size."""
        if size < 0:
            self.absent(group, page)
        else:
            group.set_corrupt(page)

    def _reject(self, group: Group, page: int) -> None:
        self.count("rejected")
        group.settle(page, Outcome.REJECTED)

    def _fail(self, group: Group, page: int, what: str) -> None:
        self.count("errors")
        self._once(f"nixl {what}", "%s: NIXL could not %s a page", type(self).__name__, what)
        group.settle(page, Outcome.FAILED)

    def _evicted(self, path: str) -> None:
        """A file was removed to make room: PATH/prefix/version/namespace/xx/key.page."""
        *_, version, digest, _, key = path.split("/")
        with contextlib.suppress(ValueError):  # not one of ours
            if int(version) == VERSION:
                packed = bytes.fromhex(key.removesuffix(SUFFIX))
                self._presence.gone(bytes.fromhex(digest), [packed])
                self.report(Residency.REMOVED, bytes.fromhex(digest), packed)


def _put(group: Group, page: int, moving: _Moving) -> None:
    """The page's header into its slot; all of it where it does not go straight."""
    head, buffers = group.form.prepare(group.batch, page)
    at = moving.slots[page]
    ctypes.memmove(at, bytes(head), len(head))
    if moving.straight:
        return
    at += len(head)
    for buffer in buffers:
        ctypes.memmove(at, ctypes.addressof(ctypes.c_char.from_buffer(buffer)), len(buffer))
        at += len(buffer)
    ctypes.memset(at, 0, moving.slots[page] + group.form.size - at)


def _spoil(group: Group, page: int, moving: _Moving) -> None:
    """Make the last byte of the page's slot another one: NIXL takes the shorter answer to a read for the whole, and
    what an earlier transfer of the same page left in the slot would stand for the rest of it.
    """
    if not moving.straight:
        last = ctypes.c_uint8.from_address(moving.slots[page] + group.form.head_bytes + group.form.payload_bytes - 1)
        last.value ^= 0xFF


def _take(group: Group, page: int, moving: _Moving) -> bytearray:
    """The page's header, and its bytes in its buffers."""
    at = moving.slots[page]
    head = bytearray(ctypes.string_at(at, group.form.head_bytes))
    if not moving.straight:
        at += len(head)
        for buffer in group.batch.buffers(page):
            ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), at, len(buffer))
            at += len(buffer)
    return head


def _close(places: dict[int, Place]) -> None:
    for place in places.values():
        place.close()

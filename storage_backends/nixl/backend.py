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
from storage_backends.nixl.agent import Agent, Lanes, Side, Transfer
from storage_backends.nixl.files import BLOCK, SUFFIX, Files, Full, PageFile
from storage_backends.nixl.options import NixlOptions
from storage_backends.nixl.packing import COMPILED, Packing, stride_of
from storage_backends.nixl.room import Room
from storage_backends.object import VERSION, ObjectFormats
from storage_backends.object_backend import Group, ObjectBackend, TooLate
from storage_backends.secrets import load_seal
from storage_backends.slot_form import SlotForm, span

if TYPE_CHECKING:
    from storage_backends.nixl.objects import Named, Objects

logger = logging.getLogger(__name__)


_PAUSE = 0.01

Place = Union[PageFile, "Named"]
_FORMS = 64


@dataclass(eq=False)
class _Moving:
    """Pages on their way together, and all that must stay until they have ended."""

    places: dict[int, Place]
    packing: Packing
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
        self._plain: dict[bytes, SlotForm] = {}
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
                self._store.ready()
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
            moving.packing.put() if write else moving.packing.spoil()
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
        form, pages = group.form, list(places)
        straight = self.options.files and self._fits(group, pages)
        lane = self._lanes.take(stride_of(form, straight) * len(pages))
        if not straight:
            self.count("bounced", len(pages))
        moving = _Moving(places, Packing(form, self._plain_form(group), group.batch, pages, straight, lane))
        try:
            names = [(0, form.size, place.device, place.name) for place in places.values()]
            moving.registered = self._agent.register(self._store.kind, names)
        except BaseException:
            self._lanes.give(lane)
            raise
        return moving

    def _plain_form(self, group: Group) -> SlotForm | None:
        """Of pages whose headers compiled code can make."""
        if self._sealed or not self.options.files or not COMPILED:
            return None
        found = self._plain.get(group.form.namespace.digest)
        if found is None:
            if len(self._plain) >= _FORMS:
                self._plain.clear()
            found = self._plain[group.form.namespace.digest] = SlotForm(group.form.namespace)
        return found

    def _fits(self, group: Group, pages: list[int]) -> bool:
        """Whether all buffers of these pages are registered, and aligned as their files ask."""
        first = group.batch.addresses.reshape(len(group.batch), -1)[span(pages)]
        lengths = group.batch.lengths[: first.shape[1]]  # of each page
        if self._sealed or ((first | lengths) & np.uint64(BLOCK - 1)).any():
            return False
        starts, ends = self._known
        which = np.searchsorted(starts, first, side="right") - 1
        return bool((which >= 0).all() and (first + lengths <= ends[which]).all())

    def _transfer(self, moving: _Moving, write: bool) -> None:
        """Until all have ended. Files of a group move together, and one by one where that fails."""
        places = list(range(len(moving.places)))
        self._post(moving, [places] if self.options.files else [[place] for place in places], write)
        self._wait(moving)
        if self.options.files and len(places) > 1 and not moving.transfers[0].good:
            self.count("retried")
            if not write:
                moving.packing.spoil()
            self._post(moving, [[place] for place in places], write)
            self._wait(moving)

    def _post(self, moving: _Moving, together: list[list[int]], write: bool) -> None:
        """together: neighbouring places, whose pages are one transfer."""
        moving.transfers = []
        memory = moving.packing.memory()
        store = _in_store(memory, [place.device for place in moving.places.values()])
        for places in together:
            chosen = slice(places[0], places[-1] + 1)
            sides = Side("DRAM", memory[chosen].reshape(-1, 3)), Side(self._store.kind, store[chosen].reshape(-1, 3))
            moving.transfers.append(self._agent.start(write, *sides))

    def _wait(self, moving: _Moving) -> None:
        if self._agent.wait(moving.transfers, self.options.timeout):
            return
        self.count("late")
        if not moving.packing.straight:
            raise TooLate(f"NIXL took longer than {self.options.timeout} s")
        self._agent.wait(moving.transfers, math.inf)  # it is the caller's memory: nothing else ends well

    def _ended(self, group: Group, moving: _Moving, write: bool) -> None:
        """Settle all pages of what has ended."""
        pages, transfers = list(moving.places), moving.transfers
        good = [one.good for one in (transfers if len(transfers) == len(pages) else transfers * len(pages))]
        failed = [page for page, well in zip(pages, good, strict=True) if not well]
        well = [place for place in range(len(pages)) if good[place]]
        if write:
            self._publish(group, moving, [pages[place] for place in well])
        elif well:
            self._judge(group, moving, well)
        if failed and write:
            for page in failed:
                moving.places[page].abandon()
                self._reject(group, page) if self._store.full(group.form.size) else self._fail(group, page, "write")
        elif failed:
            for page, size in zip(failed, self.sizes([self.name(group, page) for page in failed]), strict=True):
                if size == group.form.size:
                    self._fail(group, page, "read")
                else:
                    self._not_whole(group, page, size)

    def _publish(self, group: Group, moving: _Moving, written: list[int]) -> None:
        """Settle these pages of a write, all of which are in the store."""
        digest, new = group.batch.namespace.digest, []
        try:
            for page in written:
                if moving.places[page].publish(page in group.misfits):
                    new.append(page)
                else:
                    self.present(group, page)
        finally:
            keys, notes = [group.batch.key(page) for page in new], group.batch.notes
            self._presence.seen(digest, keys)
            self._absence.gone(digest, keys)
            self.count("stored", len(new))
            self.count("bytes_written", len(new) * group.form.size)
            self.report(Residency.STORED, digest, b"".join(keys), None if notes is None else notes.only(new))
            for page in new:
                group.settle(page, Outcome.HIT)

    def _judge(self, group: Group, moving: _Moving, arrived: list[int]) -> None:
        """Settle the pages at these places of a read, all of which have arrived."""
        digest, hits = group.batch.namespace.digest, []
        pages = list(moving.places)
        self.count("bytes_read", len(arrived) * group.form.size)
        for place, good in zip(arrived, moving.packing.judge(arrived), strict=True):
            page = pages[place]
            if good:
                hits.append(page)
                notes = None if self._listener is None else group.form.notes(moving.packing.head(place))
                if notes is not None:  # another's page, maybe: now its tokens are known here
                    self.report(Residency.STORED, digest, group.batch.key(page), notes)
            elif moving.places[page].changed():
                self.absent(group, page)  # it made room while it was read
            else:
                group.set_corrupt(page)
        self._presence.seen(digest, [group.batch.key(page) for page in hits])
        for page in hits:
            group.settle(page, Outcome.HIT)

    def _finish(self, moving: _Moving) -> None:
        self._agent.forget(moving.registered)
        _close(moving.places)
        self._lanes.give(moving.packing.lane)

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


def _in_store(memory: np.ndarray, devices: list[int]) -> np.ndarray:
    """uint64[n, k, 3]: (offset, bytes, device) in each page's file or object of what moves from or to this memory."""
    rows = memory.copy()
    rows[:, :, 0] = np.cumsum(memory[:, :, 1], axis=1) - memory[:, :, 1]
    rows[:, :, 2] = np.array(devices, np.uint64)[:, None]
    return rows


def _close(places: dict[int, Place]) -> None:
    for place in places.values():
        place.close()

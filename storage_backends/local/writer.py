"""The writer's side of a folder: slots and extents, from allocation to eviction, and the log of it.

Belongs here: everything that changes files of the folder except the pages' own bytes (writes.py sends those).
Does not belong here: reading pages, how much of the directory this writer may use (directory.py), or who gets the room
and what goes for it (room.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from hicache_ext.page import Namespace
from storage_backends.format import BLOCK, ExtentHeader, FormatError, SlotShape, UnknownVersion
from storage_backends.local.extents import Extent, extent_numbers, extent_path, retired_numbers
from storage_backends.local.folder import POLL_SECONDS, YIELD_SECONDS, Folder
from storage_backends.local.free_slots import FreeSlots
from storage_backends.local.headers import Found
from storage_backends.local.index import Page
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.own_log import OwnLog
from storage_backends.local.residency import RECORD_BYTES, Kind, Record, encode_stored
from storage_backends.local.rules import Rules
from storage_backends.local.shares import MIN_EXTENT
from storage_backends.local.use import Recent

logger = logging.getLogger(__name__)

_MAX_EXTENT = 1 << 30
_EXTENTS_PER_SHARE = 32
_DISK_FULL_SECONDS = 10.0
#: Free slots that are enough, however many a namespace has.
_AHEAD = 256
#: Reasons for which a page goes that orders of eviction remember.
_FOR_ROOM = ("evicted", "reclaimed")

Place = tuple[Extent, int]
RemovedListener = Callable[[list[Page], str], None]
"""(pages, reason): pages that this writer stopped holding."""


class Writer:
    """Owner of one folder. Not thread-safe: the tier's lock is around every method.

    extents: by number; by_namespace has the same. free: slots that hold nothing, per namespace. leaving: extents that
    were given up, whose space is not free yet. disk_bytes: what all of them take on the disk, planned ones too. recent:
    bytes of our pages hit and stored of late. peers: this process's writers, one on each disk, by number; `join` adds
    this one. Chains span disks, so what goes with a page of one may be a page of another.
    """

    def __init__(
        self,
        folder: Folder,
        lock_fd: int,
        index: AnyIndex,
        rules: Rules,
        peers: dict[int, Writer],
        removed: RemovedListener,
        lock: threading.RLock,
    ) -> None:
        """lock: the tier's, for a moment at a time while this takes over what is in the folder."""
        self.path, self.number = folder.path, folder.number
        self._lock_fd = lock_fd
        self._files = folder.files
        self._index = index
        self._rules = rules
        self._removed = removed
        self.peers = peers
        self.extents: dict[int, Extent] = {}
        self.by_namespace: dict[bytes, dict[int, Extent]] = {}
        self.leaving: dict[int, Extent] = {}
        self.disk_bytes = 0
        self._bytes = Counter[bytes]()  # of each namespace's extents
        self._slots = Counter[bytes]()
        self.recent = Recent(time.monotonic)
        self.free: dict[bytes, FreeSlots] = {}
        self.disk_full_until = 0.0
        self._generation = time.time_ns()
        self._continue_log(folder, lock)
        self._load_extents(folder.lost, lock)

    def join(self, lock: threading.RLock) -> None:
        """The pages are ours by now (Index.adopt): take part. An extent at a time under the lock."""
        with lock:
            self.peers[self.number] = self
            for namespace in self.by_namespace:
                self._tell_capacity(namespace)
        for extent in list(self.extents.values()):
            with lock:
                header, number = extent.header, extent.number
                self._generation = max(
                    self._generation, header.generation, self._index.newest_generation(self.number, number)
                )
                used = self._index.used_slots(self.number, number)
                self._free(header.namespace).add_unread(number, header.slots, used)

    def _continue_log(self, folder: Folder, lock: threading.RLock) -> None:
        """Take in the end of the folder's log, and go on with it. `log_is_whole`: as far as can be seen."""
        readable = True
        try:
            behind = True
            while behind:
                folder.poll(self._index, POLL_SECONDS, final=True)
                behind = folder.behind
                time.sleep(YIELD_SECONDS)
        except OSError as error:
            logger.warning("%s: its residency log cannot be read: %s; begun anew", self.path, error)
            readable = False
        folder.ours = True
        self.log = OwnLog(self.path, readable)
        self.log_is_whole = readable and not folder.damaged
        with lock:
            unnamed = not self.log.records and self._index.extents(self.number)
        if not readable or unnamed:
            self.log.lacks(readers_too=False)
        elif folder.damaged:
            self.log.lacks(readers_too=True)

    def _load_extents(self, lost: set[int], lock: threading.RLock) -> None:
        """lost: extents that are gone, though the log may still name their pages."""
        self._next_number = 1 + max((*extent_numbers(self.path), *retired_numbers(self.path)), default=-1)
        for number in extent_numbers(self.path):
            path = extent_path(self.path, number)
            try:
                extent = self._files.open(self.path, number, write=True)
            except UnknownVersion:
                raise
            except FormatError as error:
                logger.warning("%s: %s; deleted, its pages are lost", path, error)
                self._files.retire(self.path, number)
                continue
            except OSError as error:
                # One bad sector or permission must not cost the folder. The number stays taken, the file is left alone.
                logger.warning("%s: %s; its pages count as misses", path, error)
                continue
            self._enter(extent)
        with lock:
            known = self._index.extents(self.number)
        for number in sorted(lost.union(known)):
            extent_there = self.extents.get(number)
            if extent_there is None:
                self.log.append([Record(Kind.EXTENT_GONE, number, time_ns=time.time_ns())])
            header = None if extent_there is None else extent_there.header
            with lock:
                before = len(self._index)
                self._index.trim(
                    self.number, number, bytes(16) if header is None else header.namespace,
                    0 if header is None else header.slots,
                )  # fmt: skip
                if header is not None and len(self._index) < before:
                    self.log.lacks(readers_too=False)

    def _enter(self, extent: Extent) -> None:
        header = extent.header
        self.extents[extent.number] = extent
        self.by_namespace.setdefault(header.namespace, {})[extent.number] = extent
        self.disk_bytes += header.extent_bytes
        self._bytes[header.namespace] += header.extent_bytes
        self._slots[header.namespace] += header.slots

    def _leave(self, number: int) -> Extent:
        extent = self.extents.pop(number)
        header, namespace = extent.header, extent.header.namespace
        del self.by_namespace[namespace][number]
        self.disk_bytes -= header.extent_bytes
        self._bytes[namespace] -= header.extent_bytes
        self._slots[namespace] -= header.slots
        if not self.by_namespace[namespace]:
            del self.by_namespace[namespace], self._bytes[namespace], self._slots[namespace]
        return extent

    def _free(self, namespace: bytes) -> FreeSlots:
        found = self.free.get(namespace)
        if found is None:
            found = self.free[namespace] = FreeSlots()
        return found

    def _tell_capacity(self, namespace: bytes) -> None:
        """Orders weigh uses against how many pages the namespace has room for."""
        self._index.set_capacity(namespace, sum(writer._slots[namespace] for writer in self.peers.values()))

    def next_generations(self, count: int) -> list[int]:
        """Larger than any before in this folder, whatever the clock does."""
        first = max(self._generation + 1, time.time_ns())
        self._generation = first + count - 1
        return list(range(first, first + count))

    # -- room ----------------------------------------------------------------------------------------------------

    def take(self, namespace: bytes, count: int, unread: bool) -> list[Place]:
        """Up to `count` free slots, pinned. unread: FreeSlots.take."""
        free = self.free.get(namespace)
        if free is None or not count:
            return []
        taken = free.take(count, unread)
        for number, pins in Counter([number for number, _ in taken]).items():
            self.extents[number].pins += pins
        return [(self.extents[number], slot) for number, slot in taken]

    def free_count(self, namespace: bytes, unread: bool) -> int:
        """Slots that `take` could give."""
        free = self.free.get(namespace)
        return 0 if free is None else len(free) + unread * free.unread

    def plan(self, namespace: Namespace, shape: SlotShape, share: int, most: int = _MAX_EXTENT) -> ExtentHeader | None:
        """The next extent for this namespace, of at most `most` bytes and within `share` bytes of disk; None: no room.

        Its bytes count as held from now on, so `made` or `unmade` must follow. A namespace's extents start small and
        double what it holds. A full disk is not asked again for a while.
        """
        if time.monotonic() < self.disk_full_until:
            return None
        held = self._bytes[namespace.digest]
        target = min(_MAX_EXTENT, max(MIN_EXTENT, share // _EXTENTS_PER_SHARE), max(MIN_EXTENT, held), most)
        room = share - self.disk_bytes
        slots = max(1, (min(target, room) - BLOCK) // shape.slot_bytes)
        size = BLOCK + slots * shape.slot_bytes
        if size > room:
            return None
        self.disk_bytes += size
        return self._header(namespace, shape, size)

    def made(self, extent: Extent) -> None:
        """A planned extent is there: its slots are free."""
        self.disk_bytes -= extent.header.extent_bytes
        self._add(extent)

    def unmade(self, header: ExtentHeader, error: OSError) -> None:
        """A planned extent could not be made."""
        self.disk_bytes -= header.extent_bytes
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.disk_full_until = time.monotonic() + _DISK_FULL_SECONDS

    def create(self, header: ExtentHeader) -> Extent:
        """Make a planned extent. Needs no lock, and may take long. OSError as ExtentFiles.create."""
        return self._files.create(self.path, header)

    def reclaim(self, namespace: bytes, taker: Namespace | None = None, shape: SlotShape | None = None) -> bool:
        """Give up the extent of `namespace` that was used the longest ago. What hangs below its pages: `sweep`.

        taker, shape: the namespace that gets the extent, in O(1), and its slots; whether it did. Where none of the
        extents holds such a slot one is deleted, which makes room later. OSError when the device refuses.
        """
        idle = [number for number, extent in self.by_namespace.get(namespace, {}).items() if not extent.pins]
        if not idle or self.is_pinned(namespace):
            return False
        fit = [n for n in idle if shape is None or self.extents[n].header.extent_bytes >= BLOCK + shape.slot_bytes]
        if not fit and self.leaving:
            return False  # room is on its way
        number = min(fit or idle, key=lambda extent: self._index.last_used(self.number, extent))
        if not fit or taker is None or shape is None:
            self.drop_extent(number, "reclaimed")
            return bool(fit)
        self.turn(self._empty(number, "reclaimed"), taker, shape)
        return True

    def turn(self, old: Extent, namespace: Namespace, shape: SlotShape) -> None:
        """Take over an empty extent that nobody uses, of this folder or another that nobody writes, in place."""
        header = self._header(namespace, shape, old.header.extent_bytes)
        try:
            self._add(self._files.reuse(self.path, old, header))
        except OSError:
            old.doom()
            if old.path.parent == self.path:
                self._go(old)
            raise

    def _header(self, namespace: Namespace, shape: SlotShape, size: int) -> ExtentHeader:
        number, self._next_number = self._next_number, self._next_number + 1
        return ExtentHeader(
            self.next_generations(1)[0], shape.slot_bytes, size, (size - BLOCK) // shape.slot_bytes, number,
            namespace.digest, time.time_ns(), namespace.description,
        )  # fmt: skip

    def _add(self, extent: Extent) -> None:
        self._enter(extent)
        slots = range(extent.header.slots)[::-1]
        self._free(extent.header.namespace).add((extent.number, slot) for slot in slots)
        self._tell_capacity(extent.header.namespace)

    def is_pinned(self, namespace: bytes) -> bool:
        """Whether what the namespace has here stays."""
        for extent in self.by_namespace.get(namespace, {}).values():
            return self._rules.of(namespace, extent.header.description).pin
        return False

    def loose(self) -> list[bytes]:
        """Namespaces with extents that may go."""
        if not self._rules.any_pin:
            return list(self.by_namespace)
        return [namespace for namespace in self.by_namespace if not self.is_pinned(namespace)]

    def larger(self, namespace: bytes) -> list[bytes]:
        """Namespaces with extents that may go which have more than this one, even with one extent less."""
        mine = self._bytes[namespace]
        others = {other: len(self.by_namespace[other]) for other in self.loose() if other != namespace}
        return [other for other, had in others.items() if self._bytes[other] * (had - 2) >= mine * had]

    def is_short(self, namespace: bytes) -> bool:
        """Whether a namespace's free slots may not last until more are made."""
        return self.free_count(namespace, False) < min(_AHEAD, max(1, self._slots[namespace] // 4))

    def sweep(self, limit: int) -> bool:
        """Forget pages that nobody can come by, since what is above them was reclaimed; whether there may be more."""
        self.forget(self._index.sweep_orphans(limit), "reclaimed")
        return self._index.orphans() > 0

    @property
    def pinned_bytes(self) -> int:
        if not self._rules.any_pin:
            return 0
        pinned = [extents for namespace, extents in self.by_namespace.items() if self.is_pinned(namespace)]
        return sum(extent.header.extent_bytes for extents in pinned for extent in extents.values())

    def shrink(self, share: int) -> bool:
        """Give up an extent if the folder takes more than `share` bytes; whether one was."""
        if self.disk_bytes - sum(extent.header.extent_bytes for extent in self.leaving.values()) <= share:
            return False
        coldest = self._index.coldest(self.loose())
        return coldest is not None and self.reclaim(coldest)

    def delete(self, extent: Extent) -> None:
        """Free the space of an extent that is leaving. Needs no lock, and may take long. OSError."""
        self._files.delete(self.path, extent.number)

    def deleted(self, extent: Extent) -> None:
        del self.leaving[extent.number]
        self.disk_bytes -= extent.header.extent_bytes

    # -- pages ---------------------------------------------------------------------------------------------------

    def publish(
        self, namespace: bytes, keys: bytes, parents: bytes | None, extents: list[Extent], slots: list[int],
        generations: list[int], time_ns: int,
    ) -> None:  # fmt: skip
        """These slots hold these pages now: index and log."""
        numbers = [extent.number for extent in extents]
        replaced, records = self._index.publish(
            namespace, keys, parents, self.number, numbers, slots, generations, time_ns
        )
        self.recent.count(stored=len(extents) * extents[0].header.slot_bytes)
        for old in replaced:
            if old.own and (peer := self.peers.get(old.folder)) is not None:
                peer._give_slots([old])
        self.log.append(records)

    def forget(self, pages: list[Page], reason: str) -> None:
        """Remove own pages from index and log, and free their slots. reason: one of _FOR_ROOM, or another."""
        self.forgotten(*self._index.forget(pages, reason in _FOR_ROOM, time.time_ns()), reason)

    def forgotten(self, pages: list[Page], records: bytes, reason: str) -> None:
        """The index removed these own pages and wrote these records of it."""
        if any(page.folder != self.number for page in pages):
            for folder in {page.folder for page in pages}:
                at = [i for i, page in enumerate(pages) if page.folder == folder]
                theirs = b"".join(records[i * RECORD_BYTES : (i + 1) * RECORD_BYTES] for i in at)
                if (peer := self.peers.get(folder)) is not None:
                    peer.forgotten([pages[i] for i in at], theirs, reason)
            return
        self.log.append(records)
        self._give_slots(pages)
        if pages:
            self._removed(pages, reason)

    def give_back(self, extent: Extent, slot: int) -> None:
        """An allocated slot that was not used after all."""
        if not extent.doomed:
            self._free(extent.header.namespace).add([(extent.number, slot)])

    def drop_extent(self, number: int, reason: str) -> None:
        """Give up an extent and everything in it. Its space is freed later (`leaving`)."""
        extent = self._empty(number, reason)
        extent.doom()
        self._go(extent)

    def _empty(self, number: int, reason: str) -> Extent:
        """Forget an extent and everything in it."""
        extent = self._leave(number)
        gone, _ = self._index.forget(self._index.in_extent(self.number, number), reason in _FOR_ROOM, time.time_ns())
        if gone:
            self._removed(gone, reason)
        self._free(extent.header.namespace).drop(number)
        self._tell_capacity(extent.header.namespace)
        self.log.append([Record(Kind.EXTENT_GONE, number, time_ns=time.time_ns())])
        return extent

    def _go(self, extent: Extent) -> None:
        with contextlib.suppress(OSError):  # it is deleted all the same
            self._files.retire(self.path, extent.number)
        self.leaving[extent.number] = extent
        self.disk_bytes += extent.header.extent_bytes

    def drop_deleted(self) -> None:
        """Forget extents whose files somebody deleted: what is written there would not outlive this process."""
        for number in [n for n, extent in self.extents.items() if not os.fstat(extent.fd).st_nlink]:
            self.drop_extent(number, "lost")

    def drop_namespace(self, digest: bytes) -> None:
        for number in list(self.by_namespace.get(digest, {})):
            self.drop_extent(number, "cleared")

    def _give_slots(self, pages: list[Page]) -> None:
        # A slot that a read still uses stays out of the free list until the read ends (reads.py gives it back).
        extents = self.extents
        for namespace in {page.namespace for page in pages}:
            self._free(namespace).add(
                (page.extent, page.slot)
                for page in pages
                if not page.pins and page.namespace == namespace and page.extent in extents
            )

    # -- recovery ------------------------------------------------------------------------------------------------

    @property
    def newest_generation(self) -> int:
        """No slot of this folder was given away with a larger one yet."""
        return self._generation

    def free_slots(self, number: int, slots: range) -> list[int]:
        """Those of an extent's slots that hold no page, as far as is known."""
        extent = self.extents.get(number)
        if extent is None:
            return []
        free = self._free(extent.header.namespace)
        return [slot for slot in slots if (number, slot) in free]

    def looked_at(self, extent: Extent, slots: Sequence[int]) -> None:
        """Those of these slots that are free hold nothing that may come back: they are taken before the others."""
        free = self._free(extent.header.namespace)
        for slot in reversed(slots):
            free.looked_at((extent.number, slot))

    def recover(self, extent: Extent, found: list[Found], newest: int) -> int:
        """Take in pages that a header scan found in slots of an extent; how many of them.

        Not those whose slot or key is in use by now. A page that the log names there instead is none: its slot says so,
        unless it was stored after the header was read. newest: `newest_generation` before that.
        """
        taken: list[Page] = []
        header = extent.header
        free = self._free(header.namespace)
        for page in found:
            if extent.doomed or page.namespace != header.namespace or page.generation <= header.generation:
                continue
            named = self._index.at(self.number, extent.number, page.slot)
            if named is not None and (named.key, named.generation) == (page.key, page.generation):
                continue
            # The log may know the key by another slot, from before it was stored here.
            older = self._index.get(page.namespace, page.key)
            if older is not None and (not older.own or older.generation >= page.generation):
                continue
            wrong = [p for p in (named, older) if p is not None]
            if any(p.pins or p.generation > newest for p in wrong):
                continue
            self.forget(wrong, "stale")
            if (extent.number, page.slot) not in free:
                continue
            free.discard((extent.number, page.slot))
            there = (extent.number, page.slot, page.generation)
            taken.append(Page(page.namespace, page.key, page.parent, self.number, *there, True, page.time_ns))
            self._index.insert(taken[-1], oldest=True)  # nobody asked for it since
            self._generation = max(self._generation, page.generation)
        records = encode_stored(taken)
        self.log.append(records)
        if self._index.heard is not None:
            self._index.heard(self.number, records)
        return len(taken)

    def close(self, quiet: bool) -> None:
        """quiet: no I/O of ours is in flight. If some is, the lock and the files stay open until the process ends, and
        what still comes to its end is logged.
        """
        if quiet:
            self.log.close()
            for extent in self.extents.values():
                extent.doom()
            os.close(self._lock_fd)

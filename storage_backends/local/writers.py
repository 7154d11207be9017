"""Our writer on each disk, as one: where pages would rather lie, and where there is room for them.

Belongs here: the spread of pages over disks. Does not belong here: what goes to make room (room.py), or one folder
(writer.py).

A page's key says which disk it prefers, in proportion to the disks' capacities. That is a preference and no more: the
index knows where each page lies, so any other disk with a free slot does, and disks may be added, removed or put in
another order. What must go for a page is the tier's coldest, on whichever disk it lies, so chains lose their ends
first as they do on one disk, and the page takes the slot that came free.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hicache_ext.page import KEY_BYTES, Namespace
from storage_backends.format import ExtentHeader, SlotShape
from storage_backends.local.claim import Claim, adopt
from storage_backends.local.disk import Disk
from storage_backends.local.disks import Disks
from storage_backends.local.extents import Extent
from storage_backends.local.index import Page
from storage_backends.local.index_choice import AnyIndex
from storage_backends.local.writer import Writer

#: A write waits so long for a disk on which it is to become a writer.
CLAIM_SECONDS = 5.0


class Spot(NamedTuple):
    """A free slot, pinned for one page."""

    disk: Disk
    extent: Extent
    slot: int
    generation: int


class Planned(NamedTuple):
    """An extent that is to be made; its bytes count as held."""

    disk: Disk
    writer: Writer
    header: ExtentHeader


class Writers:
    """Not thread-safe, but for `claim` and `make`: the tier's lock is around it. claiming: held while folders become
    ours."""

    def __init__(
        self, index: AnyIndex, disks: Disks, peers: dict[int, Writer], removed: Callable[[list[Page], str], None]
    ) -> None:
        self._index, self._disks, self._peers, self._removed = index, disks, peers, removed
        self.claiming = threading.Lock()
        self._problem = OSError(errno.EIO, "no folder could be had")

    # -- room ----------------------------------------------------------------------------------------------------

    def claim(self, namespace: bytes, lock: threading.RLock) -> None:
        """Become a writer on every disk in use, before a write. Call without the lock.

        Waits CLAIM_SECONDS at most for disks that do not answer; later writes take them in when they have.
        """
        if not self._unclaimed() or not self.claiming.acquire(timeout=CLAIM_SECONDS):
            return
        try:
            with lock:
                claims = [(disk, disk.supply.claim(namespace, self._removed)) for disk in self._unclaimed()]
            for _, claim in claims:
                claim.done.wait(max(0.0, claim.began + CLAIM_SECONDS - time.monotonic()))
            self._take_in([(disk, claim) for disk, claim in claims if claim.done.is_set()], lock)
        finally:
            self.claiming.release()

    def _take_in(self, claims: list[tuple[Disk, Claim]], lock: threading.RLock) -> None:
        arrived: list[tuple[Disk, Claim, Writer]] = []
        with lock:
            for disk, claim in claims:
                if claim.writer is not None:
                    arrived.append((disk, claim, claim.writer))
                elif claim.error is not None:
                    disk.supply.claiming, self._problem = None, claim.error
                    disk.failed(claim.error.errno or errno.EIO)
        # Together, so that pages of one disk do not all go before those of the next.
        adopt(self._index, lock, [writer.number for _, _, writer in arrived])
        for disk, claim, writer in arrived:
            writer.join(lock)
            with lock:
                disk.supply.claiming = None
                if disk.out:
                    del self._peers[writer.number]
                    writer.close(quiet=True)
                    continue
                disk.directory.settle(writer, claim.seen)
                disk.upkeep.claimed(writer)

    def ready(self) -> bool:
        """Whether there is a writer; False while one is on its way, or the tier is being closed. OSError when there is
        none."""
        if self._members():
            return True
        if any(disk.supply.claiming is not None or disk.stopping.is_set() for disk in self._disks.in_use):
            return False
        if self._unclaimed():
            raise self._problem
        raise OSError(errno.ENOENT, "no disk is in use, or the tier's directory is gone")

    def _unclaimed(self) -> list[Disk]:
        return [d for d in self._disks.in_use if d.directory.writer is None and not d.gone and not d.out]

    def take(self, namespace: bytes, keys: bytes, unread: bool = False) -> list[Spot]:
        """Slots for the first of these keys, as many as are free. unread: FreeSlots.take."""
        members = self._members()
        count = len(keys) // KEY_BYTES
        if len(members) == 1:
            ((disk, writer),) = members
            places = writer.take(namespace, count, unread)
            generations = writer.next_generations(len(places))
            return [Spot(disk, *place, number) for place, number in zip(places, generations, strict=True)]
        free = [writer.free_count(namespace, unread) for _, writer in members]
        chosen = []
        for choice in self._preferred(members, keys)[: sum(free)]:
            at = choice if free[choice] else max(range(len(free)), key=free.__getitem__)
            free[at] -= 1
            chosen.append(at)
        sources = []
        for at, (disk, writer) in enumerate(members):
            places = writer.take(namespace, chosen.count(at), unread)
            generations = writer.next_generations(len(places))
            sources.append(iter([Spot(disk, *p, number) for p, number in zip(places, generations, strict=True)]))
        return [next(sources[at]) for at in chosen]

    def plan(self, namespace: Namespace, shape: SlotShape, keys: bytes, failed: set[Disk]) -> list[Planned]:
        """Extents without which there are no free slots where these keys want them, or else anywhere: one on a disk at
        the most, so call again when they are made. `make` must follow. failed: disks that are not asked."""
        members = self._members()
        wanted = Counter(self._preferred(members, keys))
        free = [writer.free_count(namespace.digest, False) for _, writer in members]
        able = [at for at, (disk, _) in enumerate(members) if disk not in failed]
        planned: list[Planned] = []

        def add(at: int) -> None:
            disk, writer = members[at]
            try:
                header = disk.directory.plan_for_now(namespace, shape)
            except OSError as error:
                failed.add(disk)
                disk.failed(error.errno or errno.EIO)
                return
            if header is not None:
                disk.making += 1
                planned.append(Planned(disk, writer, header))

        for at in able:
            if free[at] < wanted[at]:
                add(at)
        for at in able:
            if planned or sum(free) >= wanted.total():
                break
            add(at)
        return planned

    def make(self, planned: list[Planned], failed: set[Disk], lock: threading.RLock) -> OSError | None:
        """Make these extents; what the first that could not be made died of, unless the disk is full. Call without the
        lock: it may take long. failed: gets the disks on which one could not be made."""
        problem: OSError | None = None
        for disk, writer, header in planned:
            try:
                extent = writer.create(header)
            except OSError as error:
                failed.add(disk)
                with lock:
                    disk.making -= 1
                    writer.unmade(header, error)
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        problem = problem or error
                        disk.failed(error.errno or errno.EIO)
                continue
            with lock:
                disk.making -= 1
                if disk.stopping.is_set() or disk.directory.writer is not writer:
                    extent.doom()  # an empty extent, for whoever comes next
                else:
                    writer.made(extent)
        return problem

    def loose(self) -> set[bytes]:
        """Namespaces with extents that may go."""
        return {namespace for _, writer in self._members() for namespace in writer.loose()}

    def short_of_a_tenth(self) -> list[tuple[bytes, int]]:
        """Namespaces whose pages will have to go before a tenth of what they hold could be written, and how many pages
        that takes; the one that was touched last first."""
        members = self._members()
        open_room = sum(max(0, disk.directory.share - writer.disk_bytes) for disk, writer in members)
        found = []
        for namespace in sorted(self.loose(), key=self._index.touched, reverse=True):
            extents = [e.header for _, w in members for e in w.by_namespace.get(namespace, {}).values()]
            free = sum(writer.free_count(namespace, True) for _, writer in members)
            lacking = sum(header.slots for header in extents) // 10 + 1 - free - open_room // extents[0].slot_bytes
            if lacking > 0:
                found.append((namespace, lacking))
        return found

    def descriptions(self) -> list[tuple[bytes, bytes]]:
        """Of the namespaces that have extents here, what they are."""
        return [
            (namespace, next(iter(extents.values())).header.description)
            for writer in self._peers.values()
            for namespace, extents in writer.by_namespace.items()
        ]

    def larger(self, namespace: bytes) -> set[bytes]:
        """Namespaces with extents that may go, and on some disk more of them than this one."""
        return {other for _, writer in self._members() for other in writer.larger(namespace)}

    def reclaim(self, namespace: bytes, taker: Namespace, shape: SlotShape) -> bool:
        """As Writer.reclaim, on the disk where the namespace has most extents, or the next."""
        writers = [writer for _, writer in self._members() if namespace in writer.by_namespace]
        writers.sort(key=lambda writer: -len(writer.by_namespace[namespace]))
        return any(writer.reclaim(namespace, taker, shape) for writer in writers)

    def take_abandoned(self, namespace: Namespace, shape: SlotShape) -> bool:
        """As Directory.take_abandoned, on any disk."""
        return any(disk.directory.take_abandoned(namespace, shape) for disk, _ in self._members())

    def look_ahead(self, namespace: Namespace, shape: SlotShape, short: bool) -> None:
        """A batch of this namespace came; short: something had to go for it, or it was refused."""
        for disk, writer in self._members():
            if short:
                disk.directory.wanted_at = time.monotonic()
            if writer.is_short(namespace.digest):
                disk.directory.want(namespace, shape)

    # -- pages ---------------------------------------------------------------------------------------------------

    def forget(self, pages: list[Page], reason: str) -> None:
        """As Writer.forget, of whichever of our writers."""
        for writer in list(self._peers.values())[:1]:
            writer.forget(pages, reason)

    def forgotten(self, pages: list[Page], records: bytes, reason: str) -> None:
        """As Writer.forgotten, of whichever of our writers."""
        for writer in list(self._peers.values())[:1]:
            writer.forgotten(pages, records, reason)

    def flush(self) -> None:
        """What was said of pages until now is in the logs. Call without the lock."""
        for writer in list(self._peers.values()):
            writer.log.flush()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _members(self) -> list[tuple[Disk, Writer]]:
        return [
            (disk, disk.directory.writer)
            for disk in self._disks.in_use
            if disk.directory.writer is not None and not disk.gone and not disk.out and not disk.stopping.is_set()
        ]

    @staticmethod
    def _preferred(members: list[tuple[Disk, Writer]], keys: bytes) -> list[int]:
        """Of each key: the number of its disk among the members."""
        if len(members) < 2:
            return [0] * (len(keys) // KEY_BYTES)
        parts = np.cumsum([disk.capacity for disk, _ in members], dtype=np.float64)
        draws = np.frombuffer(keys, ">u8")[:: KEY_BYTES // 8].astype(np.float64) / 2.0**64
        found: list[int] = np.minimum(np.searchsorted(parts / parts[-1], draws, "right"), len(members) - 1).tolist()
        return found

"""Pages that are in the index and that nobody has reported: of earlier runs, of other writers, and found by a scan.

Belongs here: telling the listener of them, a slice at a time, with what their headers keep for KV events. Does not
belong here: pages that this process stores or evicts, which are reported where that happens.

What is there when listening begins, or when a disk comes back, is swept extent by extent; what log records and scans
bring later is queued as it comes. All is reported under the tier's lock, in the order in which it becomes so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from hicache_ext.page import split_keys
from storage_backends.base import Notes, Residency
from storage_backends.buffers import OwnedMemory
from storage_backends.format import FormatError, SlotHeader
from storage_backends.local.extents import Extent
from storage_backends.local.headers import MOST_HEADER, read_header
from storage_backends.local.index import Page
from storage_backends.local.residency import RECORD_BYTES, Kind
from storage_backends.local.tier import Tier

#: Pages of one slice: their headers are 512 KiB.
_SLICE = 128
#: Pages that wait; beyond it everything is swept again.
_WAITING = 1 << 16

_RECORD = np.dtype(
    {
        "names": ["kind", "namespace", "key"],
        "formats": ["u1", "V16", "V32"],
        "offsets": [4, 32, 48],
        "itemsize": RECORD_BYTES,
    }
)


class News:
    """Takes the tier's lock, but in `heard`, which is called under it."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._waiting: deque[tuple[bytes, bytes]] = deque()
        self._places: list[tuple[int, int]] = []
        self._slots: list[int] = []
        self._namespace = b""
        self._returns = -1  # nothing was swept yet
        self._overflow = False
        self._room = OwnedMemory(MOST_HEADER)

    def heard(self, folder: int, records: bytes) -> None:
        """The index took in these log records: what they stored waits to be told, what they removed is reported."""
        found = np.frombuffer(records, _RECORD)
        gone: dict[bytes, list[bytes]] = {}
        for kind, namespace, key in found[found["kind"] != Kind.EXTENT_GONE].tolist():
            if kind == Kind.STORED:
                if len(self._waiting) >= _WAITING:
                    self._overflow = True
                else:
                    self._waiting.append((namespace, key))
            elif not self._tier.index.has(namespace, key):
                gone.setdefault(namespace, []).append(key)
        for namespace, keys in gone.items():
            self._tier.report(Residency.REMOVED, namespace, b"".join(keys))

    def recheck(self, namespace: bytes, keys: bytes) -> None:
        """Report those of these pages that are not there."""
        with self._tier.lock:
            gone = [key for key in split_keys(keys) if not self._tier.index.has(namespace, key)]
            self._tier.report(Residency.REMOVED, namespace, b"".join(gone))

    def tell(self, namespace: bytes) -> bool:
        """Report a slice of this namespace's pages that nobody has reported; whether there may be more."""
        with self._tier.lock:
            pages = self._next(namespace)
            unopened = self._tier.unopened((page.folder, page.extent) for page in pages)
        self._tier.open(unopened)
        with self._tier.lock:
            held = self._hold(pages)
        try:
            headers = [
                None if extent is None else _look(extent, page, self._room)
                for page, extent in zip(pages, held, strict=True)
            ]
        finally:
            with self._tier.lock:
                for extent in held:
                    if extent is not None:
                        extent.unpin()
        with self._tier.lock:
            self._report(namespace, pages, headers)
            return bool(pages or self._slots or self._places or self._waiting)

    # -- under the lock ------------------------------------------------------------------------------------------

    def _next(self, namespace: bytes) -> list[Page]:
        tier = self._tier
        if self._returns != tier.disks.returns or self._namespace != namespace or self._overflow:
            self._returns, self._namespace, self._overflow = tier.disks.returns, namespace, False
            self._waiting.clear()
            self._places = [(folder, extent) for folder in self._folders() for extent in tier.index.extents(folder)]
            self._slots = []
        pages: list[Page] = []
        while self._waiting and len(pages) < _SLICE:
            page = tier.index.get(*self._waiting.popleft())
            if page is not None and page.namespace == namespace and tier.index.has(namespace, page.key):
                pages.append(page)
        while len(pages) < _SLICE and self._places:
            if not self._slots:
                self._slots = tier.index.used_slots(*self._places[-1]).tolist()
            place = self._places[-1]
            while self._slots and len(pages) < _SLICE:
                page = tier.index.at(*place, self._slots.pop())
                if page is None or page.namespace != namespace:
                    if page is not None:
                        self._slots = []  # an extent serves one namespace
                    continue
                if tier.index.has(namespace, page.key):
                    pages.append(page)
            if not self._slots:
                self._places.pop()
        return pages

    def _folders(self) -> Iterable[int]:
        for disk in self._tier.disks.in_use:
            directory = disk.directory
            yield from directory.folders
            if directory.writer is not None:
                yield directory.writer.number

    def _hold(self, pages: list[Page]) -> list[Extent | None]:
        """Their extents, pinned."""
        held = [self._tier.extent(page.folder, page.extent) for page in pages]
        for extent in held:
            if extent is not None:
                extent.pins += 1
        return held

    def _report(self, namespace: bytes, pages: list[Page], headers: list[SlotHeader | None]) -> None:
        """Those that are still where they were, with what their headers say, in groups of which that is alike."""
        index = self._tier.index
        groups: dict[tuple[int, str, str], list[tuple[bytes, SlotHeader]]] = {}
        bare: list[bytes] = []
        for page, header in zip(pages, headers, strict=True):
            now = index.get(namespace, page.key)
            if now is None:
                continue
            if now[3:7] != page[3:7]:
                self._waiting.append((namespace, page.key))
            elif header is None or header.tokens is None or not header.event_hash:
                bare.append(page.key)
            else:
                groups.setdefault((len(header.tokens), header.salt, header.lora), []).append((page.key, header))
        for (_, salt, lora), told in groups.items():
            tokens = np.stack([header.tokens for _, header in told if header.tokens is not None])
            hashes = np.array([(header.event_hash, header.parent_event_hash) for _, header in told], np.int64)
            keys = b"".join(key for key, _ in told)
            self._tier.report(Residency.STORED, namespace, keys, Notes(tokens, hashes, salt, lora))
        self._tier.report(Residency.STORED, namespace, b"".join(bare))


def _look(extent: Extent, page: Page, room: OwnedMemory) -> SlotHeader | None:
    """The page's header; None where it cannot be read or is another's. The extent is pinned."""
    try:
        header = read_header(extent, page.slot, room.view)
    except (OSError, FormatError):
        return None
    if header is None or (header.namespace, header.key, header.generation) != (
        page.namespace, page.key, page.generation,
    ):  # fmt: skip
        return None
    return header

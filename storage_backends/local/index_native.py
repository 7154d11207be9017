"""The native index behind the interface of the Python one.

Belongs here: conversions. Does not belong here: anything that decides (csrc/index).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from hicache_ext._native import Adoption as _Adoption
from hicache_ext._native import Index as _Index
from hicache_ext.page import KEY_BYTES, split_keys
from storage_backends.local.index import ADOPTED, GATHERED, Page, Pinned, examined

_ABSENT = np.uint32(0xFFFFFFFF)


def _page(told: tuple | None) -> Page | None:
    return None if told is None else Page._make(told)


class NativeIndex:
    """Index in C++: at most 120 bytes a page. The methods are documented in storage_backends.local.index.Index."""

    name = "native"
    #: Hears of log records that were taken in: (folder, records); see news.py.
    heard: Callable[[int, bytes], None] | None = None

    def __init__(self, order: str = "lru") -> None:
        index = self._index = _Index(order)
        self._protected: tuple[bytes, frozenset[bytes]] = (b"", frozenset())
        # What needs no conversion is called without a detour.
        self.memory, self.has, self.touched, self.orphans = index.memory, index.has, index.touched, index.orphans
        self.fail, self.link, self.last_used = index.fail, index.link, index.last_used
        self.set_capacity = index.set_capacity
        self.extents, self.trim = index.extents, index.trim
        self.newest_generation, self.own_records, self.apply_log = (
            index.newest_generation, index.own_records, index.apply_log,
        )  # fmt: skip
        self.set_oldest, self.snapshot, self.snapshot_records = index.set_oldest, index.snapshot, index.snapshot_records

    def __len__(self) -> int:
        return len(self._index)

    def lookup(self, namespace: bytes, keys: bytes, parents: bytes | None, used: bool) -> np.ndarray:
        found = np.empty(len(keys) // KEY_BYTES, np.uint8)
        self._index.lookup(namespace, keys, parents, found, used)
        return found

    def pin(self, namespace: bytes, keys: bytes, parents: bytes | None, touch: bool = True) -> Pinned:
        columns = np.empty((4, len(keys) // KEY_BYTES), np.uint32)
        own = np.empty(columns.shape[1], np.uint8)
        self._index.pin(namespace, keys, parents, *columns, own, touch)
        pages = np.flatnonzero(columns[0] != _ABSENT)
        handles, folders, extents, slots = columns[:, pages].tolist()
        return Pinned(pages.tolist(), handles, folders, extents, slots, own[pages].astype(bool).tolist())

    def unpin(self, handles: list[int]) -> bytes:
        freed: bytes = self._index.unpin(handles)
        return freed

    def pinned(self, handle: int) -> Page:
        return Page._make(self._index.pinned(handle))

    def publish(
        self, namespace: bytes, keys: bytes, parents: bytes | None, folder: int, extents: list[int], slots: list[int],
        generations: list[int], time_ns: int,
    ) -> tuple[list[Page], bytes]:  # fmt: skip
        replaced, records = self._index.publish(namespace, keys, parents, folder, extents, slots, generations, time_ns)
        return [Page._make(page) for page in replaced], records

    def get(self, namespace: bytes, key: bytes) -> Page | None:
        return _page(self._index.get(namespace, key))

    def at(self, folder: int, extent: int, slot: int) -> Page | None:
        return _page(self._index.at(folder, extent, slot))

    def insert(self, page: Page, oldest: bool = False) -> Page | None:
        return _page(self._index.insert(page, oldest))

    def remove(self, page: Page, evicted: bool = False) -> bool:
        return self._index.remove(page, evicted)

    def forget(self, pages: Iterable[Page], evicted: bool, time_ns: int) -> tuple[list[Page], bytes]:
        gone, records = self._index.forget(list(pages), evicted, time_ns)
        return list(map(Page._make, gone)), records

    def touch(self, namespace: bytes, keys: Iterable[bytes], used: bool = True) -> None:
        self._index.touch(namespace, b"".join(keys), used)

    def victim(self, namespace: bytes, protected: frozenset[bytes] = frozenset()) -> Page | None:
        # A batch asks with the same set again and again: its pages are marked once.
        if protected is not self._protected[1] or namespace != self._protected[0]:
            self._index.protect(namespace, b"".join(protected))
            self._protected = (namespace, protected)
        return _page(self._index.victim(namespace))

    def evict(
        self, namespace: bytes, count: int, protected: frozenset[bytes], time_ns: int
    ) -> tuple[list[Page], bytes]:
        self._protected = (b"", frozenset())
        gone, records = self._index.evict(namespace, count, b"".join(protected), time_ns)
        return list(map(Page._make, gone)), records

    def going(self, namespace: bytes, count: int) -> bytes:
        self._protected = (b"", frozenset())
        return self._index.going(namespace, count, examined(count))

    def expired(self, namespace: bytes, limit: int, examine: int = 4096) -> list[Page]:
        return list(map(Page._make, self._index.expired(namespace, limit, examine)))

    def adoption(self, *folders: int) -> _Adoption:
        return _Adoption(list(folders))

    def gather(self, adoption: _Adoption, examine: int = GATHERED) -> bool:
        return self._index.gather(adoption, examine)

    def adopt(self, adoption: _Adoption, count: int = ADOPTED) -> bool:
        return self._index.adopt(adoption, count)

    def used_slots(self, folder: int, extent: int) -> np.ndarray:
        return np.frombuffer(self._index.used_slots(folder, extent), np.uint32)

    def coldest(self, candidates: Iterable[bytes]) -> bytes | None:
        return min(candidates, key=self.touched, default=None)

    def ancestors(self, namespace: bytes, key: bytes) -> list[bytes]:
        return split_keys(self._index.ancestors(namespace, key))

    def sweep_orphans(self, limit: int, examine: int = 4096) -> list[Page]:
        return list(map(Page._make, self._index.sweep_orphans(limit, examine)))

    def in_extent(self, folder: int, extent: int) -> list[Page]:
        return [Page._make(page) for page in self._index.in_extent(folder, extent)]

    def drop(self, folder: int, namespace: bytes | None = None) -> None:
        self._index.drop(folder, namespace)

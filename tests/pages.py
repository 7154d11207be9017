"""Pages for tests: a host pool in plain memory, namespaces, chains of keys, batches over them."""

from __future__ import annotations

import hashlib
import time
from typing import Protocol

import numpy as np

from hicache_ext.page import KEY_BYTES, Namespace, PageLayout, chain_parents
from storage_backends.base import Completion, KeyBatch, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory

PAGE_TOKENS = 16


def namespace(
    lengths: tuple[int, ...] = (8192, 8192), model: str = "model-a", page_size: int = PAGE_TOKENS, **fields: str
) -> Namespace:
    layout = PageLayout("mha", "page_first", "bfloat16", page_size, lengths)
    return Namespace(model=hashlib.sha256(model.encode()).hexdigest(), weights="w0", layout=layout, **fields)


def chain(name: str, pages: int) -> list[bytes]:
    """Keys of a prefix of `pages` pages; the same name gives the same keys."""
    return [hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(pages)]


def content(space: Namespace, key: bytes) -> np.ndarray:
    """The bytes that a page has in every test: drawn from its identity, so that any mix-up shows."""
    seed = int.from_bytes(hashlib.sha256(space.digest + key).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, space.layout.payload_bytes, np.uint8)


class HostPool:
    """`pages` pages of one namespace in one block of memory, each buffer aligned to 4 KiB (or off by `skew`)."""

    def __init__(self, space: Namespace, pages: int, skew: int = 0) -> None:
        self.space = space
        self.pages = pages
        self.lengths = space.layout.buffer_lengths
        steps = [-(-length // 4096) * 4096 + (4096 if skew else 0) for length in self.lengths]
        self._starts = np.cumsum([0, *steps])
        self.memory = OwnedMemory(int(self._starts[-1]) * pages + 4096)
        self.skew = skew
        self.bytes = np.frombuffer(self.memory.view, np.uint8)

    def _offset(self, page: int, buffer: int) -> int:
        return page * int(self._starts[-1]) + int(self._starts[buffer]) + self.skew

    def fill(self, page: int, key: bytes) -> None:
        """Put the page's own content there."""
        data, at = content(self.space, key), 0
        for j, length in enumerate(self.lengths):
            start = self._offset(page, j)
            self.bytes[start : start + length] = data[at : at + length]
            at += length

    def get(self, page: int) -> np.ndarray:
        """The page's payload, buffers joined."""
        return np.concatenate(
            [self.bytes[self._offset(page, j) : self._offset(page, j) + n] for j, n in enumerate(self.lengths)]
        )

    def poison(self) -> None:
        self.bytes[:] = 0xEE

    def batch(self, keys: list[bytes], pages: list[int] | None = None, parent: bytes | None = None) -> PageBatch:
        """These keys in these pool pages (the first ones by default), as a chain below `parent`."""
        places = list(range(len(keys))) if pages is None else pages
        addresses = [self.memory.address + self._offset(p, j) for p in places for j in range(len(self.lengths))]
        packed = b"".join(keys)
        return PageBatch(
            self.space,
            packed,
            chain_parents(packed, parent),
            np.array(addresses, np.uint64),
            np.array(self.lengths * len(keys), np.uint64),
            np.arange(len(keys) + 1, dtype=np.int64) * len(self.lengths),
            self.memory,
        )

    def write_batch(self, keys: list[bytes], parent: bytes | None = None) -> PageBatch:
        """A batch whose pool pages hold the keys' own content."""
        for page, key in enumerate(keys):
            self.fill(page, key)
        return self.batch(keys, parent=parent)

    def right(self, page: int, key: bytes) -> bool:
        return bool(np.array_equal(self.get(page), content(self.space, key)))


def key_batch(space: Namespace, keys: list[bytes], parent: bytes | None = None) -> KeyBatch:
    packed = b"".join(keys)
    assert len(packed) == KEY_BYTES * len(keys)
    return KeyBatch(space, packed, chain_parents(packed, parent))


class Reader(Protocol):
    """A backend, or a store over several."""

    def read(self, batch: PageBatch) -> Completion: ...


def served(
    reader: Reader, space: Namespace, keys: list[bytes], seconds: float = 30, pool: HostPool | None = None
) -> list[Outcome]:
    """Read the pages; every HIT is checked against the content that its identity asks for. pool: where they go."""
    pool = HostPool(space, len(keys)) if pool is None else pool
    pool.poison()
    outcomes = reader.read(pool.batch(keys)).result(seconds)
    for page, outcome in enumerate(outcomes):
        assert outcome != Outcome.HIT or pool.right(page, keys[page]), "a wrong page was served"
    return outcomes


def served_and_quiet(reader: Reader, space: Namespace, keys: list[bytes], seconds: float) -> list[Outcome]:
    """As served; and nothing moves afterwards."""
    pool = HostPool(space, len(keys))
    outcomes = served(reader, space, keys, seconds, pool)
    after = pool.bytes.copy()
    time.sleep(0.05)
    assert np.array_equal(pool.bytes, after), "a byte landed after its page's outcome"
    return outcomes

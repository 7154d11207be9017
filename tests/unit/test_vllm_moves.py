"""Saves out of blocks in host memory: pages of any requests are a batch, and the engine has its blocks at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from queue import Queue
from typing import Any

import numpy as np
import pytest

from hicache_ext.config import Config
from hicache_ext.page import KEY_BYTES, Namespace, PageLayout, chain_parents
from hicache_ext.store import TieredStore
from hicache_ext.vllm.blocks import blocks_of
from hicache_ext.vllm.moves import HostMoves
from hicache_ext.vllm.pages import Pages
from storage_backends.base import Notes, Outcome, PageBatch

torch = pytest.importorskip("torch")

BLOCKS, BYTES = 8, 4096
SPACE = Namespace("m", "w", PageLayout("mha", "x", "float32", 16, (BYTES,)))


@pytest.fixture
def store() -> Iterator[TieredStore]:
    opened = TieredStore.open(Config.load({"tiers": [{"type": "memory", "capacity": "16MiB"}]}))
    yield opened
    opened.close()


def _key(number: int) -> bytes:
    return bytes([number]) * KEY_BYTES


def _pages(request: str, keys: list[int], blocks: list[int], notes: Notes | None = None) -> Pages:
    return Pages(request, b"".join(map(_key, keys)), b"", tuple(blocks), notes=notes)


def _notes(first: int, count: int) -> Notes:
    return Notes(
        np.arange(first * 16, (first + count) * 16, dtype=np.uint32).reshape(count, 16),
        np.arange(2 * count, dtype=np.int64).reshape(count, 2) + 1,
    )


def _read(store: TieredStore, keys: list[int]) -> list[int | None]:
    """What each page consists of, a byte that is everywhere in it."""
    memory = np.zeros((len(keys), BYTES), np.uint8)
    packed = b"".join(map(_key, keys))
    batch = PageBatch(
        SPACE, packed, chain_parents(packed, None),
        memory.ctypes.data + np.arange(len(keys), dtype=np.uint64) * np.uint64(BYTES),
        np.full(len(keys), BYTES, np.uint64), np.arange(len(keys) + 1, dtype=np.int64), memory,
    )  # fmt: skip
    outcomes = store.read(batch).result(10)
    assert all((row == row[0]).all() for row in memory)
    return [int(row[0]) if outcome == Outcome.HIT else None for row, outcome in zip(memory, outcomes, strict=True)]


@pytest.mark.parametrize(
    ("pages", "batches"),
    [
        ([_pages("a", [1, 2], [3, 4]), _pages("b", [9], [0])], [3]),
        ([_pages("a", [1, 2], [3, 4], _notes(1, 2)), _pages("b", [9], [0], _notes(9, 1))], [3]),
        ([_pages("a", [1, 2], [3, 4], _notes(1, 2)), _pages("b", [9], [0])], [2, 1]),
        ([_pages("a", [1, 2], [3, 4]), _pages("b", [1, 9], [3, 0])], [2, 2]),
    ],
    ids=["two requests", "with notes", "with notes and without", "a page of both"],
)
def test_pages_of_several_requests_are_a_batch(store: TieredStore, pages: list[Pages], batches: list[int]) -> None:
    tensor = torch.zeros((BLOCKS, BYTES), dtype=torch.uint8)
    for block in range(BLOCKS):
        tensor[block] = 100 + block
    counts: Counter[str] = Counter()
    told: Queue[tuple[int, bytes, int]] = Queue()
    written: list[PageBatch] = []
    real = store.write

    def write(batch: PageBatch) -> Any:
        written.append(batch)
        return real(batch)

    store.write = write  # type: ignore[method-assign]
    moves = HostMoves(
        store, [blocks_of({"layer": tensor}, ["layer"], BLOCKS)], 8 << 20, lambda name, n: counts.update({name: n})
    )
    sent = moves.save(pages, [SPACE], lambda *what: told.put(what))
    tensor[:] = 7  # the engine's again
    assert sent == sum(batches)
    assert [len(batch) for batch in written] == batches
    outcomes = b"".join(told.get(timeout=30)[1] for _ in batches)
    assert outcomes == bytes([Outcome.HIT]) * sent
    assert _read(store, [1, 2, 9]) == [103, 104, 100]
    for batch in written:
        if batch.notes is not None:
            firsts = [int(row[0]) // 16 for row in batch.notes.tokens]
            assert firsts == [batch.key(page)[0] for page in range(len(batch))]
    moves.close()
    assert not counts["save_no_room"]
    assert not counts["save_failed"]

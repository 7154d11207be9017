"""Measuring the index of the local tier: lookups, memory, warm open from a residency log, the scan without one.

Belongs here: what `bench index` measures. Does not belong here: tables and files (hicache_ext.cli.bench_index).
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.page import KEY_BYTES, NO_PARENT, Namespace, PageLayout, chain_parents, pack_keys
from storage_backends.base import Dispatcher, PageBatch
from storage_backends.buffers import OwnedMemory
from storage_backends.local.backend import LocalBackend
from storage_backends.local.index_choice import AnyIndex, open_index
from storage_backends.local.policy import DEFAULT
from storage_backends.local.residency import NAME, LogWriter

PAGES, QUICK_PAGES = 1_000_000, 100_000
SCAN_PAGES, QUICK_SCAN_PAGES = 20_000, 2_000
BATCH = 128
#: Pages of a chain: a conversation of 16,000 tokens with pages of 64.
CHAIN = 256
_EXTENT_SLOTS = 4096
_PAYLOAD = 4096


def run(work: Path, pages: int, scan_pages: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of what, value, unit, goal. work: an empty directory on the disk to measure."""
    rows = []
    keys = np.random.default_rng(1).bytes(pages * KEY_BYTES)
    space = _namespace()

    say(f"filling an index with {pages:,} pages")
    index = open_index(DEFAULT)
    index.set_capacity(space.digest, pages)
    since = time.perf_counter()
    records = b"".join(_fill(index, space.digest, keys))
    rows.append(_row("publish", pages / (time.perf_counter() - since), "pages/s", None, index))
    rows.append(_row("memory, chains", index.memory() / len(index), "bytes/page", 120, index))
    rows += _snapshot(index)

    say("filling another, of pages whose parents are not known")
    alone = open_index(DEFAULT)
    alone.set_capacity(space.digest, pages)
    for _ in _fill(alone, space.digest, keys, chained=False):
        pass
    rows.append(_row("memory, no known parents", alone.memory() / len(alone), "bytes/page", 120, alone))
    del alone

    say("looking up")
    batches = [keys[at : at + BATCH * KEY_BYTES] for at in range(0, len(keys), BATCH * KEY_BYTES)]
    batches = [batches[i] for i in np.random.default_rng(2).permutation(len(batches))]
    parents = [chain_parents(batch, None) for batch in batches]
    absent = [hashlib.sha256(batch).digest() + batch[KEY_BYTES:-KEY_BYTES] + os.urandom(KEY_BYTES) for batch in batches]
    cases: list[tuple[str, list[bytes], list[bytes | None]]] = [
        ("lookup, without parents", batches, [None] * len(batches)),
        ("lookup, chained by parents", batches, list(parents)),
        ("lookup, ends absent", absent, [None] * len(batches)),
    ]
    for what, asked, above in cases:
        rates = []
        for _ in range(5):
            since = time.perf_counter()
            for packed, parent in zip(asked, above, strict=True):
                index.lookup(space.digest, packed, parent, True)
            rates.append(pages / (time.perf_counter() - since))
        rows.append(_row(what, statistics.median(rates), "keys/s", 2e6, index, rates))
    rows.append(_hex_keys(index, space.digest, batches[:500]))

    say(f"opening a directory whose log names {pages:,} pages")
    rows += [_warm_open(work / name, records, pages) for name in ("once", "again", "and-again")]
    del records, index
    say(f"writing {scan_pages:,} small pages, to find them again without their log")
    rows.append(_scan(work / "scan", space, scan_pages))
    return rows


def _row(
    what: str, value: float, unit: str, goal: float | None, index: AnyIndex, samples: list[float] | None = None
) -> dict[str, Any]:
    spread = [min(samples), max(samples)] if samples else None
    return {"what": what, "value": value, "unit": unit, "goal": goal, "index": index.name, "spread": spread}


def _namespace() -> Namespace:
    layout = PageLayout("mha", "page_first", "bfloat16", 64, (_PAYLOAD,))
    return Namespace(model=hashlib.sha256(b"bench index").hexdigest(), weights="w", layout=layout)


def _fill(index: AnyIndex, digest: bytes, keys: bytes, chained: bool = True) -> Iterator[bytes]:
    """Chains of CHAIN pages, each in one call; yields log records. chained: told of their parents."""
    step = CHAIN * KEY_BYTES
    for first in range(0, len(keys) // KEY_BYTES, CHAIN):
        packed = keys[first * KEY_BYTES : first * KEY_BYTES + step]
        places = range(first, first + len(packed) // KEY_BYTES)
        yield index.publish(
            digest, packed, chain_parents(packed, None) if chained else None, 0, [n // _EXTENT_SLOTS for n in places],
            [n % _EXTENT_SLOTS for n in places], list(places), time.time_ns(),
        )[1]  # fmt: skip


def _snapshot(index: AnyIndex) -> list[dict[str, Any]]:
    """What a compaction of the log costs: under the lock to begin with, without it, and under it for each piece."""
    since = time.perf_counter()
    snapshot = index.snapshot(0)
    taken = time.perf_counter() - since
    since = time.perf_counter()
    snapshot.sort()
    sorted_in = time.perf_counter() - since
    pieces = []
    for start in range(0, len(snapshot), 1024):
        since = time.perf_counter()
        index.snapshot_records(snapshot, start, 1024)  # type: ignore[arg-type]
        pieces.append((time.perf_counter() - since) * 1e6)
    return [
        _row("snapshot of the order, under the lock", taken * 1e3, "ms", None, index),
        _row("sorting it, beside the serving", sorted_in * 1e3, "ms", None, index),
        _row("1,024 records of it, under the lock", statistics.median(pieces), "us", None, index, pieces),
    ]


def _hex_keys(index: AnyIndex, digest: bytes, batches: list[bytes]) -> dict[str, Any]:
    """What an engine's batch_exists costs here: 128 hex strings to packed keys, and the lookup."""
    hexes = [
        [b[at : at + KEY_BYTES].hex() for at in range(0, len(b), KEY_BYTES)] for b in batches if len(b) == BATCH * 32
    ]
    taken = []
    for strings in hexes:
        since = time.perf_counter()
        index.lookup(digest, pack_keys(strings), None, True)
        taken.append((time.perf_counter() - since) * 1e6)
    return _row("batch_exists of 128 hex strings", statistics.median(taken), "us", None, index, taken)


def _open(path: Path) -> tuple[LocalBackend, Dispatcher]:
    dispatcher = Dispatcher()
    options = LocalBackend.Options.model_validate({"path": path, "capacity": 1 << 30})
    return LocalBackend(options, dispatcher), dispatcher


def _warm_open(path: Path, records: bytes, pages: int) -> dict[str, Any]:
    (path / "w0").mkdir(parents=True)
    log = LogWriter(path / "w0" / NAME)
    log.append(records)
    log.close()
    since = time.perf_counter()
    backend, dispatcher = _open(path)
    seconds = time.perf_counter() - since
    known = int(backend.stats()["pages"])
    row = _row(f"warm open of {known:,} pages", seconds, "s", pages / 1_000_000, backend._index)
    backend.close()
    dispatcher.close()
    if known != pages:
        raise RuntimeError(f"the log named {pages} pages and {known} are known")
    return row


def _scan(path: Path, space: Namespace, pages: int) -> dict[str, Any]:
    memory = OwnedMemory(BATCH * _PAYLOAD)
    memory.view[:] = b"s" * len(memory.view)

    def write(backend: LocalBackend, name: str, count: int) -> None:
        for first in range(0, count, BATCH):
            names = range(first, min(first + BATCH, count))
            keys = b"".join(hashlib.sha256(f"{name}{n}".encode()).digest() for n in names)
            addresses = np.arange(len(names), dtype=np.uint64) * np.uint64(_PAYLOAD) + np.uint64(memory.address)
            lengths = np.full(len(names), _PAYLOAD, np.uint64)
            offsets = np.arange(len(names) + 1, dtype=np.int64)
            backend.write(PageBatch(space, keys, NO_PARENT * len(names), addresses, lengths, offsets, memory)).wait(60)

    backend, dispatcher = _open(path)
    write(backend, "page", pages)
    stored = int(backend.stats()["pages"])
    backend.close()
    dispatcher.close()
    (path / "w0" / NAME).unlink()
    backend, dispatcher = _open(path)
    since = time.perf_counter()
    write(backend, "another", 1)  # the first write takes the folder over, and with it the scan
    while "recovered_by_scan" not in backend.stats() and time.perf_counter() - since < 300:
        time.sleep(0.001)
    seconds = time.perf_counter() - since
    found = int(backend.stats()["recovered_by_scan"])
    if found < stored - 1:  # the write took a slot
        raise RuntimeError(f"{stored} pages were stored and the scan found {found}")
    row = _row(f"scan without a log, {found:,} pages", found / seconds, "pages/s", None, backend._index)
    backend.close()
    dispatcher.close()
    return row

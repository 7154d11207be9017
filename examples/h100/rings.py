"""Reads of 8 MiB pages through a local tier, by engines of 1 to 8 rings: GB/s and CPU seconds a GB, medians.

python rings.py DIRECTORY RESULT.json        (needs 4 GiB there; the directory is deleted)
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from hicache_ext.page import Namespace, PageLayout, chain_parents
from storage_backends.base import Dispatcher, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory
from storage_backends.local import LocalBackend, engine_native

PAGES, BUFFER, ROUNDS = 128, 4 << 20, 4
SPACE = Namespace("model", "weights", PageLayout("mha", "page_first", "bfloat16", 64, (BUFFER, BUFFER)))


def batch(keys: list[bytes], memory: OwnedMemory) -> PageBatch:
    packed, buffers = b"".join(keys), 2 * len(keys)
    addresses = memory.address + np.arange(buffers, dtype=np.uint64) * np.uint64(BUFFER)
    lengths, offsets = np.full(buffers, BUFFER, np.uint64), np.arange(len(keys) + 1, dtype=np.int64) * 2
    return PageBatch(SPACE, packed, chain_parents(packed, None), addresses, lengths, offsets, memory)


def main(directory: Path, result: Path) -> None:
    memory = OwnedMemory(PAGES * 2 * BUFFER)
    np.frombuffer(memory.view, np.uint8)[:] = np.random.default_rng(1).integers(0, 256, memory.size, np.uint8)
    keys = [os.urandom(32) for _ in range(2 * PAGES)]
    halves = [keys[:PAGES], keys[PAGES:]]
    dispatcher, rows = Dispatcher(), []
    shutil.rmtree(directory, ignore_errors=True)
    for rings in (2, 1, 4, 6, 8):
        engine_native.rings_for = lambda _, rings=rings: rings
        options = {"path": directory, "capacity": 4 << 30, "engine": "native"}
        tier = LocalBackend(LocalBackend.Options.model_validate(options), dispatcher)
        tier.register_memory(memory.address, memory.size)
        if not rows:
            for half in halves:
                assert set(tier.write(batch(half, memory)).result(60)) == {Outcome.HIT}
        wall, cpu = [], []
        for _ in range(ROUNDS):
            for half in halves:
                since, spent = time.monotonic(), time.process_time()
                assert set(tier.read(batch(half, memory)).result(60)) == {Outcome.HIT}
                wall.append(time.monotonic() - since)
                cpu.append(time.process_time() - spent)
        size = memory.size / 1e9
        rows.append(
            {
                "rings": rings,
                "gb_per_s": round(size / statistics.median(wall[2:]), 2),
                "cpu_s_per_gb": round(statistics.median(cpu[2:]) / size, 4),
            }
        )
        print(rows[-1], flush=True)
        tier.close()
    dispatcher.close()
    shutil.rmtree(directory)
    result.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

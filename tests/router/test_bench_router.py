"""`hicache-ext bench router`: the simulation, and a short run through Dynamo's own selection."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from hicache_ext.bench.dynamo import Service
from hicache_ext.bench.router import Request, Worker, run
from hicache_ext.events.model import Medium
from tests.netns import Host


def test_a_worker_forgets_ends_first_and_finds_what_it_has(tmp_path: Path) -> None:
    worker = Worker(device=2, storage=4, told=(Medium.DEVICE, Medium.DISK), folder=tmp_path, number=0)
    try:
        assert worker.serve((1, 2, 3)) == 0
        assert worker.serve((1, 2, 3)) == 3  # two on the device, the third in storage
        assert worker.serve((7, 8)) == 0
        assert worker.serve((1, 2, 3)) == 2  # storage holds four: 3 was an end
    finally:
        worker.publisher.close()


def test_a_run_through_dynamo() -> None:
    pytest.importorskip("dynamo.select_service", reason="needs ai-dynamo-runtime")
    with Host() as host:
        process = host.python(
            "-m", "dynamo.select_service", "--port", "8092", "--threads", "1", stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env={**os.environ, "DYN_LOG": "error"},
        )  # fmt: skip
        with host.inside():
            router = Service("http://127.0.0.1:8092")
            until = time.monotonic() + 60
            while True:
                try:
                    router.ask("GET", "/health")
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.1)
            # Conversations that come back after the device has forgotten them.
            requests = [Request(tuple(range(talk * 100, talk * 100 + 10))) for _ in range(3) for talk in range(8)]
            rows = {
                how: run(router, requests, 2, 20, 1000, how, lambda _: None)
                for how in ("round robin", "device events", "with tier events")
            }
    assert all(row["tokens"] == 24 * 10 * 512 for row in rows.values())
    # Eight talks over two workers in turns always come back to the same one.
    assert rows["round robin"]["reused"] == pytest.approx(2 / 3)
    assert rows["with tier events"]["reused"] >= rows["device events"]["reused"]

"""Dynamo's own indexer, on a host of its own: it listens on every address that it finds.

Event streams reach it through ipc:// addresses, which are files and know no network; HTTP through a socket that is made
on that host.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.netns import Host

PORT = 8090
MODEL = "model"
_SECONDS = 60.0


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: Host) -> None:
        super().__init__("127.0.0.1", PORT, timeout=_SECONDS)
        self._on = host

    def connect(self) -> None:
        with self._on.inside():
            super().connect()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Indexer:
    """A running `dynamo.indexer`. Skips the test where it cannot run. host: where. log: what it has printed.

    With a host given it runs there, and dies with it.
    """

    def __init__(self, folder: Path, threads: int = 1, host: Host | None = None) -> None:
        pytest.importorskip("dynamo.indexer", reason="needs ai-dynamo-runtime")
        self.log = folder / "indexer.log"
        self.host, self._alone = host or Host(), host is None
        self._connection: _Connection | None = None
        with self.log.open("wb") as log:
            self._process = self.host.python(
                "-m", "dynamo.indexer", "--port", str(PORT), "--threads", str(threads), stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, "DYN_LOG": "info"},
            )  # fmt: skip
        until = time.monotonic() + _SECONDS
        while True:
            try:
                self.ask("GET", "/health")
                return
            except (OSError, http.client.HTTPException):
                if time.monotonic() > until or self._process.poll() is not None:
                    self.close()
                    raise RuntimeError(f"the indexer did not start: {self.log.read_text()[-2000:]}") from None
                time.sleep(0.05)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer as JSON; text where it is none. RuntimeError: refused."""
        if self._connection is None:
            self._connection = _Connection(self.host)
        try:
            data = None if body is None else json.dumps(body)
            self._connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._connection = None
            raise
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer.status} {text}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def register(self, worker: int, endpoint: str, replay_endpoint: str, block_size: int) -> None:
        self.ask("POST", "/register", {
            "instance_id": worker, "endpoint": endpoint, "replay_endpoint": replay_endpoint, "model_name": MODEL,
            "block_size": block_size,
        })  # fmt: skip

    def unregister(self, worker: int) -> None:
        self.ask("POST", "/unregister", {"instance_id": worker, "model_name": MODEL})

    def query(self, tokens: Sequence[int], worker: int = 1) -> tuple[int, int, int]:
        """Tokens of this prompt that the worker has down to and including device, host, and what lies below."""
        answer = self.ask("POST", "/query", {"token_ids": list(tokens), "model_name": MODEL})["instances"]
        found = answer.get(str(worker), {})
        return found.get("gpu", 0), found.get("cpu", 0), found.get("disk", 0)

    def held(self, worker: int = 1) -> dict[str, dict[int, int | None]]:
        """By tier ("disk", "external"): each block's hash, and that of the block before."""
        found: dict[str, dict[int, int | None]] = {}
        for partition in self.ask("GET", "/dump").values():
            for entry in partition["events"]:
                if entry["worker_id"] != worker:
                    continue
                stored = entry["event"]["data"]["stored"]
                before = _signed(stored["parent_hash"])
                for block in stored["blocks"]:
                    number = _signed(block["block_hash"])
                    assert number is not None
                    found.setdefault(entry["storage_tier"], {})[number] = before
                    before = number
        return found

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._alone:
            self.host.close()

    def __enter__(self) -> Indexer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _signed(value: int | None) -> int | None:
    return value if value is None or value < 1 << 63 else value - (1 << 64)

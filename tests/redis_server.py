"""Real Redis servers for tests: on loopback and free ports, gone at the end."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest


def free_port() -> int:
    """A port that was free a moment ago, low enough for a cluster's bus (port + 10000)."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port: int = one.getsockname()[1]
        if port < 55000:
            return port


class RedisServer:
    """One `redis-server` with these arguments; keeps nothing on disk. Skips the test where there is none."""

    def __init__(self, *arguments: str, port: int = 0, tls: bool = False, password: str = "") -> None:
        pytest.importorskip("redis")
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            pytest.skip("no redis-server here (apt-get install redis-server)")
        self._binary = binary
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.port = port or free_port()
        self.tls, self.password = tls, password
        self.arguments = list(arguments)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it (again), empty."""
        ports = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        common = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        if self.password:
            common += ["--requirepass", self.password]
        self.process = subprocess.Popen(
            [self._binary, *ports, *common, *self.arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, "redis-server ended"
                time.sleep(0.01)
        raise AssertionError("redis-server did not start")

    def client(self) -> Any:
        """A client of redis-py, to look behind the backend's back."""
        import redis

        return redis.Redis(port=self.port, password=self.password or None, protocol=2)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def stop_answering(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def answer_again(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

"""Real Redis servers for tests: on loopback and free ports, gone at the end."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from hicache_ext.cli.serving import free_port
from tests.child import Child


class RedisServer(Child):
    """One `redis-server` with these arguments; keeps nothing on disk. Skips the test where there is none."""

    name = "redis-server"

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
        self.wait_until_up(15, 0.01)

    def client(self) -> Any:
        """A client of redis-py, to look behind the backend's back."""
        import redis

        return redis.Redis(port=self.port, password=self.password or None, protocol=2)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

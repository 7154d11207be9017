"""A real S3 over HTTP for tests: moto's server, on loopback, one for the whole run and a bucket for each test."""

from __future__ import annotations

import atexit
import subprocess
import sys
import uuid
from functools import lru_cache
from typing import Any

import pytest

from hicache_ext.cli.serving import free_port
from tests.certificates import Certificate
from tests.child import Child, die_with_parent

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"}


class S3Server(Child):
    """One `moto_server`. Skips the test where moto is not installed."""

    name = "moto_server"

    def __init__(self, tls: Certificate | None = None) -> None:
        pytest.importorskip("obstore")
        pytest.importorskip("moto.server")
        self._tls = tls
        self.port = free_port()
        self.start()

    def start(self) -> None:
        """Start it (again), empty."""
        secure = [] if self._tls is None else ["-s", "-c", str(self._tls.cert), "-k", str(self._tls.key)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port), *secure],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        self.wait_until_up(120, 0.05)

    def bucket(self, name: str = "") -> str:
        """A new bucket's name."""
        import requests

        name = name or f"pages-{uuid.uuid4().hex[:12]}"
        address = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/{name}"
        requests.put(address, timeout=60, verify=str(self._tls.authority) if self._tls else True).raise_for_status()
        return name

    def store(self, bucket: str) -> Any:
        """An obstore of the bucket, to look behind the backend's back."""
        from obstore.store import S3Store

        options = {"allow_http": True, "timeout": "60s"}
        return S3Store(bucket, client_options=options, **options_of(self.port))


def options_of(port: int) -> dict[str, Any]:
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "access_key_id": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "secret_access_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    }


@lru_cache(maxsize=1)
def s3_server() -> S3Server:
    """The run's server: it takes seconds to start."""
    server = S3Server()
    atexit.register(server.kill)
    return server

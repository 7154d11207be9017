"""A real Mooncake for tests: mooncake_master on a host of its own, and a machine that gives memory to the store.

Two processes: the master, and the store's memory, held by Mooncake's client without us in between. What runs inside
`host.inside()` reaches them; nothing else does.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import subprocess
import time
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.netns import Host, Network

RPC_PORT, METRICS_PORT = 5100, 5102
_HOLD = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup({address!r}, "P2PHANDSHAKE", {size}, 0, "tcp", "", {master!r})
print(code, flush=True)
sys.stdin.read()
"""
_TOOL = """
import json, sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
print(store.setup({address!r}, "P2PHANDSHAKE", 0, 64 << 20, "tcp", "", {master!r}), flush=True)
for line in sys.stdin:
    do, *words = json.loads(line)
    if do == "get":
        answer = store.get(words[0]).hex()
    elif do == "put":
        answer = store.put(words[0], bytes.fromhex(words[1]))
    elif do == "remove":
        answer = store.remove(words[0], True)
    print(json.dumps(answer), flush=True)
"""


def installed() -> Path:
    """The package's folder. Skips the test where there is none."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no mooncake here (pip install mooncake-transfer-engine-non-cuda)")
    return Path(spec.submodule_search_locations[0])


class MooncakeServer:
    """The master on `host`, and `size` bytes of the store's memory on `holder` (the same host by default).

    lease_ms: for which a page that was read is not evicted. client_ttl: seconds until the master misses a machine.
    """

    def __init__(
        self, host: Host, size: int = 64 << 20, lease_ms: int = 500, holder: Host | None = None, client_ttl: int = 10
    ) -> None:
        self._binary = installed() / "mooncake_master"
        self.host, self.size, self._lease_ms, self._client_ttl = host, size, lease_ms, client_ttl
        self.holder = holder or host
        self.master = f"{host.address}:{RPC_PORT}"
        self.process: subprocess.Popen[Any] | None = None
        self.memory: subprocess.Popen[Any] | None = None
        self.start()
        if size:
            self.hold()

    def start(self) -> None:
        """Start the master (again), empty."""
        self.process = self.host.popen(
            str(self._binary), "--rpc_address", self.host.address, "--rpc_port", str(RPC_PORT),
            "--metrics_host", "127.0.0.1", "--metrics_port", str(METRICS_PORT),
            "--default_kv_lease_ttl", str(self._lease_ms), "--client_ttl", str(self._client_ttl),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 30
        while f":{RPC_PORT} " not in self.host.run("ss", "-Hltn"):
            assert self.process.poll() is None, "mooncake_master ended"
            assert time.monotonic() < until, "mooncake_master did not start"
            time.sleep(0.02)

    def hold(self) -> None:
        """Give the store its memory (again), empty."""
        self.memory = self._client(_HOLD.format(address=self.holder.address, size=self.size, master=self.master))

    def tool(self) -> Tool:
        """A client of Mooncake's own, to look behind the backend's back."""
        return Tool(self._client(_TOOL.format(address=self.holder.address, master=self.master)))

    def kill(self) -> None:
        """The master dies."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def options(self, **more: Any) -> dict[str, Any]:
        """Options of a tier here."""
        return {"master": self.master, "buffer": 16 << 20, **more}

    def _client(self, program: str) -> subprocess.Popen[Any]:
        child = self.holder.python(
            "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "0\n", "Mooncake's client cannot reach the master"
        return child


@lru_cache(maxsize=1)
def mooncake_server() -> MooncakeServer:
    """The run's server, for tests that leave it as it was: give each a prefix of its own."""
    installed()
    network = Network(1)
    atexit.register(network.close)
    # On a busy machine leases must not run out, nor may the memory's heartbeat be missed: either makes pages misses.
    return MooncakeServer(network.hosts[0], 512 << 20, lease_ms=30_000, client_ttl=120)


class Tool:
    """get, put and remove of whole objects, by name."""

    def __init__(self, child: subprocess.Popen[Any]) -> None:
        self._child = child

    def __call__(self, *words: str) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(words) + "\n")
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline())

    def get(self, name: str) -> bytes:
        return bytes.fromhex(self("get", name))

    def put(self, name: str, data: bytes) -> None:
        """Replaces what is there."""
        self("remove", name)
        assert self("put", name, data.hex()) == 0

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._child.kill()
        self._child.wait()

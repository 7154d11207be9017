"""The yardsticks of the redis tier: a loop over redis-py on the same server, and redis-benchmark."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_plain import InThreads, Options, Say, Yardstick
from hicache_ext.bench.tiers_rounds import Batch, Plan, Role, Subject, Taken, Work

if TYPE_CHECKING:
    from storage_backends.redis.options import RedisOptions

_PREFIX = "hicache-bench"
_HIREDIS = "redis-py has no hiredis here, which makes it slower. Fix: pip install hiredis"
_NO_TOOL = "redis-benchmark is not installed, its rows are left out. Fix: apt-get install -y redis-tools"
_NOT_SIMPLE = "redis-benchmark is left out: it is used for one server without TLS and password only"


class RedisPy(InThreads):
    """As many connections as the tier has. A value that arrived is copied into its page; nothing is checked.

    Writes are pipelined and reads are not: with redis-py each is the faster of the two.
    """

    name = "redis-py"

    def __init__(self, options: RedisOptions, token: str) -> None:
        from storage_backends.redis.servers import Servers
        from storage_backends.secrets import load_secret

        super().__init__(options.connections)
        parser = f"hiredis {version('hiredis')}" if find_spec("hiredis") else "no hiredis"
        self.way = f"{version('redis')}, {parser}, {options.connections} connections"
        self._servers = Servers(options, load_secret("password", options.password_env, options.password_file))
        self._client = self._servers.client()
        self._start = f"{_PREFIX}:{token}:"

    def write_part(self, part: Batch) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for name, buffer in zip(part.names, part.buffers, strict=True):
            pipeline.set(self._start + name, buffer)
        pipeline.execute()

    def read_part(self, part: Batch) -> None:
        for name, buffer in zip(part.names, part.buffers, strict=True):
            buffer[:] = self._client.get(self._start + name)

    def lookup_part(self, part: Batch) -> int:
        pipeline = self._client.pipeline(transaction=False)
        for name in part.names:
            pipeline.exists(self._start + name)
        return sum(pipeline.execute())

    def remove_part(self, part: Batch) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for name in part.names:
            pipeline.unlink(self._start + name)
        pipeline.execute()

    def close(self) -> None:
        super().close()
        self._client.close()
        self._servers.close()


class RedisBenchmark(Subject):
    """Values of the page's size, one request a connection at a time; its CPU is its process's."""

    name, role = "redis-benchmark", Role.TOOL
    cases = ("write", "read")
    keeps = True

    def __init__(self, options: RedisOptions, page: int, plan: Plan, token: str) -> None:
        address = urlsplit(options.url)
        self._where = ["-s", address.path] if address.scheme == "unix" else ["-h", address.hostname or "127.0.0.1"]
        if address.scheme != "unix":
            self._where += ["-p", str(address.port or 6379)]
        if address.scheme != "unix" and address.path.strip("/"):
            self._where += ["--dbnum", address.path.strip("/")]
        self._options, self._page, self._count = options, page, plan.count(page)
        # So few that each of them is there after the first round.
        self._keys = max(1, self._count // 8)
        self._start = f"{_PREFIX}:{token}:tool:"
        self.way = f"{options.connections} connections"

    def round(self, case: str, work: Work) -> Taken:
        before, since = _children_cpu(), time.perf_counter()
        command = ["redis-benchmark", *self._where, "-n", str(self._count), "-c", str(self._options.connections)]
        command += ["-r", str(self._keys), "--csv", *(["-x", "SET"] if case == "write" else ["GET"])]
        command.append(self._start + "__rand_int__")
        value = b"x" * self._page if case == "write" else b""
        done = subprocess.run(command, input=value, capture_output=True, check=False)
        wall, cpu = time.perf_counter() - since, _children_cpu() - before
        rate = requests_per_second(done.stdout[-300:].decode(errors="replace"))
        if done.returncode or rate is None or b"-ERR" in done.stdout[-300:]:
            raise RuntimeError(f"redis-benchmark failed ({done.returncode}): {done.stderr[-300:].decode()}")
        return Taken(min(wall, self._count / rate), cpu, self._count, self._count * self._page)

    def write(self, batch: Batch) -> None:
        raise NotImplementedError("redis-benchmark times itself")

    read = remove = write

    def lookup(self, batch: Batch) -> int:
        raise NotImplementedError("redis-benchmark times itself")

    def close(self) -> None:
        from storage_backends.redis.servers import Servers

        client = Servers(self._options, None).client()
        with contextlib.suppress(Exception):  # redis-py's, where the server went away
            client.unlink(*(f"{self._start}{number:012}" for number in range(self._keys)))
        client.close()


class RedisYardstick(Yardstick):
    def plain(self, options: Any, memory: Memory, plan: Plan, say: Say) -> list[Subject]:
        if find_spec("hiredis") is None:
            say(_HIREDIS)
        token = f"{time.time_ns():x}"
        found: list[Subject] = [RedisPy(options, token)]
        secured = options.password_env or options.password_file or options.url.startswith("rediss:")
        if secured or options.cluster or options.sentinels:
            say(_NOT_SIMPLE)
        elif shutil.which("redis-benchmark") is None:
            say(_NO_TOOL)
        else:
            found.append(RedisBenchmark(options, memory.block, plan, token))
        return found

    def moved(self, options: Options, port: int) -> Options:
        kept = {name: value for name, value in options.items() if not name.startswith(("tls_", "sentinel"))}
        return {**kept, "url": f"redis://127.0.0.1:{port}", "cluster": False, "service": ""}


def requests_per_second(text: str) -> float | None:
    """What the last line of redis-benchmark's CSV says; the value that was sent is in its first field."""
    found = re.search(r'","(\d+(?:\.\d+)?)"(?:,"[\d.]+")*\s*$', text)
    return float(found[1]) if found and float(found[1]) else None


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


YARDSTICK = RedisYardstick()

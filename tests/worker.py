"""A process with a tier of its own, driven by JSON lines on stdin: for tests that need real processes.

    python -m tests.worker PATH CAPACITY MODEL ENGINE

A local tier, or with the engine "shared_fs" a share, or with "memory" a tier in memory whose processes meet in PATH.
With QUICK in the environment, a local tier's shares of the capacity move in seconds instead of minutes.

Commands: store, found, served, write_forever, churn, read_into, die_writing, clear, stats, close. Each answers with one
JSON line.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.page import Namespace
from storage_backends.base import Backend, Dispatcher, Outcome, PageBatch
from storage_backends.local import LocalBackend, supply, use
from storage_backends.memory import MemoryBackend
from storage_backends.shared_fs import SharedFsBackend
from tests.netns import Host
from tests.pages import HostPool, chain, key_batch, namespace

QUICK = "HICACHE_EXT_TEST_QUICK"
#: JSON list of the lengths of a page's buffers, in bytes.
LENGTHS = "HICACHE_EXT_TEST_LENGTHS"


class Worker:
    """The parent's end. host: where it runs, if not on this one."""

    def __init__(
        self, path: Path, capacity: int, model: str = "model-a", engine: str = "threads", host: Host | None = None,
        **env: str,
    ) -> None:  # fmt: skip
        command = [sys.executable, "-m", "tests.worker", str(path), str(capacity), model, engine]
        self.process = subprocess.Popen(
            command if host is None else host.command(*command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
            cwd=Path(__file__).parent.parent,
        )
        assert self.answer() == "ready"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker died with {self.process.wait()}"
        return json.loads(line)

    def tell(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, command: str, **arguments: Any) -> Any:
        self.tell(command, **arguments)
        return self.answer()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def opened(path: str, capacity: str, engine: str) -> Backend:
    if engine == "memory":
        values: dict[str, Any] = {"region": "test", "directory": path, "capacity": int(capacity)}
        return MemoryBackend(MemoryBackend.Options.model_validate(values), Dispatcher())
    if engine == "shared_fs":
        values = {"path": path, "capacity": int(capacity), "linger": 0.2, "refresh": 0.2}
        return SharedFsBackend(SharedFsBackend.Options.model_validate(values), Dispatcher())
    values = {"path": path, "capacity": int(capacity), "engine": engine}
    return LocalBackend(LocalBackend.Options.model_validate(values), Dispatcher())


def churn(backend: Backend, space: Namespace, seed: int, turns: int, chains: int) -> dict[str, int]:
    """Write, read and remove random ones of `chains` chains that others churn as well; how often each outcome came."""
    chance, counts = random.Random(seed), Counter[str]()
    pool = HostPool(space, 8)
    for _ in range(turns):
        keys = chain(f"churn/{chance.randrange(chains)}", 8)[: chance.randint(1, 8)]
        match chance.choice(("write", "read", "read", "read", "remove")):
            case "write":
                outcomes = backend.write(pool.write_batch(keys)).result(30)
                counts.update(f"write {outcome.name}" for outcome in outcomes)
            case "read":
                counts.update(f"read {outcome}" for outcome in served(backend, space, keys))
            case "remove":
                if chance.random() < 0.2:
                    backend.remove(key_batch(space, keys))
    return counts


def read_into(backend: Backend, space: Namespace, key: bytes, file: str) -> Outcome:
    """Read a page of one buffer into a mapped file, where others see how far it has come."""
    with open(file, "r+b") as opened:
        memory = np.frombuffer(mmap.mmap(opened.fileno(), 0), np.uint8)
    one, length = np.array([memory.ctypes.data], np.uint64), np.array([memory.size], np.uint64)
    return backend.read(PageBatch(space, key, None, one, length, np.array([0, 1]), memory)).result(60)[0]


def die_writing(again: Callable[[], Backend], space: Namespace, name: str, after: float) -> None:
    """A forked process with a tier of its own, killed in the middle of writing and removing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            backend, keys = again(), chain(name, 4)
            batch = HostPool(space, 4).write_batch(keys)
            os.write(writing, b"!")
            while True:
                backend.write(batch).result(30)
                backend.remove(key_batch(space, keys))
        finally:
            os._exit(1)
    os.close(writing)
    began = os.read(reading, 1)
    os.close(reading)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert began, "the forked process did not begin"


def served(backend: Backend, space: Any, keys: list[bytes]) -> list[str]:
    """Outcome per page; "wrong" for a HIT with bytes that are not the page's."""
    pool = HostPool(space, len(keys))
    pool.poison()
    outcomes = backend.read(pool.batch(keys)).result(30)
    return [
        "wrong" if outcome == Outcome.HIT and not pool.right(page, keys[page]) else outcome.name
        for page, outcome in enumerate(outcomes)
    ]


def main(path: str, capacity: str, model: str, engine: str) -> None:
    if os.environ.get(QUICK):
        supply.SHARE_SECONDS, use.HALF_LIFE = 0.2, 1.0
    space = namespace((65536, 65536), model=model)
    if (lengths := os.environ.get(LENGTHS)) is not None:
        space = namespace(tuple(json.loads(lengths)), model=model)
    backend = opened(path, capacity, engine)

    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        keys = chain(request.get("chain", ""), request.get("pages", 0))
        match request["command"]:
            case "store":
                outcomes = backend.write(HostPool(space, len(keys)).write_batch(keys)).result(30)
                say([outcome.name for outcome in outcomes])
            case "found":
                say(backend.lookup(key_batch(space, keys)).tolist())
            case "served":
                say(served(backend, space, keys))
            case "write_forever":
                pool, turn = HostPool(space, 8), 0
                while True:
                    name = f"{request['chain']}/{turn}"
                    if all(o == Outcome.HIT for o in backend.write(pool.write_batch(chain(name, 8))).result(30)):
                        say(name)
                    turn += 1
            case "churn":
                say(churn(backend, space, request["seed"], request["turns"], request["chains"]))
            case "read_into":
                say(read_into(backend, space, keys[0], request["file"]).name)
            case "die_writing":
                die_writing(lambda: opened(path, capacity, engine), space, request["chain"], request["after"])
                say("dead")
            case "clear":
                backend.clear([space])
                say("cleared")
            case "stats":
                say(dict(backend.stats()))
            case "close":
                backend.close()
                say("closed")


if __name__ == "__main__":
    if (first := os.environ.get("HICACHE_EXT_TEST_FIRST")) is not None:  # a module that changes what is under test
        __import__(first)
    main(*sys.argv[1:])

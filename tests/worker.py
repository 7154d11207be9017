"""A process with a tier of its own, driven by JSON lines on stdin: for tests that need real processes.

    python -m tests.worker PATH CAPACITY MODEL ENGINE      a local tier, or with the engine "shared_fs" a share

With QUICK in the environment, shares of the capacity move in seconds instead of minutes.

Commands: store, found, served, write_forever, clear, stats, close. Each answers with one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from storage_backends.base import Backend, Dispatcher, Outcome
from storage_backends.local import LocalBackend, supply, use
from storage_backends.shared_fs import SharedFsBackend
from tests.netns import Host
from tests.pages import HostPool, chain, key_batch, namespace

QUICK = "HICACHE_EXT_TEST_QUICK"


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
    backend: Backend
    if engine == "shared_fs":
        options = {"path": path, "capacity": int(capacity), "linger": 0.2, "refresh": 0.2}
        backend = SharedFsBackend(SharedFsBackend.Options.model_validate(options), Dispatcher())
    else:
        options = {"path": path, "capacity": int(capacity), "engine": engine}
        backend = LocalBackend(LocalBackend.Options.model_validate(options), Dispatcher())

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
            case "clear":
                backend.clear([space])
                say("cleared")
            case "stats":
                say(dict(backend.stats()))
            case "close":
                backend.close()
                say("closed")


if __name__ == "__main__":
    main(*sys.argv[1:])

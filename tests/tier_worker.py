"""A process with one tier of any backend, on a host of its own, driven by JSON lines: for tests of several hosts.

Commands: store, served, write_forever, stats, close. Each answers with one JSON line. Other than worker.py, which knows
the local tier's speed-ups and its shares.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from storage_backends.base import Dispatcher, Outcome
from storage_backends.registry import backend_class
from tests.netns import Host
from tests.pages import HostPool, chain, namespace, served

#: Pages of 128 KiB in two buffers.
SPACE = namespace((65536, 65536))


class TierWorker:
    """The parent's end of a worker with a tier of this type."""

    def __init__(self, host: Host, kind: str, options: dict[str, Any]) -> None:
        self.process = host.python(
            "-m", "tests.tier_worker", kind, json.dumps(options, default=str),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.answer() == "ready"

    def tell(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker died with {self.process.wait()}"
        return json.loads(line)

    def ask(self, command: str, **arguments: Any) -> Any:
        self.tell(command, **arguments)
        return self.answer()


def main() -> None:
    kind, text = sys.argv[1:]
    chosen = backend_class(kind)
    dispatcher = Dispatcher()
    backend = chosen(chosen.Options.model_validate(json.loads(text)), dispatcher)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        keys = chain(request.get("name", ""), request.get("pages", 0))
        answer: Any = True
        match request["command"]:
            case "store":
                answer = [int(one) for one in backend.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(60)]
            case "served":  # asserts that every hit is right
                answer = [int(one) for one in served(backend, SPACE, keys, 60)]
            case "write_forever":
                print(json.dumps(True), flush=True)
                pool, turn = HostPool(SPACE, len(keys)), 0
                while True:
                    turn += 1
                    backend.write(pool.write_batch(chain(f"{request['name']}/{turn}", len(keys)))).result(60)
            case "stats":
                answer = dict(backend.stats())
            case "close":
                backend.close()
                dispatcher.close()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    assert Outcome.HIT == 1
    main()

"""A store in a process of its own, on any host, that writes and reads as SGLang's cache controller does.

    python -m tests.store_worker CONFIG.json

Prefixes are chains of pages, written and read in batches of BATCH. Commands are JSON lines on stdin, with one JSON line
as answer to each: write, read, write_forever, settle, stats.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hicache_ext.config import Config
from hicache_ext.store.policies import prefix_length
from hicache_ext.store.tiered import NO_TIER, TieredStore
from storage_backends.base import Outcome
from tests.child import die_with_parent
from tests.netns import Host
from tests.pages import HostPool, chain, key_batch, namespace

BATCH = 16
SPACE = namespace((32768, 32768))


class StoreWorker:
    """The parent's end."""

    def __init__(self, host: Host, folder: Path, tiers: list[dict[str, Any]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"tiers": tiers}))
        words = ["-m", "tests.store_worker", str(folder / "config.json")]
        self.process = host.python(*words, stdin=-1, stdout=-1, text=True)
        assert self.answer() == "ready"

    def tell(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The next answer; None when there will be no more."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def ask(self, command: str, **arguments: Any) -> Any:
        self.tell(command, **arguments)
        return self.answer()


def write(store: TieredStore, name: str, pages: int) -> int:
    """A prefix: looked up, and what is missing is written. How many pages are stored."""
    keys, stored, parent = chain(name, pages), 0, None
    for at in range(0, pages, BATCH):
        part = keys[at : at + BATCH]
        pool = HostPool(SPACE, len(part))
        store.lookup(key_batch(SPACE, part, parent))
        stored += store.write(pool.write_batch(part, parent)).result(60).count(Outcome.HIT)
        parent = part[-1]
    return stored


def read(store: TieredStore, name: str, pages: int) -> dict[str, Any]:
    """The longest prefix that is there. wrong: pages that came with other bytes than theirs."""
    keys, parent = chain(name, pages), None
    since = time.monotonic()
    there = prefix_length(store.lookup(key_batch(SPACE, keys)) != NO_TIER)
    good = wrong = 0
    for at in range(0, there, BATCH):
        part = keys[at : min(at + BATCH, there)]
        pool = HostPool(SPACE, len(part))
        pool.poison()
        outcomes = store.read(pool.batch(part, parent=parent)).result(60)
        hits = [page for page, outcome in enumerate(outcomes) if outcome == Outcome.HIT]
        wrong += sum(not pool.right(page, part[page]) for page in hits)
        run = prefix_length(np.array([outcome == Outcome.HIT for outcome in outcomes]))
        good, parent = good + run, part[-1]
        if run < len(part):
            break
    return {"found": there, "good": good, "wrong": wrong, "seconds": time.monotonic() - since}


def main(config: str) -> None:
    store = TieredStore.open(Config.load(config))

    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        name, pages = request.get("chain", ""), request.get("pages", 0)
        match request["command"]:
            case "write":
                say(write(store, name, pages))
            case "read":
                say(read(store, name, pages))
            case "settle":
                say(store.settled(request["seconds"]))
            case "stats":
                say({tier: dict(values) for tier, values in store.stats().items()})
            case "write_forever":
                for turn in range(10**6):
                    if write(store, f"{name}/{turn}", pages) == pages and store.settled(10):
                        say(f"{name}/{turn}")
    store.close()


if __name__ == "__main__":
    die_with_parent()
    main(sys.argv[1])

"""A worker without an engine: a real store, its announcer and publisher, and prompts whose pages it stores."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hicache_ext.config import Config
from hicache_ext.events.announcer import Announcer
from hicache_ext.events.follower import Follower
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Outcome
from tests.pages import HostPool, key_batch, namespace

PAGE = 16
SPACE = namespace((2048, 2048), page_size=PAGE)
TIERS = {"DISK": "disk", "EXTERNAL": "external"}


class Prompt(NamedTuple):
    """tokens: of all pages. keys: of each page, chained over the tokens as SGLang chains them."""

    tokens: tuple[int, ...]
    keys: tuple[bytes, ...]

    def hashes(self) -> list[int]:
        return [int.from_bytes(key[:8], "big", signed=True) for key in self.keys]


def prompt(tokens: list[int]) -> Prompt:
    keys, digest = [], b""
    for at in range(0, len(tokens) - PAGE + 1, PAGE):
        digest = hashlib.sha256(digest + np.array(tokens[at : at + PAGE], "<u4").tobytes()).digest()
        keys.append(digest)
    return Prompt(tuple(tokens[: len(keys) * PAGE]), tuple(keys))


class Worker:
    """One worker's storage and its event stream. meddle: what becomes of the events on their way."""

    def __init__(
        self, folder: Path, tiers: list[dict[str, Any]], meddle: Callable[[list[Any]], list[Any]] | None = None
    ) -> None:
        self.folder, self.config = folder, {"tiers": tiers}
        self.prompts: list[Prompt] = []
        self.number = 0
        self._meddle = meddle
        self.start()

    def start(self) -> None:
        self.store = TieredStore.open(Config.load(self.config))
        self.announcer = Announcer()
        source: Any = self.announcer if self._meddle is None else _Meddled(self.announcer, self._meddle)
        options = PublisherOptions(endpoint=f"ipc://{self.folder}/live", replay_endpoint=f"ipc://{self.folder}/replay")
        self.publisher = Publisher(options, source)
        self.follower = Follower(self.store, self.announcer, SPACE.digest, self.publisher.wake)

    def stop(self) -> None:
        self.publisher.close()
        self.follower.close()
        self.store.close()

    def save(self, one: Prompt) -> None:
        """Store the prompt's pages."""
        if one not in self.prompts:
            self.prompts.append(one)
        keys = list(one.keys)
        hashes = np.array(one.hashes(), np.int64)
        batch = replace(
            HostPool(SPACE, len(keys)).write_batch(keys),
            tokens=np.array(one.tokens, np.uint32).reshape(-1, PAGE),
            event_hashes=np.stack([hashes, np.concatenate([[0], hashes[:-1]])], 1),
        )
        assert batch.notes is not None
        self.announcer.know(SPACE.digest, batch.keys, batch.notes)  # as an engine's adapter does, stored or not
        assert set(self.store.write(batch).result(30)) <= {Outcome.HIT, Outcome.REJECTED}
        assert self.store.settled(30)

    def forget(self, one: Prompt, pages: slice) -> None:
        self.store.remove(key_batch(SPACE, list(one.keys[pages])))

    def truth(self) -> dict[str, dict[int, int | None]]:
        """Asked of the stores themselves: by tier, each page that can be had, and the page before it."""
        before: dict[bytes, bytes | None] = {}
        for one in self.prompts:
            before.update(zip(one.keys, (None, *one.keys[:-1]), strict=True))
        keys = list(before)
        found: dict[str, dict[int, int | None]] = {}
        for tier in self.store.tiers:
            if not keys or tier.reads.state.value != "closed":
                continue
            there = tier.backend.lookup(key_batch(SPACE, keys))
            held = {_number(key): _number(before[key]) for key, has in zip(keys, there, strict=True) if has}
            if held:
                found[TIERS[tier.backend.capabilities.medium]] = held  # type: ignore[assignment]
        return found

    def reach(self, one: Prompt) -> int:
        """Tokens of the prompt that a query must find: the disk's, and from there the external's."""
        truth, at = self.truth(), 0
        for tier in ("disk", "external"):
            while at < len(one.keys) and _number(one.keys[at]) in truth.get(tier, {}):
                at += 1
        return at * PAGE


def _number(key: bytes | None) -> int | None:
    return None if key is None else int.from_bytes(key[:8], "big", signed=True)


class _Meddled:
    def __init__(self, source: Announcer, meddle: Callable[[list[Any]], list[Any]]) -> None:
        self._source, self._meddle = source, meddle
        self.clear = source.clear

    def take(self, limit: int) -> list[Any]:
        return self._meddle(self._source.take(limit))


def wait(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True

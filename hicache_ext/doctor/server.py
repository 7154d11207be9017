"""Whether a tier answers: it is opened and asked for a page, as a server would.

Belongs here: one tier of a configuration, and what it says. Does not belong here: presentation
(hicache_ext.cli.config), or the state of disks (tier.py). Call it in a process of its own (isolation.py): a server may
hang, a library may die.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hicache_ext.config import Config, ConfigError, TierConfig
from hicache_ext.doctor.finding import Finding, error, ok
from hicache_ext.page import KEY_BYTES, Namespace, PageLayout
from storage_backends.base import Backend, Capabilities, Dispatcher, KeyBatch, Outcome, PageBatch
from storage_backends.buffers import OwnedMemory


@dataclass
class Ping:
    """What a tier said. *_ms: of the lookup, and of the page that was written and read, where that was asked for.

    asked: false where it was not opened at all.
    """

    asked: bool = True
    problem: str = ""
    fix: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    persistent: bool = False
    shared: bool = False
    medium: str = ""
    lookup_ms: float | None = None
    write_ms: float | None = None
    read_ms: float | None = None
    stats: dict[str, int | float | str] = field(default_factory=dict)


def has_server(chosen: TierConfig) -> bool:
    """Whether a tier is somewhere else than in this machine's memory or in a directory, which opening it might make."""
    return chosen.type not in ("local", "memory", "shared_fs") and "path" not in chosen.options


def probe(file: Path, tier: int) -> list[Finding]:
    """Whether the server of a configuration's tier answers; nothing where the configuration is wrong."""
    try:
        config = Config.load(file)
    except ConfigError:
        return []
    name, found = f"{config.tiers[tier].label}: server", ping(config, tier, write=False)
    if found.problem:
        return [error(name, found.problem, found.fix)]
    by = ", ".join(f"{what} {version}" for what, version in found.versions.items())
    return [ok(name, f"answers, a lookup in {found.lookup_ms} ms" + (f" ({by})" if by else ""))]


def ping(config: Config, tier: int, write: bool) -> Ping:
    """Open this tier and ask it for a page that nobody stored; write: store one, read it back and remove it."""
    logging.disable(logging.CRITICAL)  # what a backend has to say is said by its outcome here
    chosen, options = config.backend(tier)
    dispatcher = Dispatcher()
    try:
        backend = chosen(options, dispatcher)
    except Exception as error:
        text, _, fix = str(error).partition(". Fix: ")
        return Ping(problem=text or type(error).__name__, fix=fix or "look whether its server or disk answers")
    try:
        return _ask(backend, write)
    finally:
        backend.close()
        dispatcher.close()


def told(capabilities: Capabilities) -> Ping:
    """What is known of a tier that is not asked."""
    return Ping(persistent=capabilities.persistent, shared=capabilities.shared, medium=capabilities.medium)


def _ask(backend: Backend, write: bool) -> Ping:
    ping = told(backend.capabilities)
    space = Namespace("hicache-ext config check", "", PageLayout("check", "flat", "uint8", 1, (64 << 10,)))
    key = os.urandom(KEY_BYTES)
    since = time.monotonic()
    found = backend.lookup(KeyBatch(space, key))
    ping.lookup_ms = _ms(since)
    if found.any():
        ping.problem, ping.fix = "says that it has a page that nobody stored", "report this"
    if write and not ping.problem:
        _round_trip(backend, space, key, ping)
    ping.versions = dict(backend.versions())
    ping.stats = dict(backend.stats())
    state = str(ping.stats.get("state", "ok"))
    if not ping.problem and state not in ("ok", "disk full"):
        ping.problem, ping.fix = state, "look whether its server or disk answers"
    return ping


def _round_trip(backend: Backend, space: Namespace, key: bytes, ping: Ping) -> None:
    size = space.layout.payload_bytes
    memory = OwnedMemory(size)
    page = np.frombuffer(memory.view, np.uint8)
    page[:] = np.frombuffer(os.urandom(size), np.uint8)
    before = page.copy()
    batch = PageBatch(
        space, key, None, np.array([memory.address], np.uint64), np.array([size], np.uint64),
        np.array([0, 1], np.int64), memory,
    )  # fmt: skip
    since = time.monotonic()
    stored = backend.write(batch).result()[0]
    ping.write_ms = _ms(since)
    page[:] = 0
    since = time.monotonic()
    read = backend.read(batch).result()[0] if stored == Outcome.HIT else stored
    ping.read_ms = _ms(since)
    backend.remove(KeyBatch(space, key))
    if stored != Outcome.HIT:
        ping.problem, ping.fix = f"a write ended as {stored.name}", "look at its room, rights and health in `stats`"
    elif read != Outcome.HIT:
        ping.problem, ping.fix = f"the page came back as {read.name}", "look at its health in `stats`"
    elif not np.array_equal(page, before):
        ping.problem, ping.fix = "gave back other bytes than were stored", "report this"


def _ms(since: float) -> float:
    return round((time.monotonic() - since) * 1e3, 3)

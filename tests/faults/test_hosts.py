"""Two hosts with a disk of their own each, and a store that they share: one writes, the other reads, and hosts die.

Hosts are network namespaces. Nothing that is read is wrong, nothing hangs, and what was there comes back by itself.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from storage_backends import registry
from tests.mooncake_server import MooncakeServer, installed
from tests.netns import Host, Network
from tests.store_worker import StoreWorker

pytestmark = pytest.mark.slow

PAGES = 48
TIMEOUT = 1.0
#: What a read may take while its server is gone: a lookup and a read that wait for it, and room for a busy machine.
BOUND = 30.0


class Site:
    """Three hosts: two that serve, and one with the store that they share."""

    def __init__(self, stack: ExitStack, folder: Path, kind: str) -> None:
        if kind not in registry.names():
            pytest.skip(f"there is no backend {kind} here")
        self.kind, self._folder = kind, folder
        self.network = stack.enter_context(Network(3))
        self.writer_host, self.reader_host, self.store_host = self.network.hosts
        if kind == "redis":
            self.start_redis()
        elif kind == "mooncake":
            installed()
            self.mooncake = MooncakeServer(self.store_host, 256 << 20, client_ttl=5)

    def start_redis(self) -> None:
        pytest.importorskip("redis")
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            pytest.skip("no redis-server here (apt-get install redis-server)")
        self.store_host.popen(
            binary, "--port", "6379", "--bind", self.store_host.address, "--protected-mode", "no", "--save", "",
            "--appendonly", "no", "--dir", str(self._folder), stdout=-3, stderr=-3,
        )  # fmt: skip
        until = time.monotonic() + 20
        while True:
            try:
                with self.reader_host.inside():
                    socket.create_connection((self.store_host.address, 6379), 1).close()
                return
            except OSError:
                assert time.monotonic() < until, "redis-server did not start"
                time.sleep(0.05)

    def worker(self, host: Host, name: str, disk: bool = True) -> StoreWorker:
        shared: dict[str, Any]
        if self.kind == "redis":
            shared = {"url": f"redis://{self.store_host.address}:6379", "timeout": TIMEOUT, "connect_timeout": TIMEOUT}
        elif self.kind == "mooncake":
            shared = self.mooncake.options(timeout=5)
        else:
            shared = {"path": str(self._folder / "share"), "linger": 0.2, "refresh": 0.2, "timeout": 10}
        first = {"type": "local", "path": str(self._folder / name / "disk"), "capacity": "64MiB"}
        tiers = [{"type": self.kind, **shared}]
        return StoreWorker(host, self._folder / name, [first, *tiers] if disk else tiers)


@pytest.fixture(params=["redis", "mooncake", "shared_fs"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, tmp_path, request.param)


@pytest.fixture
def redis_site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, tmp_path, "redis")


def all_of_it(reader: StoreWorker, name: str, seconds: float = 60, pages: int = PAGES) -> None:
    """The reader gets the whole prefix, and nothing wrong on the way to that."""
    until = time.monotonic() + seconds
    while (got := reader.ask("read", chain=name, pages=pages))["good"] < pages:
        assert got["wrong"] == 0
        assert time.monotonic() < until, (got, reader.ask("stats"))
        time.sleep(0.1)
    assert got["wrong"] == 0


def test_what_one_host_writes_another_reads(site: Site) -> None:
    writer, reader = site.worker(site.writer_host, "writer"), site.worker(site.reader_host, "reader")
    assert reader.ask("read", chain="a", pages=PAGES)["found"] == 0
    assert writer.ask("write", chain="a", pages=PAGES) == PAGES
    assert writer.ask("settle", seconds=30)
    all_of_it(reader, "a")
    assert reader.ask("settle", seconds=30), "promoted"
    before = reader.ask("stats")[site.kind]["read_hit"]
    assert reader.ask("read", chain="a", pages=PAGES)["good"] == PAGES
    stats = reader.ask("stats")
    assert stats[site.kind]["read_hit"] == before, "from its own disk now"
    assert stats["local"]["read_hit"] >= PAGES


def test_the_writing_host_loses_its_power_in_the_middle(site: Site) -> None:
    writer, reader = site.worker(site.writer_host, "writer"), site.worker(site.reader_host, "reader")
    writer.tell("write_forever", chain="w", pages=PAGES)
    done = [writer.answer() for _ in range(3)]
    kept = None
    if site.kind == "shared_fs":  # what is in a segment that nobody has closed yet goes with its writer
        all_of_it(reader, done[0])
        kept = 1
    site.network.vanish(site.writer_host)
    while (name := writer.answer()) is not None:
        done.append(name)
    for turn in range(len(done) + 2):
        got = reader.ask("read", chain=f"w/{turn}", pages=PAGES)
        assert got["wrong"] == 0
        assert got["seconds"] < BOUND
    for name in done[:kept]:
        all_of_it(reader, name)
    assert reader.ask("write", chain="mine", pages=PAGES) == PAGES


def test_a_reading_host_that_dies_costs_the_writer_nothing(site: Site) -> None:
    writer, reader = site.worker(site.writer_host, "writer"), site.worker(site.reader_host, "reader", disk=False)
    assert writer.ask("write", chain="a", pages=PAGES) == PAGES
    assert writer.ask("settle", seconds=30)
    all_of_it(reader, "a")
    reader.tell("read", chain="a", pages=PAGES)
    site.network.vanish(site.reader_host)
    assert writer.ask("write", chain="b", pages=PAGES) == PAGES
    assert writer.ask("settle", seconds=30)
    assert writer.ask("read", chain="a", pages=PAGES)["good"] == PAGES


def test_the_stores_host_is_unplugged_and_comes_back(redis_site: Site) -> None:
    site = redis_site
    writer, reader = site.worker(site.writer_host, "writer"), site.worker(site.reader_host, "reader")
    assert writer.ask("write", chain="a", pages=PAGES) == PAGES
    assert writer.ask("settle", seconds=30)
    all_of_it(reader, "a")
    assert reader.ask("settle", seconds=30)
    site.network.unplug(site.store_host)
    got = reader.ask("read", chain="other", pages=PAGES)
    assert (got["found"], got["wrong"]) == (0, 0)
    assert got["seconds"] < BOUND
    got = reader.ask("read", chain="a", pages=PAGES)
    assert (got["good"], got["wrong"]) == (PAGES, 0), "its own disk has all of it"
    assert writer.ask("write", chain="b", pages=PAGES) == PAGES, "nobody waits for the store"
    site.network.plug(site.store_host)
    until = time.monotonic() + 90
    while True:
        writer.ask("write", chain="c", pages=PAGES)
        writer.ask("settle", seconds=30)
        if (got := reader.ask("read", chain="c", pages=PAGES))["good"] == PAGES:
            break
        assert got["wrong"] == 0
        assert time.monotonic() < until, (writer.ask("stats"), reader.ask("stats"))
        time.sleep(0.2)


def test_the_stores_host_dies_and_another_comes_up_empty(redis_site: Site) -> None:
    site = redis_site
    writer, reader = site.worker(site.writer_host, "writer"), site.worker(site.reader_host, "reader", disk=False)
    writer.tell("write_forever", chain="w", pages=PAGES)
    assert writer.answer() == "w/0"
    all_of_it(reader, "w/0")
    site.store_host.kill()
    got = reader.ask("read", chain="w/0", pages=PAGES)
    assert (got["good"], got["wrong"]) == (0, 0)
    assert got["seconds"] < BOUND
    site.start_redis()
    until = time.monotonic() + 90
    while True:
        name = writer.answer()
        assert name is not None, "the writer died"
        if (got := reader.ask("read", chain=name, pages=PAGES))["good"] == PAGES:
            break
        assert got["wrong"] == 0
        assert time.monotonic() < until


def test_a_slow_link(redis_site: Site) -> None:
    site = redis_site
    writer, reader = site.worker(site.writer_host, "writer"), site.worker(site.reader_host, "reader", disk=False)
    assert writer.ask("write", chain="a", pages=PAGES) == PAGES
    assert writer.ask("settle", seconds=30)
    all_of_it(reader, "a")
    site.store_host.slow("eth0", "1mbit")
    got = reader.ask("read", chain="a", pages=PAGES)
    assert got["wrong"] == 0
    assert got["good"] < PAGES, "a page takes half a second, a group of them four"
    site.store_host.slow("eth0", "")
    all_of_it(reader, "a")

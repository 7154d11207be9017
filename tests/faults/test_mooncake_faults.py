"""A Mooncake store that dies, lies, crawls or is not there: no exception, no wrong byte, and it comes back by itself.

The tier runs on the first host, beside the master; the store's memory is on the second, which can be slow or gone.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from hicache_ext.config import Config
from hicache_ext.store import TieredStore
from storage_backends.base import Backend, Dispatcher, Outcome
from storage_backends.buffers import OwnedMemory
from tests import pages
from tests.mooncake_server import MooncakeServer, installed
from tests.netns import Network
from tests.pages import HostPool, chain, content, key_batch, namespace
from tests.remote import Asking
from tests.tier_worker import TierWorker

SPACE = namespace((65536, 65536))
PAGE = SPACE.layout.payload_bytes
KEYS = chain("a", 32)
HITS = [Outcome.HIT] * len(KEYS)

Open = Callable[..., Backend]

asking = Asking(SPACE, KEYS, seconds=90, recovery=60, pause=0.1)
store, served, recovers = asking.store, asking.served, asking.recovers


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    installed()
    with ExitStack() as all_of_it:
        yield all_of_it


@pytest.fixture
def network(stack: ExitStack) -> Network:
    found = stack.enter_context(Network(2))
    stack.enter_context(found.hosts[0].inside())
    return found


@pytest.fixture
def server(network: Network) -> MooncakeServer:
    return MooncakeServer(network.hosts[0], 128 << 20, holder=network.hosts[1], client_ttl=5)


@pytest.fixture
def tier(stack: ExitStack, network: Network) -> Open:
    from storage_backends.mooncake import MooncakeBackend

    dispatcher = Dispatcher()
    stack.callback(dispatcher.close)

    def open_one(server: MooncakeServer | None = None, **options: Any) -> Backend:
        values = {"timeout": 20, "buffer": 16 << 20, "direct": True, **options}
        if server is not None:
            values["master"] = server.master
        backend = MooncakeBackend(MooncakeBackend.Options.model_validate(values), dispatcher)
        stack.callback(backend.close)
        return backend

    return open_one


def shared_pool(backend: Backend, count: int = len(KEYS)) -> HostPool:
    """A host pool that the tier moves pages from and to without a copy."""
    pool = HostPool(SPACE, count)
    pool.memory = OwnedMemory(pool.memory.size, shared=True)
    pool.bytes = np.frombuffer(pool.memory.view, np.uint8)
    backend.register_memory(pool.memory.address, pool.memory.size)
    return pool


def name_of(backend: Backend, key: bytes) -> str:
    return f"hicache:1:{SPACE.digest.hex()}:{key.hex()}"


def process_of(backend: Backend) -> int:
    """The id of Mooncake's process."""
    (pid,) = backend.processes()
    return pid


# ---- masters that go away


def test_no_master_at_the_start_stops_nothing(tier: Open, network: Network) -> None:
    backend = tier(master=f"{network.hosts[0].address}:5100", timeout=3)
    assert set(store(backend)) == {Outcome.FAILED}
    assert set(served(backend)) == {Outcome.FAILED}
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    assert backend.remove(key_batch(SPACE, KEYS)) == 0
    backend.clear([SPACE])
    assert "refused" in str(backend.stats()["state"])
    MooncakeServer(network.hosts[0], 64 << 20)
    recovers(backend)


@pytest.mark.parametrize("what", ["nothing listens", "no mooncake", "silent"])
def test_a_wrong_address_costs_misses_and_no_time(tier: Open, stack: ExitStack, network: Network, what: str) -> None:
    address, port = network.hosts[0].address, 5200
    if what != "nothing listens":
        listener = stack.enter_context(socket.create_server((address, port)))

        def babble() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                if what == "no mooncake":
                    client.sendall(b"HTTP/1.1 400 no\r\n\r\n")
                    client.close()

        threading.Thread(target=babble, daemon=True).start()
    backend = tier(master=f"{address}:{port}", timeout=1)
    assert set(store(backend)) == {Outcome.FAILED}
    assert set(served(backend)) == {Outcome.FAILED}
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 8


def test_master_killed_in_the_middle_and_started_empty(tier: Open, server: MooncakeServer) -> None:
    backend = tier(server, timeout=4)
    assert store(backend) == HITS
    killer = threading.Timer(0.2, server.kill)
    killer.start()
    while Outcome.FAILED not in (outcomes := served(backend)):
        # On a busy machine a lease runs out on the way, and the end of the master shows as silence.
        assert set(outcomes) <= {Outcome.HIT, Outcome.MISS, Outcome.TIMEOUT}
    killer.join()
    assert set(store(backend, chain("other", 8))) == {Outcome.FAILED}
    server.start()
    seen: set[Outcome] = set()
    deadline = time.monotonic() + 60
    while Outcome.MISS not in seen and time.monotonic() < deadline:
        seen |= set(served(backend))
        time.sleep(0.1)
    assert Outcome.MISS in seen, "an empty master has misses, not failures"
    recovers(backend)


def test_master_killed_in_the_middle_of_writes(tier: Open, server: MooncakeServer) -> None:
    backend = tier(server, timeout=4)
    store(backend, KEYS[:1])
    pools = [HostPool(SPACE, 128) for _ in range(4)]
    writing = [backend.write(pool.write_batch(chain(f"w{i}", 128))) for i, pool in enumerate(pools)]
    time.sleep(0.02)
    server.kill()
    outcomes = [outcome for one in writing for outcome in one.result(60)]
    assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED, Outcome.TIMEOUT}
    assert outcomes.count(Outcome.HIT) < len(outcomes)
    server.start()
    recovers(backend)


# ---- stores that lie


def test_what_lies_there_is_wrong(tier: Open, server: MooncakeServer) -> None:
    """A flipped bit, another page, one that is cut, one that is longer, and something else altogether."""
    backend = tier(server)
    with server.tool() as tool:
        for pool in (None, shared_pool(backend)):
            assert store(backend) == HITS
            names = [name_of(backend, key) for key in KEYS]
            whole = tool.get(names[0])
            tool.put(names[0], whole[:-1] + bytes([whole[-1] ^ 1]))
            tool.put(names[5], tool.get(names[6]))
            tool.put(names[10], whole[: PAGE // 2])
            tool.put(names[15], whole + b"more")
            tool.put(names[20], b"other data under our key")
            outcomes = pages.served(backend, SPACE, KEYS, 60, pool)
            hurt = {0, 5, 10, 15, 20}
            assert {page for page, outcome in enumerate(outcomes) if outcome == Outcome.CORRUPT} == hurt
            assert outcomes.count(Outcome.HIT) == len(KEYS) - len(hurt)
            found = backend.lookup(key_batch(SPACE, KEYS))
            assert set(np.flatnonzero(found == 0)) == hurt
            recovers(backend)
    assert backend.stats()["direct"]
    assert backend.stats()["copied"]
    assert backend.stats()["corrupt"] == 10


def test_sealed_pages_are_hidden_and_a_wrong_key_is_told(
    tier: Open, server: MooncakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("ONE", "11" * 32)
    monkeypatch.setenv("TWO", "22" * 32)
    one = tier(server, seal_key_env="ONE")
    pool = shared_pool(one)
    assert one.write(pool.write_batch(KEYS)).result(60) == HITS
    assert all(pool.right(page, key) for page, key in enumerate(KEYS)), "the pages themselves are not sealed"
    with server.tool() as tool:
        assert content(SPACE, KEYS[0]).tobytes()[:64] not in tool.get(name_of(one, KEYS[0]))
    assert pages.served(one, SPACE, KEYS, 60, pool) == HITS
    assert set(served(tier(server, seal_key_env="TWO"))) == {Outcome.CORRUPT}
    recovers(one)


def test_a_lease_that_runs_out_on_the_way_is_a_miss(tier: Open, network: Network) -> None:
    server = MooncakeServer(network.hosts[0], 64 << 20, lease_ms=50, holder=network.hosts[1])
    backend = tier(server, connections=1)
    keys = KEYS[:8]
    assert store(backend, keys) == HITS[:8]
    network.hosts[1].slow("eth0", "40mbit")
    assert set(served(backend, keys)) == {Outcome.MISS}
    network.hosts[1].slow("eth0", "")
    assert served(backend, keys) == HITS[:8], "they are still there"
    assert backend.stats()["corrupt"] == 0


# ---- machines and processes that do not answer


@pytest.mark.parametrize("what", ["slow", "unplugged", "stopped"])
def test_what_does_not_arrive_in_time(tier: Open, server: MooncakeServer, network: Network, what: str) -> None:
    """Into memory that Mooncake's process writes itself: nothing may land there when the outcome is known."""
    backend = tier(server, timeout=1)
    far = network.hosts[1]
    pool = shared_pool(backend)
    recovers(backend)
    assert server.memory is not None
    match what:
        case "slow":
            far.slow("eth0", "8mbit")
        case "unplugged":
            network.unplug(far)
        case "stopped":
            server.memory.send_signal(signal.SIGSTOP)
            for pid in far._pids():
                os.kill(pid, signal.SIGSTOP)
    pool.poison()
    began = time.monotonic()
    outcomes = backend.read(pool.batch(KEYS)).result(30)
    assert time.monotonic() - began < 15
    pool.bytes[:] = 0x77  # the pages are somebody else's now
    assert Outcome.HIT not in outcomes
    assert set(outcomes) <= {Outcome.TIMEOUT, Outcome.FAILED, Outcome.MISS}
    assert Outcome.TIMEOUT in outcomes
    assert Outcome.HIT not in store(backend, chain("other", 8))
    match what:
        case "slow":
            far.slow("eth0", "")
        case "unplugged":
            network.plug(far)
        case "stopped":
            for pid in far._pids():
                os.kill(pid, signal.SIGCONT)
    recovers(backend)
    assert (pool.bytes == 0x77).all(), "a late byte landed in memory that was given back"
    assert int(backend.stats()["starts"]) > 1


def test_close_while_nobody_answers(tier: Open, server: MooncakeServer, network: Network) -> None:
    backend = tier(server, timeout=60)
    assert store(backend) == HITS
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    network.unplug(network.hosts[1])
    reading = backend.read(HostPool(SPACE, len(KEYS)).batch(KEYS))
    ticks: list[float] = []
    backend.dispatcher.post(lambda: ticks.append(time.monotonic()))
    time.sleep(0.3)
    assert ticks, "the dispatcher waits for nobody"
    assert backend.lookup_local(key_batch(SPACE, KEYS)).all()
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 8
    assert set(reading.result(1)) <= {Outcome.FAILED, Outcome.TIMEOUT}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_mooncakes_process_dies(
    tier: Open, server: MooncakeServer, capfd: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    backend = tier(server)
    recovers(backend)
    killer = threading.Timer(0.1, os.kill, (process_of(backend), how))
    killer.start()
    while Outcome.FAILED not in (outcomes := served(backend)):
        assert set(outcomes) <= {Outcome.HIT, Outcome.MISS}, "a miss: a lease that ran out on the way"
    assert set(outcomes) <= {Outcome.HIT, Outcome.MISS, Outcome.FAILED}
    killer.join()
    recovers(backend)
    assert capfd.readouterr().err == "", "what Mooncake says is not said among ours"


def test_mooncakes_process_ends_with_ours(network: Network, server: MooncakeServer) -> None:
    host = network.hosts[0]
    worker = TierWorker(host, "storage_backends.mooncake:MooncakeBackend", server.options(segment=64 << 20))
    assert set(worker.ask("store", name="a", pages=8)) == {1}
    before = {pid for pid in host._pids() if _runs_mooncake(pid)}
    assert len(before) == 2
    worker.process.kill()
    until = time.monotonic() + 20
    while any(_runs_mooncake(pid) for pid in before):
        assert time.monotonic() < until, "left behind"
        time.sleep(0.1)


def _runs_mooncake(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as words:
            return b"mooncake/process.py" in words.read()
    except OSError:
        return False


def test_what_the_store_copies_is_not_copied_once_more(network: Network, server: MooncakeServer) -> None:
    """Background writes, and reads with a deadline: Mooncake's process uses the store's own memory as it is."""
    tiers = [{"type": "memory", "capacity": "64MiB"}, {"type": "mooncake", **server.options(direct=True, timeout=20)}]
    store = TieredStore.open(Config.load({"tiers": tiers}))

    def ways() -> tuple[Any, Any]:
        stats = store.stats()["mooncake"]
        return stats["direct"], stats["copied"]

    def write(name: str) -> None:
        keys = chain(name, len(KEYS))
        assert store.write(HostPool(SPACE, len(keys)).write_batch(keys)).result(60) == HITS
        assert store.settled(60)

    def until_nothing_is_copied(work: Callable[[str], None]) -> None:
        """New memory is made known in the background, so not at once."""
        deadline, turn, before = time.monotonic() + 60, 0, (0, -1)
        while before[1] != ways()[1]:
            assert time.monotonic() < deadline, store.stats()
            before, turn = ways(), turn + 1
            work(str(turn))
            assert sum(ways()) == sum(before) + len(KEYS)

    def read(_: str) -> None:
        store.tiers[0].backend.clear([SPACE])
        pool = HostPool(SPACE, len(KEYS))
        pool.poison()
        assert store.read(pool.batch(chain("1", len(KEYS))), time.monotonic() + 60).result(60) == HITS
        assert all(pool.right(page, key) for page, key in enumerate(chain("1", len(KEYS))))
        assert store.settled(60)

    until_nothing_is_copied(write)
    until_nothing_is_copied(read)
    store.close()


# ---- room


def test_a_store_that_is_full_rejects_and_serves_what_it_has(tier: Open, network: Network) -> None:
    server = MooncakeServer(network.hosts[0], 16 << 20, lease_ms=60_000)
    backend = tier(server)
    keys = chain("big", 160)
    outcomes: list[Outcome] = []
    for first in range(0, 160, 16):
        some = keys[first : first + 16]
        outcomes += store(backend, some)
        served(backend, some)  # they are leased now
    assert set(outcomes) == {Outcome.HIT, Outcome.REJECTED}
    assert backend.stats()["rejected"] == outcomes.count(Outcome.REJECTED)
    kept = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == Outcome.HIT]
    assert set(served(backend, kept)) <= {Outcome.HIT, Outcome.MISS}


def test_a_page_for_which_the_buffer_is_too_small(tier: Open, server: MooncakeServer) -> None:
    large = namespace((3 << 20, 3 << 20))
    backend = tier(server, buffer=8 << 20, connections=4)
    pool = HostPool(large, 2)
    assert set(backend.write(pool.write_batch(KEYS[:2])).result(30)) == {Outcome.REJECTED}
    assert store(backend) == HITS, "others are none the worse for it"


def test_our_own_segment_is_lost(tier: Open, network: Network, server: MooncakeServer) -> None:
    assert server.memory is not None
    network.hosts[1].kill()
    backend: Any = tier(server, segment=64 << 20, timeout=4)
    recovers(backend)
    backend._holder.process().kill()
    outcomes = served(backend)
    assert set(outcomes) <= {Outcome.FAILED, Outcome.TIMEOUT, Outcome.MISS}
    recovers(backend)


# ---- two hosts


def test_a_reader_on_another_host_and_the_writers_host_dies() -> None:
    """The writer gives the store its memory and is gone in the middle, without a word: no wrong byte, no hang."""
    installed()
    with Network(3) as network:
        near, writer_host, reader_host = network.hosts
        server = MooncakeServer(near, 0, client_ttl=5)
        options = {**server.options(), "timeout": 2}
        kind = "storage_backends.mooncake:MooncakeBackend"
        writer = TierWorker(writer_host, kind, {**options, "segment": 128 << 20})
        reader = TierWorker(reader_host, kind, options)
        deadline = time.monotonic() + 60
        while set(writer.ask("store", name="a", pages=32)) != {1}:
            assert time.monotonic() < deadline, writer.ask("stats")
            time.sleep(0.2)
        assert set(reader.ask("served", name="a", pages=32)) == {1}
        writer.ask("write_forever", name="more", pages=8)
        reader.tell("served", name="a", pages=32)
        network.vanish(writer_host)
        misses = {Outcome.MISS, Outcome.FAILED, Outcome.TIMEOUT}
        assert set(reader.answer()) <= {Outcome.HIT, *misses}
        deadline = time.monotonic() + 60
        while set(outcomes := reader.ask("served", name="a", pages=32)) != {Outcome.MISS}:
            assert set(outcomes) <= misses
            assert time.monotonic() < deadline, reader.ask("stats")
        network.plug(writer_host)
        heir = TierWorker(writer_host, kind, {**options, "segment": 128 << 20})
        while set(heir.ask("store", name="b", pages=32)) != {1}:
            assert time.monotonic() < deadline, heir.ask("stats")
            time.sleep(0.2)
        while set(reader.ask("served", name="b", pages=32)) != {1}:
            assert time.monotonic() < deadline, reader.ask("stats")
            time.sleep(0.2)

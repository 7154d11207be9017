"""A Redis server that dies, lies, crawls or is not there: no exception, no wrong byte, and it comes back by itself."""

from __future__ import annotations

import logging
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hicache_ext.cli.serving import free_port
from storage_backends.base import Backend, Dispatcher, Outcome
from tests.certificates import Certificate, certificate
from tests.pages import HostPool, chain, content, key_batch, namespace
from tests.proxy import Proxy
from tests.redis_server import RedisServer
from tests.remote import Asking

pytest.importorskip("redis")

SPACE = namespace((65536, 65536))
PAGE = SPACE.layout.payload_bytes
KEYS = chain("a", 32)
HITS = [Outcome.HIT] * len(KEYS)

Open = Callable[..., Backend]

asking = Asking(SPACE, KEYS, seconds=60, recovery=20)
store, served, recovers = asking.store, asking.served, asking.recovers


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as all_of_it:
        yield all_of_it


@pytest.fixture
def server(stack: ExitStack) -> RedisServer:
    return stack.enter_context(RedisServer())


@pytest.fixture
def proxy(stack: ExitStack, server: RedisServer) -> Proxy:
    return stack.enter_context(Proxy(server.port))


@pytest.fixture
def tier(stack: ExitStack) -> Open:
    from storage_backends.redis import RedisBackend

    dispatcher = Dispatcher()
    stack.callback(dispatcher.close)

    def open_one(port: int = 0, **options: Any) -> Backend:
        values = {"url": f"redis://127.0.0.1:{port}", "timeout": 5, **options}
        backend = RedisBackend(RedisBackend.Options.model_validate(values), dispatcher)
        stack.callback(backend.close)
        return backend

    return open_one


# ---- servers that go away


def test_no_server_at_the_start_stops_nothing(tier: Open, stack: ExitStack) -> None:
    port = free_port()
    backend = tier(port)
    assert set(store(backend)) == {Outcome.FAILED}
    assert set(served(backend)) == {Outcome.FAILED}
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    assert backend.remove(key_batch(SPACE, KEYS)) == 0
    backend.clear([SPACE])
    assert "refused" in str(backend.stats()["state"])
    stack.enter_context(RedisServer(port=port))
    recovers(backend)


def test_cut_in_the_middle_of_a_value(tier: Open, server: RedisServer, proxy: Proxy) -> None:
    backend = tier(proxy.port, connections=2)
    assert store(backend) == HITS
    for after in (0, 3, 100, 700, PAGE // 2, PAGE + 400, 3 * PAGE):
        proxy.cut_after = after
        outcomes = served(backend)
        assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED}
        proxy.cut_after = -1
        recovers(backend)


def test_killed_in_the_middle_of_reads_and_started_empty(tier: Open, server: RedisServer) -> None:
    backend = tier(server.port)
    assert store(backend) == HITS
    killer = threading.Timer(0.2, server.kill)
    killer.start()
    while Outcome.FAILED not in (outcomes := served(backend)):
        assert outcomes == HITS
    killer.join()
    assert Outcome.HIT not in served(backend)
    server.start()
    deadline = time.monotonic() + 20
    while Outcome.MISS not in (outcomes := served(backend)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Outcome.MISS in outcomes, "an empty server has misses, not failures"
    recovers(backend)


def test_killed_in_the_middle_of_writes(tier: Open, server: RedisServer) -> None:
    backend = tier(server.port)
    outcomes: list[Outcome] = []
    pools = [HostPool(SPACE, 128) for _ in range(4)]
    batches = [pool.write_batch(chain(f"w{i}", 128)) for i, pool in enumerate(pools)]
    writing = [backend.write(batch) for batch in batches]
    time.sleep(0.02)
    server.kill()
    for one in writing:
        outcomes += one.result(30)
    assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED}
    assert Outcome.FAILED in outcomes
    server.start()
    recovers(backend)


def test_connections_that_died_unused_cost_nothing(tier: Open, server: RedisServer, proxy: Proxy) -> None:
    backend = tier(proxy.port)
    assert store(backend) == HITS
    proxy.cut()
    assert served(backend) == HITS
    proxy.cut()
    assert store(backend, chain("b", 32)) == HITS


def test_a_server_that_comes_and_goes_is_said_once(
    tier: Open, server: RedisServer, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    backend = tier(proxy.port)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            recovers(backend)
            proxy.cut_after = 0
            served(backend)
            proxy.cut_after = -1
    assert 1 <= sum("is away" in record.message for record in caplog.records) <= 2
    assert int(backend.stats()["errors"]) >= 4


# ---- servers that lie


def damage(server: RedisServer, keys: list[bytes], seed: int) -> set[bytes]:
    """Make a tenth of what lies there wrong, in every way we know; which keys are harmed."""
    chance, client, hurt = random.Random(seed), server.client(), set()
    names = {key: next(iter(client.scan_iter(match=f"*:{key.hex()}", count=10_000))) for key in keys}
    for key in chance.sample(keys, max(5, len(keys) // 10)):
        name, other = names[key], names[chance.choice([one for one in keys if one != key])]
        data = client.get(name)
        match len(hurt) % 5:
            case 0:
                at = chance.randrange(len(data))
                client.set(name, data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
            case 1:
                client.set(name, client.get(other))
                if client.get(name) == data:
                    continue
            case 2:
                client.set(name, data[: chance.randrange(1, len(data))])
            case 3:
                client.set(name, data + b"more")
            case 4:
                client.set(name, b"other data under our key")
        hurt.add(key)
    return hurt


def test_a_tenth_of_all_answers_is_wrong(tier: Open, server: RedisServer) -> None:
    backend = tier(server.port)
    keys = chain("a", 100)
    for turn in range(5):
        assert store(backend, keys) == [Outcome.HIT] * 100
        hurt = damage(server, keys, turn)
        outcomes = served(backend, keys)
        assert {key for key, outcome in zip(keys, outcomes, strict=True) if outcome == Outcome.CORRUPT} == hurt
        assert outcomes.count(Outcome.HIT) == 100 - len(hurt)
        found = backend.lookup(key_batch(SPACE, keys))
        assert {key for key, there in zip(keys, found, strict=True) if not there} == hurt
    assert backend.stats()["corrupt"] >= 25


def test_restarted_with_other_data_under_our_keys(tier: Open, server: RedisServer) -> None:
    """As from an old snapshot, or after somebody else's use: every name is there, with another's value."""
    backend = tier(server.port)
    assert store(backend) == HITS
    client = server.client()
    names = sorted(client.scan_iter(count=1000))
    values = [client.get(name) for name in names]
    server.kill()
    server.start()
    for at, name in enumerate(names):
        server.client().set(name, values[at - 1])
    assert store(backend) == HITS, "what is there and whole by its size is not sent again"
    assert served(backend) == [Outcome.CORRUPT] * len(KEYS)
    assert server.client().dbsize() == 0, "and is off the store"
    recovers(backend)


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_that_are_an_hour_apart(
    tier: Open, server: RedisServer, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that one host decides hangs on another's time: a page's age is the server's business."""
    one, other = tier(server.port, ttl=600), tier(server.port, ttl=600)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + hours * 3600 * 10**9)
    assert store(one) == HITS
    monkeypatch.setattr(time, "time_ns", now)
    assert served(other) == HITS
    assert other.lookup(key_batch(SPACE, KEYS)).all()
    client = server.client()
    assert all(590 < client.ttl(name) <= 600 for name in client.scan_iter())
    assert store(other) == HITS
    assert other.stats()["present"] == len(KEYS)


def test_a_longer_value_overruns_nothing(tier: Open, server: RedisServer) -> None:
    backend = tier(server.port)
    assert store(backend, KEYS[:3]) == HITS[:3]
    client = server.client()
    name = next(iter(client.scan_iter(match=f"*:{KEYS[1].hex()}")))
    client.set(name, b"\x55" * (4 * PAGE))
    pool = HostPool(SPACE, 8)
    pool.poison()
    assert backend.read(pool.batch(KEYS[:3], [2, 4, 6])).result(10) == [Outcome.HIT, Outcome.CORRUPT, Outcome.HIT]
    assert all((pool.get(page) == 0xEE).all() for page in (0, 1, 3, 5, 7))


def test_flipped_on_the_way(tier: Open, server: RedisServer, proxy: Proxy) -> None:
    """Also lengths, signs and line ends are flipped here: whatever the protocol makes of it, no page is wrong."""
    backend = tier(proxy.port, timeout=1)
    assert store(backend) == HITS
    proxy.flip = 0.02
    seen: set[Outcome] = set()
    for _ in range(25):
        seen |= set(served(backend))
        store(backend)
    proxy.flip = 0
    assert proxy.flipped > 20
    assert Outcome.CORRUPT in seen
    recovers(backend)


class Babbler:
    """A server that answers anything with these bytes."""

    def __init__(self, answer: bytes) -> None:
        import socket

        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answer = answer
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                client.recv(65536)
                client.sendall(self._answer)
                client.close()
            except OSError:
                if self._listener.fileno() == -1:
                    return

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize(
    "answer", [b"", b"+OK\r\n", b"$-2\r\n", b"$99999999999999\r\n", b"$x\r\n", b"HTTP/1.1 400 no\r\n\r\n", b"\0" * 9000]
)
def test_a_server_that_is_no_redis(tier: Open, stack: ExitStack, answer: bytes) -> None:
    other = Babbler(answer)
    stack.callback(other.close)
    backend = tier(other.port, timeout=1)
    assert Outcome.HIT not in store(backend, KEYS[:4])
    assert Outcome.HIT not in served(backend, KEYS[:4])


def test_a_sealed_tier_hides_its_pages_and_tells_a_wrong_key(
    tier: Open, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("ONE", "11" * 32)
    monkeypatch.setenv("TWO", "22" * 32)
    one, two = tier(server.port, seal_key_env="ONE"), tier(server.port, seal_key_env="TWO")
    assert store(one) == HITS
    client = server.client()
    assert all(content(SPACE, key).tobytes()[:64] not in b"".join(client.mget(client.keys("*"))) for key in KEYS[:4])
    hurt = damage(server, KEYS, 1)
    outcomes = served(one)
    assert {key for key, outcome in zip(KEYS, outcomes, strict=True) if outcome == Outcome.CORRUPT} == hurt
    recovers(one)
    assert set(served(two)) == {Outcome.CORRUPT}
    recovers(one)


# ---- servers that do not answer


@pytest.mark.parametrize("what", ["slow", "half-open", "stopped"])
def test_what_does_not_arrive_in_time(tier: Open, server: RedisServer, proxy: Proxy, what: str) -> None:
    backend = tier(proxy.port, timeout=0.3)
    assert store(backend) == HITS
    match what:
        case "slow":
            proxy.rate = PAGE / 2
        case "half-open":
            proxy.frozen = True
        case "stopped":
            server.stop_answering()
    pool = HostPool(SPACE, len(KEYS))
    pool.poison()
    outcomes = backend.read(pool.batch(KEYS)).result(30)
    assert Outcome.TIMEOUT in outcomes
    assert set(outcomes) <= {Outcome.TIMEOUT, Outcome.FAILED}
    pool.bytes[:] = 0x77  # the pages are somebody else's now
    writes = set(store(backend, chain("other", 8)))
    assert writes <= {Outcome.TIMEOUT, Outcome.FAILED}
    proxy.rate, proxy.frozen = 0, False
    server.answer_again()
    recovers(backend)
    assert (pool.bytes == 0x77).all(), "a late byte landed in memory that was given back"


@pytest.mark.parametrize("before", [1, len(KEYS)], ids=["greeting", "answer"])
def test_close_while_the_server_does_not_answer(tier: Open, server: RedisServer, before: int) -> None:
    """What is waited for is the greeting of a new connection, or the answer on one that was there."""
    backend = tier(server.port, timeout=60)
    assert store(backend, KEYS[:before]) == HITS[:before]
    server.stop_answering()
    reading = backend.read(HostPool(SPACE, len(KEYS)).batch(KEYS))
    time.sleep(0.1)
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 8
    assert set(reading.result(1)) <= {Outcome.FAILED, Outcome.TIMEOUT}


# ---- room


def test_a_server_that_is_full_rejects_and_takes_again(tier: Open, stack: ExitStack) -> None:
    server = stack.enter_context(RedisServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction"))
    backend = tier(server.port)
    keys = chain("big", 64)
    outcomes = store(backend, keys)
    assert set(outcomes) == {Outcome.HIT, Outcome.REJECTED}
    assert backend.stats()["rejected"] == outcomes.count(Outcome.REJECTED)
    kept = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == Outcome.HIT]
    assert served(backend, kept) == [Outcome.HIT] * len(kept)
    server.client().config_set("maxmemory", "64mb")
    assert store(backend, keys) == [Outcome.HIT] * 64


def test_what_the_server_evicted_is_a_miss(tier: Open, stack: ExitStack) -> None:
    server = stack.enter_context(RedisServer("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru"))
    backend = tier(server.port)
    keys = chain("big", 128)
    assert set(store(backend, keys)) <= {Outcome.HIT, Outcome.REJECTED}
    outcomes = served(backend, keys)
    assert set(outcomes) == {Outcome.HIT, Outcome.MISS}


def test_pages_expire_and_writing_them_again_keeps_them(tier: Open, server: RedisServer) -> None:
    backend = tier(server.port, ttl=100)
    assert store(backend, KEYS[:2]) == HITS[:2]
    client = server.client()
    names = list(client.scan_iter())
    assert all(90 < client.ttl(name) <= 100 for name in names)
    client.expire(names[0], 10)
    assert store(backend, KEYS[:2]) == HITS[:2]
    assert all(client.ttl(name) > 90 for name in names)
    assert backend.stats()["present"] == 2


# ---- pages that were just looked up


def asked(server: RedisServer, command: str) -> int:
    """How often the server was asked this, by anybody."""
    return int(server.client().info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_what_was_just_not_found_is_written_without_asking_again(tier: Open, server: RedisServer) -> None:
    backend = tier(server.port)
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    before = asked(server, "strlen")
    assert store(backend) == HITS
    assert asked(server, "strlen") == before
    assert served(backend) == HITS
    assert store(backend) == HITS, "now it is there, and asked for"
    assert asked(server, "strlen") == before + len(KEYS)
    assert (backend.stats()["stored"], backend.stats()["present"]) == (len(KEYS), len(KEYS))
    backend.remove(key_batch(SPACE, KEYS))
    assert Outcome.HIT not in served(backend)
    assert store(backend) == HITS
    assert served(backend) == HITS


def test_what_others_stored_after_a_lookup_is_the_same_page(tier: Open, server: RedisServer) -> None:
    one, other = tier(server.port), tier(server.port)
    assert not one.lookup(key_batch(SPACE, KEYS)).any()
    assert store(other) == HITS
    assert store(one) == HITS
    assert served(other) == served(one) == HITS
    hurt = damage(server, KEYS, 3)
    assert len(hurt) >= 4
    one.lookup(key_batch(SPACE, KEYS))
    found = served(one)
    assert {key for key, outcome in zip(KEYS, found, strict=True) if outcome == Outcome.CORRUPT} == hurt
    recovers(one)


# ---- who may come in


def _tls_arguments(tls: Certificate) -> list[str]:
    files = ["--tls-cert-file", str(tls.cert), "--tls-key-file", str(tls.key)]
    files += ["--tls-ca-cert-file", str(tls.authority)]
    return [*files, "--tls-auth-clients", "no"]


def test_tls_and_a_certificate_that_expired(tier: Open, stack: ExitStack, tmp_path: Path) -> None:
    tls = certificate(tmp_path, 30)
    server = stack.enter_context(RedisServer(*_tls_arguments(tls), tls=True))
    url = f"rediss://127.0.0.1:{server.port}"
    backend = tier(url=url, tls_ca=tls.authority)
    recovers(backend)
    stranger = tier(url=url)
    assert set(served(stranger)) == {Outcome.FAILED}, "a certificate that nobody vouches for"
    assert "certificate" in str(stranger.stats()["state"]).lower()
    certificate(tmp_path, -1)
    server.kill()
    server.start()
    expired = tier(url=url, tls_ca=tls.authority)
    assert set(served(expired)) == {Outcome.FAILED}
    assert "expired" in str(expired.stats()["state"])
    certificate(tmp_path, 30)
    server.kill()
    server.start()
    recovers(expired)


def test_tls_that_is_cut_slow_and_truncated(tier: Open, stack: ExitStack, tmp_path: Path) -> None:
    tls = certificate(tmp_path, 30)
    server = stack.enter_context(RedisServer(*_tls_arguments(tls), tls=True))
    proxy = stack.enter_context(Proxy(server.port))
    backend = tier(url=f"rediss://127.0.0.1:{proxy.port}", tls_ca=tls.authority, timeout=0.5)
    recovers(backend)
    proxy.cut_after = 3 * PAGE
    assert set(served(backend)) <= {Outcome.HIT, Outcome.FAILED}
    proxy.cut_after = -1
    recovers(backend)
    proxy.rate = PAGE / 2
    assert Outcome.TIMEOUT in served(backend)
    proxy.rate = 0
    recovers(backend)


def test_a_wrong_password_is_mended_on_the_server(
    tier: Open, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = stack.enter_context(RedisServer(password="right"))
    monkeypatch.setenv("CACHE_PASSWORD", "wrong-hunter2")
    backend = tier(server.port, password_env="CACHE_PASSWORD")
    assert set(store(backend)) == {Outcome.FAILED}
    without = tier(server.port)
    assert set(served(without)) == {Outcome.FAILED}
    server.client().config_set("requirepass", "wrong-hunter2")
    recovers(backend)


def test_a_user_of_an_acl_and_a_password_in_a_file(tier: Open, server: RedisServer, tmp_path: Path) -> None:
    rules = ["+get", "+set", "+strlen", "+unlink", "+scan", "+expire", "~hicache:*"]
    server.client().execute_command("ACL", "SETUSER", "cache", "on", ">s3cret", *rules)
    (tmp_path / "password").write_text("s3cret\n")
    backend = tier(server.port, username="cache", password_file=tmp_path / "password")
    recovers(backend)
    elsewhere = tier(server.port, username="cache", password_file=tmp_path / "password", prefix="theirs")
    assert set(store(elsewhere)) == {Outcome.FAILED}, "the user may not write there"


def test_a_secret_shows_nowhere(
    tier: Open, server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter2-very-secret"
    monkeypatch.setenv("CACHE_PASSWORD", secret)
    with caplog.at_level(logging.DEBUG):
        backend = tier(server.port, password_env="CACHE_PASSWORD", username="nobody")
        assert set(store(backend)) == {Outcome.FAILED}
        served(backend)
        backend.lookup(key_batch(SPACE, KEYS))
        backend.clear([SPACE])
    shown = [repr(backend), str(backend.options), repr(backend.options), backend.options.model_dump_json()]
    shown += [str(dict(backend.stats())), caplog.text, *(str(record.__dict__) for record in caplog.records)]
    assert caplog.records, "the failure was said"
    assert all(secret not in text for text in shown)


# ---- other ways to be reached


def test_a_unix_socket(tier: Open, stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    stack.enter_context(RedisServer("--unixsocket", str(path)))
    recovers(tier(url=f"unix://{path}"))


def test_a_database_of_its_own(tier: Open, server: RedisServer) -> None:
    backend = tier(url=f"redis://127.0.0.1:{server.port}/3")
    recovers(backend)
    assert server.client().dbsize() == 0
    backend.clear([SPACE])
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()


def test_sentinels_choose_another_master(tier: Open, stack: ExitStack, tmp_path: Path) -> None:
    first = stack.enter_context(RedisServer())
    second = stack.enter_context(
        RedisServer("--replicaof", f"127.0.0.1 {first.port}", "--repl-diskless-sync-delay", "0")
    )
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"sentinel monitor cache 127.0.0.1 {first.port} 1\nsentinel down-after-milliseconds cache 500\n"
        "sentinel failover-timeout cache 2000\n"
    )
    sentinel = stack.enter_context(RedisServerFromFile(config))
    backend = tier(sentinels=[f"127.0.0.1:{sentinel.port}"], service="cache", connect_timeout=1)
    recovers(backend)
    deadline = time.monotonic() + 20
    while second.client().info("replication")["master_link_status"] != "up" and time.monotonic() < deadline:
        time.sleep(0.1)
    first.kill()
    recovers(backend, 60)
    assert second.client().dbsize() == len(KEYS)


class RedisServerFromFile(RedisServer):
    """A sentinel."""

    def __init__(self, config: Path) -> None:
        super().__init__(str(config), "--sentinel")

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self._binary, str(self.arguments[0]), "--sentinel", "--port", str(self.port), "--bind", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def test_a_cluster_whose_slots_move(tier: Open, stack: ExitStack) -> None:
    nodes = [
        stack.enter_context(RedisServer("--cluster-enabled", "yes", "--cluster-config-file", "n.conf")) for _ in "abc"
    ]
    clients = [node.client() for node in nodes]
    bounds = [0, 5461, 10923, 16384]
    for i, client in enumerate(clients):
        client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
        client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all(
        client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"
        and int(client.execute_command("CLUSTER INFO")["cluster_known_nodes"]) == 3
        for client in clients
    ):
        time.sleep(0.1)
    backend = tier(nodes[0].port, cluster=True)
    recovers(backend)
    sizes = [client.dbsize() for client in clients]
    assert sum(sizes) == len(KEYS)
    assert all(sizes), "pages are on every node"
    # One slot in the middle of its way (ASK), then moved for good (MOVED).
    name = next(iter(clients[0].scan_iter()))
    slot = clients[0].execute_command("CLUSTER KEYSLOT", name)
    ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
    clients[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    clients[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    for one in clients[0].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        clients[0].execute_command("MIGRATE", "127.0.0.1", nodes[1].port, one, 0, 5000)
    assert served(backend) == HITS
    for client in clients:
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])
    assert served(backend) == HITS
    assert store(backend) == HITS
    backend.clear([SPACE])
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()

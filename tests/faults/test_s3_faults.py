"""An S3 server that dies, lies, crawls or is not there: no exception, no wrong byte, and it comes back by itself."""

from __future__ import annotations

import http.server
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from hicache_ext.cli.serving import free_port
from storage_backends.base import Backend, Dispatcher, Outcome
from tests.certificates import certificate
from tests.child import die_with_parent
from tests.pages import HostPool, chain, key_batch, namespace
from tests.proxy import Proxy
from tests.remote import Asking
from tests.s3_server import CREDENTIALS, S3Server, s3_server

obstore = pytest.importorskip("obstore")

SPACE = namespace((65536, 65536))
PAGE = SPACE.layout.payload_bytes
KEYS = chain("a", 8)
HITS = [Outcome.HIT] * len(KEYS)

#: A server that can be started on a port of our choice.
STAND_IN = Path(__file__).parents[2] / "examples" / "bench" / "s3_server.py"

Open = Callable[..., Backend]

asking = Asking(SPACE, KEYS, seconds=120, recovery=90)
store, served, recovers = asking.store, asking.served, asking.recovers


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as all_of_it:
        yield all_of_it


@pytest.fixture
def server(stack: ExitStack) -> S3Server:
    return s3_server()


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.bucket()


@pytest.fixture
def proxy(stack: ExitStack, server: S3Server) -> Proxy:
    return stack.enter_context(Proxy(server.port))


@pytest.fixture
def tier(stack: ExitStack) -> Open:
    from storage_backends.s3 import S3Backend

    dispatcher = Dispatcher()
    stack.callback(dispatcher.close)

    def open_one(port: int, bucket: str, **options: Any) -> Backend:
        values = {
            "endpoint": f"http://127.0.0.1:{port}",
            "allow_http": True,
            "bucket": bucket,
            "timeout": 60,
            **options,
        }
        backend = S3Backend(S3Backend.Options.model_validate(values), dispatcher)
        S3Backend.check(backend.options)
        stack.callback(backend.close)
        return backend

    return open_one


def test_no_server_at_the_start_and_one_that_is_restarted_empty(tier: Open, stack: ExitStack) -> None:
    port = free_port()
    backend = tier(port, "cache", timeout=3)
    assert set(store(backend)) == {Outcome.FAILED}
    assert set(served(backend)) == {Outcome.FAILED}
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    assert backend.remove(key_batch(SPACE, KEYS)) == 0
    backend.clear([SPACE])
    assert backend.stats()["state"] != "ok"
    late = S3Server()
    stack.callback(late.kill)
    there = stack.enter_context(Proxy(late.port))
    backend = tier(there.port, "cache")
    assert set(served(backend)) <= {Outcome.FAILED, Outcome.MISS}, "there is no such bucket yet"
    late.bucket("cache")
    recovers(backend)
    for work in ("read", "write"):
        killer = threading.Timer(0.1, late.kill)
        killer.start()
        outcomes, turn = HITS, 0
        while outcomes == HITS:
            turn += 1
            outcomes = served(backend) if work == "read" else store(backend, chain(f"b{turn}", len(KEYS)))
        killer.join()
        assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED, Outcome.TIMEOUT}
        assert Outcome.HIT not in served(backend)
        late.start()
        late.bucket("cache")
        if work == "read":
            recovers(backend)
    deadline = time.monotonic() + 60
    while Outcome.MISS not in (outcomes := served(backend)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(outcomes) <= {Outcome.MISS, Outcome.FAILED}
    recovers(backend)


def test_cut_in_the_middle(tier: Open, bucket: str, proxy: Proxy) -> None:
    backend = tier(proxy.port, bucket)
    assert store(backend) == HITS
    for after in (0, 100, 1000, PAGE, 3 * PAGE):
        proxy.cut_after = after
        assert set(served(backend)) <= {Outcome.HIT, Outcome.FAILED, Outcome.MISS}
        proxy.cut_after = -1
        recovers(backend)


def damage(server: S3Server, bucket: str, keys: list[bytes], seed: int) -> set[bytes]:
    """Make a part of what lies there wrong, in every way we know; which keys are harmed."""
    chance, raw, hurt = random.Random(seed), server.store(bucket), set()
    names = {path.rpartition("/")[2]: path for path in (one["path"] for one in obstore.list(raw).collect())}
    for kind, key in enumerate(chance.sample(keys, 5)):
        name, other = names[key.hex()], names[chance.choice([one for one in keys if one != key]).hex()]
        data = bytes(obstore.get(raw, name).bytes())
        match kind:
            case 0:
                at = chance.randrange(len(data))
                wrong = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
            case 1:
                wrong = bytes(obstore.get(raw, other).bytes())
            case 2:
                wrong = data[: chance.randrange(1, len(data))]
            case 3:
                wrong = data + b"more"
            case _:
                wrong = b"other data under our key"
        if wrong != data:
            obstore.put(raw, name, wrong, use_multipart=False)
            hurt.add(key)
    return hurt


def test_wrong_answers_are_caught_and_healed(tier: Open, server: S3Server, bucket: str) -> None:
    backend = tier(server.port, bucket)
    keys = chain("a", 20)
    for turn in range(3):
        assert store(backend, keys) == [Outcome.HIT] * 20
        hurt = damage(server, bucket, keys, turn)
        assert len(hurt) >= 4
        outcomes = served(backend, keys)
        assert {key for key, outcome in zip(keys, outcomes, strict=True) if outcome == Outcome.CORRUPT} == hurt
        assert outcomes.count(Outcome.HIT) == 20 - len(hurt)
    assert backend.stats()["direct"]
    assert not backend.stats()["repeated"]
    assert store(backend, keys) == [Outcome.HIT] * 20
    hurt = damage(server, bucket, keys, 9)
    sound = {key for key, there in zip(keys, backend.lookup(key_batch(SPACE, keys)), strict=True) if there}
    assert sound < set(keys), "cut objects are not there, for lookups"
    assert store(backend, keys) == [Outcome.HIT] * 20, "and are written over"
    outcomes = served(backend, keys)
    assert {key for key, outcome in zip(keys, outcomes, strict=True) if outcome != Outcome.HIT} == hurt & sound


def test_flipped_on_the_way(tier: Open, bucket: str, proxy: Proxy) -> None:
    backend = tier(proxy.port, bucket, timeout=5)
    assert store(backend) == HITS
    proxy.flip = 0.1
    seen: set[Outcome] = set()
    for _ in range(12):
        seen |= set(served(backend))
    proxy.flip = 0
    assert proxy.flipped
    assert Outcome.CORRUPT in seen
    recovers(backend)


@pytest.mark.parametrize("what", ["slow", "half-open"])
def test_what_does_not_arrive_in_time(tier: Open, bucket: str, proxy: Proxy, what: str) -> None:
    backend = tier(proxy.port, bucket, timeout=3, connections=4)
    recovers(backend)
    if what == "slow":
        proxy.rate = 3000
    else:
        proxy.frozen = True
    pool = HostPool(SPACE, len(KEYS))
    pool.poison()
    outcomes = backend.read(pool.batch(KEYS)).result(60)
    assert Outcome.TIMEOUT in outcomes
    assert set(outcomes) <= {Outcome.TIMEOUT, Outcome.FAILED}
    pool.bytes[:] = 0x77  # the pages are somebody else's now
    proxy.rate, proxy.frozen = 0, False
    recovers(backend)
    assert (pool.bytes == 0x77).all(), "a late byte landed in memory that was given back"


def test_of_two_writers_one_stores(tier: Open, server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tier(server.port, bucket), tier(server.port, bucket)
    monkeypatch.setattr(second, "sizes", lambda names: [-1] * len(names))  # it looked before the first one wrote
    assert store(first) == HITS
    tags = {one["path"]: one["e_tag"] for one in obstore.list(server.store(bucket)).collect()}
    assert store(second) == HITS
    assert (second.stats()["stored"], second.stats()["present"]) == (0, len(KEYS))
    assert tags == {one["path"]: one["e_tag"] for one in obstore.list(server.store(bucket)).collect()}
    assert served(second) == HITS


def test_a_page_that_came_after_our_lookup_is_kept(tier: Open, server: S3Server, bucket: str) -> None:
    first, second = tier(server.port, bucket), tier(server.port, bucket)
    assert not second.lookup(key_batch(SPACE, KEYS)).any()
    assert store(first, KEYS[:4]) == HITS[:4]
    assert store(second) == HITS
    assert (second.stats()["stored"], second.stats()["present"]) == (len(KEYS) - 4, 4)
    assert served(second) == HITS


def test_large_pages_go_up_in_parts(tier: Open, server: S3Server, bucket: str) -> None:
    backend = tier(server.port, bucket, multipart_size="5MiB")
    space = namespace((7 << 20, (5 << 20) + 12))
    keys = chain("large", 2)
    assert store(backend, keys, space) == [Outcome.HIT] * 2
    assert served(backend, keys, space) == [Outcome.HIT] * 2
    tags = [one["e_tag"] for one in obstore.list(server.store(bucket)).collect()]
    assert all(tag.endswith('-3"') for tag in tags), "three parts each"


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 301 Moved\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"",
    ],
    ids=["busy", "signed addresses are refused", "moved", "chunked", "closed"],
)
def test_what_our_own_request_does_not_get_obstore_does(
    tier: Open, server: S3Server, bucket: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def answer() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.recv(1 << 16)
                client.sendall(said)

    threading.Thread(target=answer, daemon=True).start()
    backend: Any = tier(server.port, bucket)
    monkeypatch.setattr(obstore, "sign", lambda *_: f"http://127.0.0.1:{listener.getsockname()[1]}/x?y")
    for work in (store, served):
        backend._detour.good()
        assert work(backend) == HITS
    assert backend.stats()["repeated"] >= 2
    monkeypatch.undo()
    backend._detour.good()
    assert served(backend) == HITS
    assert backend.stats()["direct"]


def test_tls_and_a_certificate_that_expired(tier: Open, stack: ExitStack, tmp_path: Path) -> None:
    tls = certificate(tmp_path, 30)
    server = S3Server(tls)
    stack.callback(server.kill)
    bucket, endpoint = server.bucket(), f"https://127.0.0.1:{server.port}"
    backend = tier(0, bucket, endpoint=endpoint, tls_ca=tls.authority, timeout=5)
    large = namespace((3 << 20, 70_000))
    assert store(backend) == HITS
    assert served(backend) == HITS
    assert store(backend, KEYS[:2], large) == HITS[:2]
    assert served(backend, KEYS[:2], large) == HITS[:2]
    assert backend.stats()["direct"] == 2 * len(KEYS) + 4
    strange = tier(0, bucket, endpoint=endpoint, timeout=3)
    assert set(served(strange)) == {Outcome.FAILED}, "nobody vouches for it"
    certificate(tmp_path, -1)
    server.kill()
    server.start()
    assert set(served(backend)) == {Outcome.FAILED}
    assert set(store(backend)) == {Outcome.FAILED}
    certificate(tmp_path, 30)
    server.kill()
    server.start()
    server.bucket(bucket)
    recovers(backend)


def test_a_wrong_secret_and_rights_that_are_taken_away(
    tier: Open, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto checks signatures and rights here. It knows no signed addresses, so this is obstore's work throughout."""
    client = pytest.importorskip("boto3").client
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "7")  # what is set up below
    server = S3Server()
    stack.callback(server.kill)
    bucket = server.bucket()

    def iam(key: str, secret: str) -> Any:
        where = {"endpoint_url": f"http://127.0.0.1:{server.port}", "region_name": "us-east-1"}
        return client("iam", **where, aws_access_key_id=key, aws_secret_access_key=secret)

    def allow(admin: Any, user: str, action: str) -> None:
        rights = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": action, "Resource": "*"}]}
        admin.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=json.dumps(rights))

    keys, anybody = {}, iam("any", "any")
    for user, action in (("admin", "*"), ("cache", "s3:*")):
        anybody.create_user(UserName=user)
        allow(anybody, user, action)
        made = anybody.create_access_key(UserName=user)["AccessKey"]
        keys[user] = made["AccessKeyId"], made["SecretAccessKey"]
    admin = iam(*keys["admin"])

    def opened(secret: str) -> Backend:
        monkeypatch.setenv("KEY", keys["cache"][0])
        monkeypatch.setenv("SECRET", secret)
        return tier(server.port, bucket, access_key_env="KEY", secret_key_env="SECRET", timeout=5)

    wrong = opened(keys["cache"][1][::-1])
    assert set(store(wrong)) == set(served(wrong)) == {Outcome.FAILED}
    assert "privileges" in str(wrong.stats()["state"])
    right = opened(keys["cache"][1])
    recovers(right)
    assert right.stats()["repeated"]
    admin.delete_user_policy(UserName="cache", PolicyName="rights")
    assert set(served(right)) == {Outcome.FAILED}
    assert set(store(right, chain("more", 8))) == {Outcome.FAILED}
    allow(admin, "cache", "s3:*")
    recovers(right)


class Gate(http.server.BaseHTTPRequestHandler):
    """Lets nobody in, for the reason in `code`."""

    code = ""

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = refuse

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("code", ["SignatureDoesNotMatch", "RequestTimeTooSkewed"])
def test_a_wrong_secret_and_a_clock_that_is_an_hour_off(tier: Open, stack: ExitStack, code: str) -> None:
    """A store that refuses for such a reason costs misses, and is used again when it lets us in."""
    handler = type("ThisGate", (Gate,), {"code": code})
    gate = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    gate.daemon_threads = True
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    port = gate.server_port
    backend = tier(port, "cache", timeout=3)
    assert set(store(backend)) == {Outcome.FAILED}
    assert set(served(backend)) == {Outcome.FAILED}
    assert not backend.lookup(key_batch(SPACE, KEYS)).any()
    assert backend.stats()["state"] != "ok"
    gate.shutdown()
    gate.server_close()
    command = [sys.executable, str(STAND_IN), str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    stack.callback(server.wait)
    stack.callback(server.kill)
    recovers(backend)


def test_a_secret_shows_nowhere(
    tier: Open, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter2-very-secret"
    monkeypatch.setenv("MY_KEY", "an-id-" + secret)
    monkeypatch.setenv("MY_SECRET", secret)
    with caplog.at_level(logging.DEBUG):
        backend = tier(free_port(), "cache", access_key_env="MY_KEY", secret_key_env="MY_SECRET", timeout=2)
        assert set(store(backend)) == {Outcome.FAILED}
        served(backend)
        backend.clear([SPACE])
    shown = [repr(backend), str(backend.options), repr(backend.options), backend.options.model_dump_json()]
    shown += [str(dict(backend.stats())), caplog.text, *(str(record.__dict__) for record in caplog.records)]
    assert caplog.records, "the failure was said"
    assert all(secret not in text for text in shown)

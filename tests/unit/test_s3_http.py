"""The small HTTP client of the s3 tier: what a server sends, in whatever pieces, is understood or refused; nothing
overruns, and what was not the answer is not in the page."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_backends.s3.http import Answer, Http
from storage_backends.wire import WireError, WireTimeout

CUTS = st.lists(st.integers(1, 9000), max_size=6)


class Peer:
    """Answers each request on each connection with the next of `answers`, in pieces; closes when there are none."""

    def __init__(self, *answers: bytes, cuts: list[int] | None = None, stays: bool = False) -> None:
        self._answers, self._cuts, self._stays = list(answers), cuts or [], stays
        self.requests: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/bucket/name?signed=1"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(client)
            with client, contextlib.suppress(OSError):
                while self._answers and (request := self._request(client)):
                    self.requests.append(request)
                    self._send(client, self._answers.pop(0))
                while self._stays and client.recv(1):
                    pass

    def _request(self, client: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            got = client.recv(1 << 16)
            if not got:
                return b""
            data += got
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
        while len(body) < length:
            body += client.recv(1 << 16)
        return head + b"\r\n\r\n" + body

    def _send(self, client: socket.socket, data: bytes) -> None:
        for cut in self._cuts:
            client.sendall(data[:cut])
            data = data[cut:]
        client.sendall(data)

    def has_closed(self) -> None:
        """Wait until it has: it does when it finds that it has no more answers."""
        until = time.monotonic() + 20
        while self._open[-1].fileno() >= 0:
            assert time.monotonic() < until
            time.sleep(0.001)

    def close(self) -> None:
        self._listener.close()
        for client in self._open:
            client.close()


@contextlib.contextmanager
def talking(*answers: bytes, timeout: float = 5, **how: object) -> Iterator[tuple[Http, Peer]]:
    peer, http = Peer(*answers, **how), Http(timeout, None)  # type: ignore[arg-type]
    try:
        yield http, peer
    finally:
        http.close()
        peer.close()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(max_size=20_000), min_size=1, max_size=4), CUTS)
def test_bodies_arrive_however_they_are_cut(bodies: list[bytes], cuts: list[int]) -> None:
    with talking(*map(answer, bodies), cuts=cuts) as (http, peer):
        for body in bodies:
            memory = bytearray(b"\xee" * (len(body) + 8))
            middle = len(body) // 3
            views = [memoryview(memory)[:middle], memoryview(memory)[middle : len(body)]]
            assert http.get(peer.url, views) == Answer(200, len(body), True)
            assert memory == body + b"\xee" * 8
        assert peer.connections == 1
        assert all(request.startswith(b"GET /bucket/name?signed=1 HTTP/1.1\r\n") for request in peer.requests)


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=300), CUTS)
def test_whatever_a_server_says_nothing_overruns(data: bytes, cuts: list[int]) -> None:
    with talking(data, cuts=cuts) as (http, peer):
        memory = bytearray(b"\xee" * 64)
        with pytest.raises(WireError):
            http.get(peer.url, [memoryview(memory)[16:48]])
        assert (memory[:16], memory[48:]) == (b"\xee" * 16, b"\xee" * 16)


@pytest.mark.parametrize(
    ("said", "status", "length"),
    [
        (answer(b"<Error>no</Error>", "404 Not Found"), 404, 17),
        (answer(b"x" * 40), 200, 40),
        (answer(b"x" * 20), 200, 20),
        (answer(b"x" * 32, "403 Forbidden"), 403, 32),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"no", "503 Slow Down"), 503, 2),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, 0),
    ],
)
def test_what_is_not_the_page_is_read_past(said: bytes, status: int, length: int) -> None:
    with talking(said, answer(b"y" * 32)) as (http, peer):
        memory = bytearray(32)
        assert http.get(peer.url, [memoryview(memory)]) == Answer(status, length, True)
        assert memory == bytes(32)
        assert http.get(peer.url, [memoryview(memory)]).status == 200
        assert memory == b"y" * 32
        assert peer.connections == 1


def test_a_large_body_that_nobody_wants_costs_the_connection() -> None:
    with talking(answer(b"x" * 100_000), answer(b"y"), cuts=[]) as (http, peer):
        assert http.get(peer.url, [memoryview(bytearray(1))]) == Answer(200, 100_000, False)
        assert not http._free


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999999 or so\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\n" + b"More: 1\r\n" * 100 + b"Content-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 5000 + b"\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/2 200\r\n\r\n",
        b"\x16\x03\x01",
        answer(b"x")[:-1],
        b"",
    ],
)
def test_what_is_not_understood_is_an_error(said: bytes) -> None:
    with talking(said) as (http, peer):
        memory = bytearray(1)
        with pytest.raises(WireError):
            http.get(peer.url, [memoryview(memory)])
        assert memory == b"\0"
        assert not http._free


def test_a_connection_that_was_closed_meanwhile_is_replaced() -> None:
    last = answer(b"one", "200 OK", "Connection: close")
    for first, connections in ((answer(b"one"), 1), (last, 2)):
        with talking(first, answer(b"two")) as (http, peer):
            memory = bytearray(3)
            http.get(peer.url, [memoryview(memory)])
            http.get(peer.url, [memoryview(memory)])
            assert (memory, peer.connections) == (b"two", connections)
    with talking(answer(b"one")) as (http, peer):
        http.get(peer.url, [memoryview(memory)])
        peer.has_closed()
        peer._answers.append(answer(b"two"))  # on a new connection
        http.get(peer.url, [memoryview(memory)])
        assert (memory, peer.connections) == (b"two", 2)


def test_a_put_is_sent_from_where_its_parts_are() -> None:
    with talking(answer(b""), answer(b"", "412 Precondition Failed")) as (http, peer):
        parts = [b"head", memoryview(bytearray(b"p" * 200_000)), bytearray(b"tail")]
        assert http.put(peer.url, parts, b"If-None-Match: *\r\n").status == 200
        assert http.put(peer.url, [b""], b"").status == 412
        head, _, body = peer.requests[0].partition(b"\r\n\r\n")
        assert body == b"head" + b"p" * 200_000 + b"tail"
        assert b"\r\nIf-None-Match: *" in head
        assert b"\r\nContent-Length: 200008\r\n" in head
        assert b"If-None-Match" not in peer.requests[1]


def test_silence_ends_in_time_and_close_wakes_who_waits() -> None:
    half = answer(b"x" * 64)[:-32]
    with talking(half, stays=True, timeout=0.3) as (http, peer), pytest.raises(WireTimeout):
        http.get(peer.url, [memoryview(bytearray(64))])
    with talking(half, stays=True, timeout=60) as (http, peer):
        threading.Timer(0.2, http.abort).start()
        began = time.monotonic()
        with pytest.raises(WireError):
            http.get(peer.url, [memoryview(bytearray(64))])
        assert time.monotonic() - began < 30
        with pytest.raises(WireError):
            http.get(peer.url, [memoryview(bytearray(64))])


def test_nobody_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(WireError):
            Http(5, None).get(f"http://127.0.0.1:{held.getsockname()[1]}/x?y", [])


def test_proxies_of_the_environment_are_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert Http.is_possible("")
    assert Http.is_possible("http://minio:9000")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert not Http.is_possible("")
    assert not Http.is_possible("https://minio:9000")
    assert Http.is_possible("http://minio:9000")
    monkeypatch.setenv("no_proxy", "minio")
    assert Http.is_possible("https://minio:9000")
    monkeypatch.setenv("all_proxy", "http://proxy:3128")
    assert not Http.is_possible("http://other:9000")

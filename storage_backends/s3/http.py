"""Pages to and from an S3 server without a copy: GET and PUT over wires of our own, at addresses that obstore signs.

Belongs here: as much of HTTP/1.1 as that takes (RFC 9112). Does not belong here: credentials and signatures
(obstore's), what an answer means (backend.py), or anything that does not go well: whoever asks has obstore repeat it,
with its patience and its knowledge of errors.

obstore gathers an answer, copies it into one piece, which is copied into the page by us; and over HTTP it computes a
SHA-256 of what it sends. Here the kernel copies between socket and page, and nobody else does.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from storage_backends.wire import Part, Wire, WireError, WireTimeout

_CONNECT_SECONDS = 5.0
_HEADERS = 64
#: An answer without a page in it (an error's text) is read past up to this size; beyond, the connection is given up.
_SKIP = 64 << 10

Place = tuple[str, str, int]
"""Scheme, host, port."""


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. length: bytes of the body. keep: the connection may be used again."""

    status: int
    length: int
    keep: bool


class Http:
    """Connections to one server. timeout: seconds for one page. Thread-safe.

    tls_ca: PEM file with an authority to trust besides the system's.
    """

    def __init__(self, timeout: float, tls_ca: Path | None) -> None:
        self._timeout, self._tls_ca = timeout, tls_ca
        self._tls: ssl.SSLContext | None = None
        self._free: list[Wire] = []
        self._wires: set[Wire] = set()
        self._lock = threading.Lock()
        self._closing = False

    @staticmethod
    def is_possible(endpoint: str) -> bool:
        """Whether servers are reached directly: obstore goes through the proxies of the environment, and we do not."""
        address, proxies = urlsplit(endpoint or "https://s3.amazonaws.com"), getproxies()
        return not (address.scheme in proxies or "all" in proxies) or bool(proxy_bypass(address.hostname or ""))

    def get(self, url: str, buffers: Sequence[memoryview]) -> Answer:
        """One GET. The body is in the buffers if the status is 200 and the length theirs; else they are untouched.

        Raises WireError; nothing touches the buffers after that either.
        """
        return self._ask(b"GET", url, b"", (), buffers)

    def put(self, url: str, parts: Sequence[Part], condition: bytes) -> Answer:
        r"""One PUT of these bytes. condition: a line of the request's head, with its \r\n, or nothing."""
        length = b"Content-Length: %d\r\n" % sum(map(len, parts))
        return self._ask(b"PUT", url, length + condition, parts, ())

    def abort(self) -> None:
        """Who waits gets a WireError; nothing is sent any more."""
        with self._lock:
            self._closing = True
            wires = list(self._wires)
        for wire in wires:
            wire.abort()

    def close(self) -> None:
        self.abort()
        with self._lock:
            free, self._free = self._free, []
        for wire in free:
            self._drop(wire)

    def _ask(
        self, method: bytes, url: str, lines: bytes, parts: Sequence[Part], buffers: Sequence[memoryview]
    ) -> Answer:
        address = urlsplit(url)
        head = b"%b %b?%b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
            method, address.path.encode(), address.query.encode(), address.netloc.encode(), lines,
        )  # fmt: skip
        while True:
            wire = self._take(address)
            try:
                wire.send([head, *parts])
                answer = _answer(wire, buffers)
            except WireTimeout:
                self._drop(wire)
                raise
            except WireError:
                self._drop(wire)
                if wire.idle and not self._closing:
                    self._drop_idle()  # it was closed while nobody used it, and so were the others
                    continue
                raise
            except BaseException:
                self._drop(wire)
                raise
            wire.idle = True
            with self._lock:
                kept = answer.keep and not self._closing
                if kept:
                    self._free.append(wire)
            if not kept:
                self._drop(wire)
            return answer

    def _take(self, address: SplitResult) -> Wire:
        with self._lock:
            if self._closing:
                raise WireError("closing")
            if self._free:
                return self._free.pop()
        wire = self._connect(address)
        with self._lock:
            self._wires.add(wire)
            closing = self._closing
        if closing:
            self._drop(wire)
            raise WireError("closing")
        return wire

    def _connect(self, address: SplitResult) -> Wire:
        secure = address.scheme == "https"
        host, port = address.hostname or "", address.port or (443 if secure else 80)
        try:
            sock = socket.create_connection((host, port), min(self._timeout, _CONNECT_SECONDS))
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if secure:
                    sock = self._context().wrap_socket(sock, server_hostname=host)
            except BaseException:
                sock.close()
                raise
        except TimeoutError:
            raise WireTimeout("no connection in time") from None
        except (OSError, ValueError) as error:
            raise WireError(str(error)) from None
        return Wire(sock, self._timeout)

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
                if self._tls_ca is not None:
                    self._tls.load_verify_locations(self._tls_ca)
            return self._tls

    def _drop(self, wire: Wire) -> None:
        with self._lock:
            self._wires.discard(wire)
        wire.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._free = self._free, []
        for wire in idle:
            self._drop(wire)


def _answer(wire: Wire, buffers: Sequence[memoryview]) -> Answer:
    """The answer's head, and its body: into the buffers, or read past."""
    deadline = wire.deadline()
    status = 100
    while 100 <= status < 200:  # "100 Continue" and the like come before the answer
        version, _, rest = wire.line(deadline).partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or not rest[:3].isdigit():
            raise WireError("an answer that is no HTTP")
        status = int(rest[:3])
        length, keep = _headers(wire, deadline, version == b"HTTP/1.1")
    if status in (204, 304):
        length = 0
    if length < 0:
        raise WireError("an answer of unknown length")
    if status == 200 and length == sum(map(len, buffers)):
        wire.fill(buffers, deadline)
    elif length <= _SKIP:
        wire.fill([memoryview(bytearray(length))], deadline)
    else:
        keep = False
    return Answer(status, length, keep)


def _headers(wire: Wire, deadline: float, keep: bool) -> tuple[int, bool]:
    """Length of the body, -1 where it is not told, and whether the connection stays."""
    length = -1
    for _ in range(_HEADERS):
        line = wire.line(deadline)
        if not line:
            return length, keep
        name, _, value = line.partition(b":")
        match name.lower():
            case b"content-length":
                if not value.strip().isdigit():
                    raise WireError("an answer of unknown length")
                length = int(value)
            case b"connection":
                keep = value.strip().lower() != b"close"
            case b"transfer-encoding" | b"content-encoding":
                raise WireError("an answer in another form than its bytes")
    raise WireError("an answer with too many headers")

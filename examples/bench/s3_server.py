"""As much of S3 as pages need, in memory, on loopback: for measuring clients, not for keeping anything.

    python examples/bench/s3_server.py 9000

One thread a connection, which blocks in the kernel; every bucket exists, no signature is checked, everything is gone
at the end. It moves several times as much as moto's server, which is bound by its own interpreter: with that, every
client looks the same.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
from urllib.parse import parse_qs, unquote, urlsplit

_HEAD = 1 << 16


class Connection:
    """Requests of one client, one after another."""

    def __init__(self, sock: socket.socket, objects: dict[str, bytearray]) -> None:
        self._socket, self._objects = sock, objects
        self._buffer, self._end = bytearray(_HEAD), 0

    def serve(self) -> None:
        with self._socket, contextlib.suppress(OSError, ValueError):
            while (request := self._head()) is not None:
                lines = request.split("\r\n")
                method, target, _ = lines[0].split(" ")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
                }
                body = self._body(int(headers.get("content-length", 0)))
                status, answer, length = self._answer(method, target, headers, body)
                head = f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n"
                head += 'ETag: "1"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n\r\n'
                self._send([head.encode(), answer])

    def _answer(
        self, method: str, target: str, headers: dict[str, str], body: bytearray
    ) -> tuple[str, bytes | bytearray, int]:
        """Status, body, and the length to announce."""
        parts = urlsplit(target)
        name = unquote(parts.path)
        found = self._objects.get(name)
        match method:
            case "PUT":
                if found is not None and headers.get("if-none-match") == "*":
                    return "412 Precondition Failed", b"", 0
                self._objects[name] = body
                return "200 OK", b"", 0
            case "GET" if "list-type" in parts.query:
                text = self._list(name, parse_qs(parts.query).get("prefix", [""])[0])
                return "200 OK", text, len(text)
            case "GET" | "HEAD" if found is not None:
                return "200 OK", found if method == "GET" else b"", len(found)
            case "POST":
                keys = [key.decode() for key in re.findall(rb"<Key>([^<]+)</Key>", bytes(body))]
                for key in keys:
                    self._objects.pop(f"{name.rstrip('/')}/{key}", None)
                gone = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
                text = f"<DeleteResult>{gone}</DeleteResult>".encode()
                return "200 OK", text, len(text)
            case "DELETE":
                self._objects.pop(name, None)
                return "204 No Content", b"", 0
        return "404 Not Found", b"", 0

    def _list(self, bucket: str, prefix: str) -> bytes:
        start = f"{bucket.rstrip('/')}/"
        held = [(name[len(start) :], len(data)) for name, data in list(self._objects.items()) if name.startswith(start)]
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            '<ETag>"1"</ETag></Contents>'
            for key, size in held
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def _head(self) -> str | None:
        """The next request's first lines; None when the client is gone."""
        while (end := self._buffer.find(b"\r\n\r\n", 0, self._end)) < 0:
            got = self._socket.recv_into(memoryview(self._buffer)[self._end :])
            if not got:
                return None
            self._end += got
        request = bytes(self._buffer[:end]).decode()
        self._take(end + 4)
        return request

    def _body(self, size: int) -> bytearray:
        body = bytearray(size)
        have = min(size, self._end)
        body[:have] = self._buffer[:have]
        self._take(have)
        view = memoryview(body)
        while have < size:
            got = self._socket.recv_into(view[have:], 0, socket.MSG_WAITALL)
            if not got:
                raise OSError("gone in the middle of a body")
            have += got
        return body

    def _take(self, size: int) -> None:
        rest = self._buffer[size : self._end]
        self._buffer[: len(rest)] = rest
        self._end = len(rest)

    def _send(self, parts: list[bytes | bytearray]) -> None:
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            sent = self._socket.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if views:
                views[0] = views[0][sent:]


def main(port: int) -> None:
    objects: dict[str, bytearray] = {}
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=Connection(sock, objects).serve, daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9000)

"""Bytes over one socket without a copy of them: gathered writes, lines, and reads straight into pages.

Belongs here: the socket and its time limits. Does not belong here: connecting, or a protocol (redis/resp.py,
s3/http.py).

A plain socket blocks in the kernel, with its own time limits (SO_RCVTIMEO), and is asked for a whole page at once
(MSG_WAITALL): one call per page that holds no lock of Python's. TLS goes through OpenSSL, which copies.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

_LINE = 4096
_IOV = 512

Part = bytes | bytearray | memoryview


class WireError(Exception):
    """The connection is of no use any more."""


class WireTimeout(WireError):
    """No answer in time: what arrives later belongs to nobody, so the connection is of no use either."""


class Wire:
    """A connected, authenticated socket. timeout: seconds that one command's data or reply may take.

    owner: kept as long as the wire, and disconnected with it.
    """

    def __init__(self, sock: socket.socket, timeout: float, owner: Any = None) -> None:
        self._socket, self._timeout, self._owner = sock, timeout, owner
        self._tls = isinstance(sock, ssl.SSLSocket)
        if self._tls:
            sock.settimeout(timeout)
        else:
            limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
            sock.settimeout(None)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._raw = bytearray(_LINE)
        self._buffer = memoryview(self._raw)
        self._at = self._end = 0
        self.idle = False
        """Has lain unused since: the server may have closed it meanwhile."""

    def deadline(self) -> float:
        """For what is begun now: monotonic seconds."""
        return time.monotonic() + self._timeout

    def send(self, parts: Sequence[Part]) -> None:
        """All of these bytes, from where they are. Raises WireError."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        deadline = self.deadline()
        with _as_wire_errors():
            if self._tls:
                for view in views:
                    self._socket.sendall(view)
                return
            while views:
                sent = self._socket.sendmsg(views[:_IOV])
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if views:
                    views[0] = views[0][sent:]
                    self._in_time(deadline)

    def line(self, deadline: float) -> bytes:
        r"""The next line, which ends in \r\n, without that. Raises WireError."""
        seen = self._at
        while True:
            found = self._raw.find(b"\n", seen, self._end)
            if found >= 0:
                line = bytes(self._buffer[self._at : found + 1])
                self._at = found + 1
                if line[-2:] != b"\r\n":
                    raise WireError("a line without an end")
                return line[:-2]
            if self._at:
                kept = self._raw[self._at : self._end]
                self._buffer[: len(kept)] = kept
                self._at, self._end = 0, len(kept)
            if self._end == _LINE:
                raise WireError("a line without an end")
            seen = self._end
            with _as_wire_errors():
                got = self._socket.recv_into(self._buffer[self._end :])
            if not got:
                raise WireError("the server closed the connection")
            self._end += got
            self._in_time(deadline)

    def fill(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """These buffers, from what was read already and then from the socket. Raises WireError."""
        left = [buffer for buffer in buffers if len(buffer)]
        while left and self._at < self._end:
            taken = min(len(left[0]), self._end - self._at)
            left[0][:taken] = self._buffer[self._at : self._at + taken]
            self._at += taken
            left[0] = left[0][taken:]
            if not len(left[0]):
                left.pop(0)
        while left:
            with _as_wire_errors():
                if self._tls:
                    got = self._socket.recv_into(left[0])
                else:
                    got = self._socket.recvmsg_into(left[:_IOV], 0, socket.MSG_WAITALL)[0]
            if not got:
                raise WireError("the server closed the connection in the middle of an answer")
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if left:
                left[0] = left[0][got:]
                self._in_time(deadline)

    def abort(self) -> None:
        """From another thread: whoever waits here gets a WireError."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Nothing arrives in anybody's memory after this."""
        with contextlib.suppress(OSError):
            self._socket.close()
        with contextlib.suppress(Exception):  # the client library's, on a socket that is gone
            self._owner.disconnect()

    def _in_time(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise WireTimeout(f"not done within {self._timeout} s")


@contextlib.contextmanager
def _as_wire_errors() -> Iterator[None]:
    try:
        yield
    except (TimeoutError, BlockingIOError) as error:  # BlockingIOError: SO_RCVTIMEO ran out
        raise WireTimeout("no answer in time") from error
    except (OSError, ValueError) as error:  # ValueError: OpenSSL's, of a socket closed meanwhile
        raise WireError(str(error) or type(error).__name__) from error

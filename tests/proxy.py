"""A TCP proxy on loopback that makes a real server slow, silent, cut off or untrue: faults from outside."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from types import TracebackType


class Proxy:
    """Forwards 127.0.0.1:port to 127.0.0.1:target. The fields may be set while it runs.

    piece: most bytes forwarded at once. rate: bytes per second from the server, 0 = all. frozen: connections stay,
    nothing moves (a peer that vanished). cut_after: bytes that the server may still send before all connections are
    cut; -1 = all. flip: probability that a piece from the server gets one bit turned over.
    """

    def __init__(self, target: int, piece: int = 65536, seed: int = 1) -> None:
        self.target, self.piece = target, piece
        self.rate = 0.0
        self.frozen = False
        self.cut_after = -1
        self.flip = 0.0
        self.flipped = 0
        self._random = random.Random(seed)
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, in both directions."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._sockets += [client, server]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self.piece):
                while self.frozen and not self._closed:
                    time.sleep(0.01)
                if down:
                    data = self._spoilt(data)
                target.sendall(data)
                if down and self.cut_after == 0:
                    self.cut()
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _spoilt(self, data: bytes) -> bytes:
        if self.rate:
            time.sleep(len(data) / self.rate)
        with self._lock:
            if self.cut_after >= 0:
                data = data[: self.cut_after]
                self.cut_after -= len(data)
            if self.flip and data and self._random.random() < self.flip:
                at = self._random.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ (1 << self._random.randrange(8))]) + data[at + 1 :]
                self.flipped += 1
        return data

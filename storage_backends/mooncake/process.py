"""The process in which Mooncake's client runs, and what it is asked over sockets.

Belongs here: calls of Mooncake, as thin as they can be, and nothing that the engine's process needs. Runs as a file of
its own, with the standard library and Mooncake alone. Does not belong here: what an answer means (backend.py).

Why a process. Mooncake's client (0.3.13) holds Python's lock for as long as it connects, which is minutes where a
master does not answer; a transfer that it has given up after a minute may still write to the memory it was for; it
cannot be closed while one is under way; and a fault in it takes its process along. Out here none of that reaches the
engine: what takes too long is ended by ending the process, and then nothing can touch a page any more.

Each lane is a socket of whole messages (JSON), one request at a time, answered in order:

    {"do": "get", "keys": [...], "at": [[address, ...], ...], "sizes": [[bytes, ...], ...]}   -> {"codes": [...]}
    {"do": "put", ...the same}                     -> {"codes": [...]}   0, or Mooncake's error
    {"do": "sizes" | "remove", "keys": [...]}      -> {"codes": [...]}   bytes or -704; 0 or an error
    {"do": "clear", "start": "..."}                -> {"codes": [how many]}

The first lane also takes {"do": "map", "size": bytes, "offset": bytes} with a file's descriptor: shared memory, mapped,
registered, and answered with its address here; and {"do": "end"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import re
import resource
import socket
import sys
import threading
import time
from typing import Any

#: Largest message. A group of pages with hundreds of buffers each has some tens of KiB.
MESSAGE = 1 << 20
_NOT_FOUND = -704
_PARENT_SECONDS = 0.5


class Server:
    """Mooncake's client behind lanes."""

    def __init__(self, options: dict[str, Any]) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self._store = MooncakeDistributedStore()
        self._config = ReplicateConfig()
        self._config.replica_num = options["replicas"]
        self._maps: list[mmap.mmap] = []
        self._closing = threading.Lock()
        self.code: int = self._store.setup(
            options["host"], options["metadata"], options["segment"], 0, options["protocol"], options["devices"],
            options["master"],
        )  # fmt: skip

    def serve(self, lane: socket.socket) -> None:
        """Until the other end is closed."""
        while True:
            message, fds, _, _ = socket.recv_fds(lane, MESSAGE, 1)
            if not message:
                return
            try:
                answer = self._answer(json.loads(message), fds)
            except Exception as error:  # whatever Mooncake's binding raises
                answer = {"problem": f"{type(error).__name__}: {error}"}
            lane.send(json.dumps(answer).encode())

    def end(self) -> None:
        """Tell the master that we go, and go. Only the first to ask does."""
        if self._closing.acquire(blocking=False):
            self._store.close()
            os._exit(0)

    def _answer(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        store = self._store
        match request["do"]:
            case "get":
                return {"codes": store.batch_get_into_multi_buffers(request["keys"], request["at"], request["sizes"])}
            case "put":
                codes = store.batch_put_from_multi_buffers(
                    request["keys"], request["at"], request["sizes"], self._config
                )
                return {"codes": codes}
            case "sizes":
                return {"codes": self._sizes(request["keys"])}
            case "remove":
                return {"codes": store.batch_remove(request["keys"], True)}
            case "clear":
                start = re.sub(r"\.", r"\\.", request["start"])
                return {"codes": [store.remove_by_regex(f"^{start}", True)]}
            case "map":
                return {"address": self._map(fds[0], request["size"], request["offset"])}
            case "end":
                self.end()
        return {"problem": f"no such request: {request['do']}"}

    def _sizes(self, keys: list[str]) -> list[int]:
        found = self._store.batch_get_replica_desc(keys)
        if not found:  # none of them, or no answer: only this tells
            there = self._store.batch_is_exist(keys[:1])
            if there and there[0] < 0:
                return [there[0]] * len(keys)
        return [_size(found.get(key, ())) for key in keys]

    def _map(self, fd: int, size: int, offset: int) -> int:
        """The address of this part of a file; negative: Mooncake's error."""
        try:
            whole = mmap.mmap(fd, size, mmap.MAP_SHARED, offset=offset)
        finally:
            os.close(fd)
        address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        code: int = self._store.register_buffer(address, size)
        if code:
            return code if code < 0 else -code
        self._maps.append(whole)
        return address


def _size(replicas: Any) -> int:
    """Bytes of an object with these replicas, that of the first that is whole; -704 where none is."""
    for replica in replicas:
        if replica.status.name == "COMPLETE":
            if replica.is_memory_replica():
                return int(replica.get_memory_descriptor().buffer_descriptor.size)
            return int(replica.get_disk_descriptor().object_size)
    return _NOT_FOUND


def _watch(parent: int, server: Server) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    server.end()


def main() -> None:
    """argv[1]: JSON of `fds` (the lanes), `parent` (its id) and the options of `Server`."""
    options = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lanes = [socket.socket(fileno=fd) for fd in options["fds"]]
    try:
        server = Server(options)
        told: dict[str, Any] = {"code": server.code}
    except Exception as error:  # an import that fails, for the most part
        told = {"code": -1, "problem": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):
        lanes[0].send(json.dumps(told).encode())
    if told["code"]:
        os._exit(1)
    threading.Thread(target=_watch, args=(options["parent"], server), daemon=True).start()
    for lane in lanes[1:]:
        threading.Thread(target=server.serve, args=(lane,), daemon=True).start()
    server.serve(lanes[0])
    server.end()


if __name__ == "__main__":
    main()

"""The redis tier: pages as values of Redis or Valkey.

Belongs here: which commands move pages, and what their answers mean. Does not belong here: the bytes of a value
(object.py), the protocol (resp.py), where servers are (servers.py).

A value's name is `prefix:version:namespace:key`, in hex. A read pipelines GETs and receives each value straight into
its page; a write asks STRLEN first, which tells what is there and whole and keeps it young, and SETs the rest. Room is
the server's business: what maxmemory evicted is a miss, and a server that will not evict rejects.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import redis

from storage_backends.base import BackendOptions, Capabilities, Dispatcher, Outcome, Residency, ResidencyListener
from storage_backends.object_backend import Group, ObjectBackend, TooLate, Unreachable
from storage_backends.redis.options import RedisOptions
from storage_backends.redis.recheck import Recheck
from storage_backends.redis.resp import ReplyError, Resp, command, command_around
from storage_backends.redis.servers import Node, Servers
from storage_backends.secrets import load_secret
from storage_backends.wire import Part, WireError, WireTimeout

_REDIRECTS = 4

Send = Callable[[int], Sequence[Part]]
"""The command for item number i."""

Receive = Callable[[Resp, int], ReplyError | None]
"""Take the answer for item number i; an error that `_elsewhere` knows is returned, to be asked again elsewhere."""


class RedisBackend(ObjectBackend):
    """Pages in one Redis server, a master behind sentinels, or a cluster."""

    Options = RedisOptions
    capabilities = Capabilities(persistent=True, shared=True, native_ttl=True, max_page_bytes=(512 << 20) - 65536)
    options: RedisOptions

    def __init__(self, options: RedisOptions, dispatcher: Dispatcher) -> None:
        super().__init__(options, dispatcher)
        self._servers = Servers(options, load_secret("password", options.password_env, options.password_file))
        self._wires: set[Resp] = set()
        self._free: defaultdict[Node, list[Resp]] = defaultdict(list)
        self._lock = threading.Lock()
        self._recheck: Recheck | None = None

    @classmethod
    def check(cls, options: BackendOptions) -> None:
        super().check(options)
        assert isinstance(options, RedisOptions)
        options.checked()

    def sizes(self, names: list[str]) -> list[int]:
        sizes = [-1] * len(names)

        def receive(wire: Resp, i: int) -> ReplyError | None:
            answer = wire.reply()
            if isinstance(answer, ReplyError):
                return answer
            sizes[i] = int(answer) or -1  # an empty value and none are the same to STRLEN
            return None

        self._ask(names, lambda i: [command("STRLEN", names[i])], receive)
        return sizes

    def read_group(self, group: Group) -> None:
        pages = list(group.open)
        names = [self.name(group, page) for page in pages]

        def receive(wire: Resp, i: int) -> ReplyError | None:
            head = bytearray(group.form.head_bytes)
            got = wire.value_into([memoryview(head), *group.batch.buffers(pages[i])])
            if isinstance(got, ReplyError):
                return got
            if got == -1:
                self.absent(group, pages[i])
            elif got != group.form.size:
                group.set_corrupt(pages[i])
            else:
                self.arrived(group, pages[i], head)
            return None

        self._ask(names, lambda i: [command("GET", names[i])], receive)

    def write_group(self, group: Group) -> None:
        pages = list(group.open)
        names = [self.name(group, page) for page in pages]
        ttl = ("EX", str(self.options.ttl)) if self.options.ttl else ()

        def send(i: int) -> list[Part]:
            head, buffers = group.form.prepare(group.batch, pages[i])
            before, behind = command_around(("SET", names[i]), group.form.size, ttl)
            return [before, head, *buffers, behind]

        def receive(wire: Resp, i: int) -> ReplyError | None:
            answer = wire.reply()
            if answer == b"OK":
                self.stored(group, pages[i])
            elif isinstance(answer, ReplyError) and answer.kind == "OOM":
                self.count("rejected")
                group.settle(pages[i], Outcome.REJECTED)
            elif isinstance(answer, ReplyError):
                return answer
            return None

        self._ask(names, send, receive)

    def touch(self, names: list[str]) -> None:
        if self.options.ttl:
            self._ask(names, lambda i: [command("EXPIRE", names[i], str(self.options.ttl))], _ignore)

    def delete(self, names: list[str]) -> list[bool]:
        were = [False] * len(names)

        def receive(wire: Resp, i: int) -> ReplyError | None:
            answer = wire.reply()
            if isinstance(answer, ReplyError):
                return answer
            were[i] = answer == 1
            return None

        self._ask(names, lambda i: [command("UNLINK", names[i])], receive)
        return were

    def on_residency(self, listener: ResidencyListener | None) -> None:
        super().on_residency(listener)
        if listener is not None and self.options.recheck and self._recheck is None:
            self._recheck = Recheck(self.options.recheck, self._presence, self._still_there, self._evicted)

    def _still_there(self, namespace: bytes, keys: list[bytes]) -> list[bool] | None:
        """Of each page, whether the server has it; does not make it younger, as STRLEN would."""
        names, found = self._names(namespace, keys), [True] * len(keys)
        forbidden: list[ReplyError] = []

        def receive(wire: Resp, i: int) -> ReplyError | None:
            answer = wire.reply()
            if isinstance(answer, ReplyError):
                if answer.kind != "NOPERM":
                    return answer
                forbidden.append(answer)
            found[i] = answer == 1
            return None

        if self._attempt("recheck", lambda: self._ask(names, lambda i: [command("EXISTS", names[i])], receive)):
            return None
        if forbidden:
            assert self._recheck is not None
            self._recheck.close()
            self._once("recheck", "redis: evicted pages go unnoticed until they are asked for: %s", forbidden[0])
            return None
        return found

    def _evicted(self, namespace: bytes, keys: list[bytes]) -> None:
        self.count("evicted", len(keys))
        self.report(Residency.REMOVED, namespace, b"".join(keys))

    def stats(self) -> Mapping[str, int | float | str]:
        """evicted: pages that were not there any more when they were asked for again in the background."""
        return {**super().stats(), "evicted": self.counts["evicted"]}

    def clear_start(self, start: str) -> None:
        client = self._servers.client()
        try:
            found: list[bytes] = []
            for name in client.scan_iter(match=start + "*", count=1000):
                found.append(name)
                if len(found) == 500:
                    self.delete([one.decode() for one in found])
                    found.clear()
            self.delete([one.decode() for one in found])
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise Unreachable(str(error)) from None
        finally:
            if not self.options.cluster:
                client.close()

    def versions(self) -> dict[str, str]:
        found = {"redis-py": redis.__version__}
        with contextlib.suppress(Exception):  # a server that is away, or a user who may not ask it
            client = self._servers.client()
            told = client.info("server")
            told = next(iter(told.values())) if self.options.cluster else told
            name = str(told.get("server_name", "redis"))
            found["server"] = f"{name} {told.get(f'{name}_version', told.get('redis_version'))}"
            if not self.options.cluster:
                client.close()
        return found

    def abort(self) -> None:
        if self._recheck is not None:
            self._recheck.close()
        with self._lock:
            wires = list(self._wires)
        for wire in wires:
            wire.abort()

    def close(self) -> None:
        super().close()
        with self._lock:
            idle = [wire for free in self._free.values() for wire in free]
            self._free.clear()
        for wire in idle:
            self._drop(wire)
        with contextlib.suppress(Exception):  # redis-py's, about servers that are gone
            self._servers.close()

    # ---- commands

    def _ask(self, names: list[str], send: Send, receive: Receive) -> None:
        """One command for each name, pipelined per server; follows a cluster's redirections.

        Raises what costs them all, and an answer that is an error otherwise, when all others have been taken.
        """
        by_node: defaultdict[Node, list[int]] = defaultdict(list)
        for i, name in enumerate(names):
            by_node[self._servers.node_of(name)].append(i)
        refused: list[tuple[int, ReplyError]] = []
        for node, items in by_node.items():
            refused += self._pipeline(node, items, send, receive)
        for _ in range(_REDIRECTS):
            if not refused:
                return
            again: list[tuple[int, ReplyError]] = []
            for i, error in refused:
                again += self._pipeline(self._elsewhere(names[i], error), [i], send, receive, error.kind == "ASK")
            refused = again
        raise refused[0][1]

    def _elsewhere(self, name: str, error: ReplyError) -> Node:
        """Where to ask again after this error; raises it where there is no such place."""
        match error.kind:
            case "ASK":
                host, _, port = str(error).split()[2].rpartition(":")
                return host, int(port)
            case "MOVED" | "READONLY":
                self._servers.changed()
                return self._servers.node_of(name)
        raise error

    def _pipeline(
        self,
        node: Node,
        items: list[int],
        send: Callable[[int], Sequence[Part]],
        receive: Receive,
        asking: bool = False,
    ) -> list[tuple[int, ReplyError]]:
        """These commands over one connection, answers in order; the errors among them. Once more, on a new
        connection, for what an idle one that had died left over."""
        left, refused = list(items), []
        while left:
            wire = self._take(node)
            try:
                if asking:
                    wire.send([command("ASKING")])
                    wire.reply()
                small: list[Part] = []
                for i in left:
                    parts = send(i)
                    small += parts
                    if len(parts) > 1:  # a page: on its way before the next one is prepared
                        wire.send(small)
                        small = []
                wire.send(small)
                while left:
                    error = receive(wire, left[0])
                    if error is not None:
                        refused.append((left[0], error))
                    left.pop(0)
            except WireTimeout as error:
                self._drop(wire)
                raise TooLate(f"{node[0]}:{node[1]}: {error}") from None
            except WireError as error:
                self._drop(wire)
                self._drop_idle(node)
                if not wire.idle or self._closing:
                    self._moved_away()
                    raise Unreachable(f"{node[0]}:{node[1]}: {error}") from None
            except BaseException:
                self._drop(wire)  # answers that nobody has taken are on their way
                raise
            else:
                wire.idle = True
                with self._lock:
                    if not self._closing:
                        self._free[node].append(wire)
                        continue
                self._drop(wire)
        return refused

    # ---- connections

    def _take(self, node: Node) -> Resp:
        with self._lock:
            if self._free[node]:
                return self._free[node].pop()
        if self._closing:
            raise Unreachable("closing")
        try:
            wire = self._servers.connect(node)
        except Unreachable:
            self._moved_away()
            raise
        self.count("connects")
        with self._lock:
            self._wires.add(wire)
        if self._closing:
            wire.abort()
        return wire

    def _moved_away(self) -> None:
        """The server is gone: sentinels or the cluster may have chosen another."""
        with contextlib.suppress(Unreachable):
            self._servers.changed()

    def _drop(self, wire: Resp) -> None:
        with self._lock:
            self._wires.discard(wire)
        wire.close()

    def _drop_idle(self, node: Node) -> None:
        with self._lock:
            idle, self._free[node] = self._free[node], []
        for wire in idle:
            self._drop(wire)


def _ignore(wire: Resp, _: int) -> None:
    wire.reply()

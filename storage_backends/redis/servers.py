"""Which Redis server holds a name, and a connection to it: one server, sentinels or a cluster.

Belongs here: everything that redis-py does for us (addresses, hand-shakes, TLS, topology). Does not belong here: pages.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import Sentinel

from storage_backends.object_backend import Unreachable
from storage_backends.redis.resp import Resp

if TYPE_CHECKING:
    from storage_backends.redis.options import RedisOptions

Node = tuple[str, int]
"""Host and port; a unix socket's path and 0."""


class Servers:
    """The servers of one configuration. Asked for addresses when they are needed, so a server may come later."""

    def __init__(self, options: RedisOptions, password: SecretStr | None) -> None:
        self._options = options
        address = parse_url(options.url)
        self._unix = address.get("path") is not None
        self._first: Node = (
            (address["path"], 0) if self._unix else (address.get("host", "127.0.0.1"), address.get("port", 6379))
        )
        self._common: dict[str, Any] = {
            "socket_timeout": options.timeout,
            "socket_connect_timeout": options.connect_timeout,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        if password is not None:
            self._common["password"] = password.get_secret_value()
        if options.username:
            self._common["username"] = options.username
        if address.get("db") and not options.cluster:
            self._common["db"] = address["db"]
        self._tls: dict[str, Any] = {}
        if options.url.startswith("rediss:"):
            files = {"ssl_ca_certs": options.tls_ca, "ssl_certfile": options.tls_cert, "ssl_keyfile": options.tls_key}
            self._tls = {key: str(path) for key, path in files.items() if path is not None}
        self._secure = options.url.startswith("rediss:")
        self._lock = threading.Lock()
        self._master: Node | None = None
        self._cluster: Any = None

    def node_of(self, name: str) -> Node:
        """The server that this name belongs to. Raises Unreachable."""
        if self._options.cluster:
            return self._in_cluster(name)
        if self._options.sentinels:
            return self._behind_sentinels()
        return self._first

    def connect(self, node: Node) -> Resp:
        """A new connection, authenticated. Raises Unreachable."""
        host, port = node
        # The greeting is waited for no longer than the connection: nobody can abort it before it is a wire.
        common = self._common | {"socket_timeout": self._options.connect_timeout}
        try:
            if self._unix:
                del common["socket_connect_timeout"]
                connection = UnixDomainSocketConnection(path=host, **common)
            else:
                kind = SSLConnection if self._secure else Connection
                connection = kind(host=host, port=port, socket_keepalive=True, **common, **self._tls)
            connection.connect()
            return Resp(connection._sock, self._options.timeout, connection)
        except (redis.RedisError, OSError) as error:
            raise Unreachable(f"{host}:{port}: {error}") from None

    def changed(self) -> None:
        """A server said that it is not the one any more: ask again who is."""
        with self._lock:
            self._master = None
            cluster = self._cluster
        if cluster is not None:
            try:
                cluster.nodes_manager.initialize()
            except (redis.RedisError, OSError) as error:
                raise Unreachable(str(error)) from None

    def client(self) -> Any:
        """A client of redis-py for what is not about pages. Raises Unreachable."""
        if self._options.cluster:
            return self._slots()
        host, port = self._behind_sentinels() if self._options.sentinels else self._first
        if self._unix:
            return redis.Redis(unix_socket_path=host, **self._common)
        return redis.Redis(host=host, port=port, ssl=self._secure, **self._common, **self._tls)

    def close(self) -> None:
        with self._lock:
            cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()

    def _behind_sentinels(self) -> Node:
        with self._lock:
            if self._master is None:
                limits = {"socket_timeout": self._options.connect_timeout, "retry": Retry(NoBackoff(), 0)}
                sentinel = Sentinel(list(map(_host_port, self._options.sentinels)), sentinel_kwargs=limits)
                try:
                    self._master = sentinel.discover_master(self._options.service)
                except (redis.RedisError, OSError) as error:
                    raise Unreachable(f"sentinels: {error}") from None
                finally:
                    for client in sentinel.sentinels:
                        client.close()
            return self._master

    def _slots(self) -> Any:
        with self._lock:
            if self._cluster is None:
                try:
                    self._cluster = RedisCluster(
                        startup_nodes=[ClusterNode(*self._first)], require_full_coverage=False, ssl=self._secure,
                        **self._common, **self._tls,
                    )  # fmt: skip
                except (redis.RedisError, OSError) as error:
                    raise Unreachable(f"cluster: {error}") from None
            return self._cluster

    def _in_cluster(self, name: str) -> Node:
        try:
            node = self._slots().nodes_manager.get_node_from_slot(key_slot(name.encode()))
        except redis.RedisError as error:
            raise Unreachable(f"cluster: {error}") from None
        return node.host, node.port


def _host_port(text: str) -> Node:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)

"""The options of the redis tier."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field

from storage_backends.base import OptionError
from storage_backends.object_backend import ObjectOptions
from storage_backends.secrets import load_secret


class RedisOptions(ObjectOptions):
    """url: redis://host:port/db, rediss:// for TLS, unix:///path/of/socket. Without a password, see below.

    cluster: url is one node of a cluster. sentinels, service: "host:port" of each and the master's name; url then
    says only the scheme and the db.
    username: of an ACL user. password_env, password_file: variable or file with the password.
    tls_ca, tls_cert, tls_key: files (PEM); the client's own certificate only where the server asks for one.
    ttl: seconds after which the server drops a page that nobody stored again (0: never).
    recheck: pages a second that are asked for again in the background while somebody wants to hear of changes, so that
    what the server evicted is noticed (0: never).
    connect_timeout: seconds that a connection may take, and each answer to its greeting.
    """

    url: str = "redis://127.0.0.1:6379/0"
    cluster: bool = False
    sentinels: tuple[str, ...] = ()
    service: str = ""
    username: str = ""
    password_env: str = ""
    password_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    ttl: int = Field(0, ge=0)
    recheck: int = Field(100, ge=0, le=10_000)
    connect_timeout: float = Field(2.0, gt=0, le=60)

    def checked(self) -> None:
        """Raise OptionError for what cannot work. Connects to nothing: a server may come later."""
        try:
            parts = urlsplit(self.url)
            port_ok, secret = parts.port != 0, parts.password or parts.username
        except ValueError as error:
            raise OptionError("url", "(not shown)", str(error), "redis://host:port/db") from None
        if secret:
            raise OptionError("url", "(not shown)", "holds a user or password", "use username and password_env")
        if parts.scheme not in ("redis", "rediss", "unix") or not port_ok:
            raise OptionError("url", self.url, "is no address of a server", "redis://, rediss:// or unix://")
        if bool(self.sentinels) != bool(self.service):
            raise OptionError("service", self.service, "sentinels and service belong together", "give both or neither")
        if self.sentinels and self.cluster:
            raise OptionError("cluster", True, "a cluster has no sentinels", "remove one of them")
        for sentinel in self.sentinels:
            if not sentinel.rpartition(":")[2].isdigit():
                raise OptionError("sentinels", sentinel, "is not host:port", "write each as host:port")
        for key in ("tls_ca", "tls_cert", "tls_key"):
            path: Path | None = getattr(self, key)
            if path is not None and parts.scheme != "rediss":
                raise OptionError(key, str(path), "url does not ask for TLS", "write rediss:// in url")
            if path is not None and not path.is_file():
                raise OptionError(key, str(path), "is not a file", "name a PEM file")
        load_secret("password", self.password_env, self.password_file)

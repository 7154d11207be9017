"""The options of the s3 tier."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ByteSize, Field

from storage_backends.base import OptionError
from storage_backends.object_backend import ObjectOptions
from storage_backends.secrets import load_secret

#: S3's own limit for every part of an upload but the last.
_LEAST_PART = 5 << 20


class S3Options(ObjectOptions):
    """bucket: exists already. endpoint: of a store that is not Amazon's ("https://minio.example.com:9000").

    region: Amazon's region; most other stores take any.
    allow_http: whether an endpoint without TLS may be used.
    tls_ca: file (PEM) with an authority to trust besides the system's.
    access_key_*, secret_key_*, session_token_env: variables or files with the credentials. None of them: the usual
    AWS_* variables, a web identity, the container's or the machine's own role.
    multipart_size: bytes from which an object is uploaded in several parts.
    """

    bucket: str = Field(min_length=1)
    endpoint: str = ""
    region: str = "us-east-1"
    allow_http: bool = False
    tls_ca: Path | None = None
    access_key_env: str = ""
    access_key_file: Path | None = None
    secret_key_env: str = ""
    secret_key_file: Path | None = None
    session_token_env: str = ""
    multipart_size: ByteSize = ByteSize(64 << 20)
    connections: int = Field(16, ge=1, le=256)
    timeout: float = Field(10.0, ge=0.01, le=600)

    def checked(self) -> None:
        """Raise OptionError for what cannot work. Connects to nothing: a server may come later."""
        try:
            parts = urlsplit(self.endpoint)
            secret = parts.password or parts.username
        except ValueError as error:
            raise OptionError("endpoint", "(not shown)", str(error), "https://host:port") from None
        if secret:
            raise OptionError(
                "endpoint", "(not shown)", "holds a user or password", "use access_key_env and secret_key_env"
            )
        if self.endpoint and parts.scheme not in ("http", "https"):
            raise OptionError("endpoint", self.endpoint, "is no address of a server", "https://host:port")
        if parts.scheme == "http" and not self.allow_http:
            raise OptionError("endpoint", self.endpoint, "has no TLS", "write https://, or `allow_http: true`")
        if self.tls_ca is not None and not self.tls_ca.is_file():
            raise OptionError("tls_ca", str(self.tls_ca), "is not a file", "name a PEM file")
        if self.multipart_size < _LEAST_PART:
            raise OptionError("multipart_size", self.multipart_size, "parts have at least 5 MiB", "write 5MiB or more")
        self.credentials()

    def credentials(self) -> dict[str, str]:
        """What obstore calls them, as far as they are given. Raises OptionError."""
        secrets = {
            "access_key_id": load_secret("access_key", self.access_key_env, self.access_key_file),
            "secret_access_key": load_secret("secret_key", self.secret_key_env, self.secret_key_file),
            "session_token": load_secret("session_token", self.session_token_env, None),
        }
        if (secrets["access_key_id"] is None) != (secrets["secret_access_key"] is None):
            raise OptionError(
                "access_key_env", self.access_key_env, "access and secret key belong together", "give both"
            )
        return {name: secret.get_secret_value() for name, secret in secrets.items() if secret is not None}

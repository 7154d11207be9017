"""The options of the nixl tier, and which plugins can be a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ByteSize, Field

from storage_backends.base import OptionError
from storage_backends.object_backend import ObjectOptions

if TYPE_CHECKING:
    from storage_backends.s3.options import S3Options

FILE_PLUGINS = ("POSIX", "GDS", "GDS_MT")
OBJECT_PLUGINS = ("OBJ",)
_GPU_PLUGINS = ("GDS", "GDS_MT")
_NO_STORE = {
    "UCX": "moves memory between two running agents and keeps nothing",
    "LIBFABRIC": "moves memory between two running agents and keeps nothing",
    "GPUNETIO": "moves memory between two running agents and keeps nothing",
}
_S3_KEYS = (
    "bucket", "endpoint", "region", "allow_http", "tls_ca", "access_key_env", "access_key_file", "secret_key_env",
    "secret_key_file", "session_token_env", "prefix", "connections", "timeout",
)  # fmt: skip
#: Parameters of plugins that hold secrets, or what an option of ours says: param -> our option.
_OURS = {
    "access_key": "access_key_env", "secret_key": "secret_key_env", "session_token": "session_token_env",
    "bucket": "bucket",
    "endpoint_override": "endpoint", "scheme": "endpoint", "region": "region", "ca_bundle": "tls_ca",
}  # fmt: skip


class NixlOptions(ObjectOptions):
    """plugin: POSIX, GDS or GDS_MT for files, OBJ for objects of a bucket. params: the plugin's own, as strings.

    path, capacity: of file plugins: the directory, and how much may lie in it; the pages used longest ago make room.
    bucket, endpoint, region, allow_http, tls_ca, *_key_*, session_token_env: of OBJ, as those of the s3 tier.
    connections: groups of up to 8 pages that travel at the same time. in_flight: bytes that do.
    """

    plugin: str = "POSIX"
    params: dict[str, str] = Field(default_factory=dict)
    path: Path | None = None
    capacity: ByteSize | None = Field(None, gt=0)
    in_flight: ByteSize = Field(ByteSize(256 << 20), ge=1 << 20)
    bucket: str = ""
    endpoint: str = ""
    region: str = "us-east-1"
    allow_http: bool = False
    tls_ca: Path | None = None
    access_key_env: str = ""
    access_key_file: Path | None = None
    secret_key_env: str = ""
    secret_key_file: Path | None = None
    session_token_env: str = ""
    timeout: float = Field(10.0, ge=0.01, le=600)

    @property
    def files(self) -> bool:
        return self.plugin in FILE_PLUGINS

    @property
    def needs_gpu(self) -> bool:
        return self.plugin in _GPU_PLUGINS

    def checked(self) -> None:
        """Raise OptionError for what cannot work. Opens nothing: a server or a share may come later."""
        if self.plugin not in FILE_PLUGINS + OBJECT_PLUGINS:
            problem = _NO_STORE.get(self.plugin, "is not a plugin that this tier can keep pages with")
            raise OptionError(
                "plugin", self.plugin, problem, "POSIX, GDS, GDS_MT or OBJ; to other hosts' memory: type mooncake"
            )
        if self.params.get("use_posix_aio", "false") not in ("false", "0"):
            raise OptionError(
                "params", "use_posix_aio", "reports a failed transfer while other parts of it still move",
                "use_aio, which is the plugin's default, or use_uring",
            )  # fmt: skip
        for name in self.params:
            if name in _OURS:
                raise OptionError("params", name, "is said by an option of this tier", f"use {_OURS[name]}")
        if self.files:
            self._check_files()
        else:
            self._check_objects()

    def _check_files(self) -> None:
        given = [name for name in ("bucket", "endpoint", "access_key_env", "secret_key_env") if getattr(self, name)]
        if given:
            raise OptionError(given[0], getattr(self, given[0]), f"is not for {self.plugin}", "plugin: OBJ has buckets")
        if self.path is None:
            raise OptionError("path", None, f"{self.plugin} keeps pages in files", "name a directory")
        if self.path.exists() and not self.path.is_dir():
            raise OptionError("path", str(self.path), "is not a directory", "name a directory")
        if self.capacity is None:
            raise OptionError("capacity", None, "nothing else bounds the disk's use", "write for example 200GiB")

    def _check_objects(self) -> None:
        for name in ("path", "capacity"):
            if getattr(self, name) is not None:
                raise OptionError(
                    name, str(getattr(self, name)), "OBJ keeps pages in a bucket",
                    "leave it out; a lifecycle rule of the bucket removes old pages",
                )  # fmt: skip
        if not self.bucket:
            raise OptionError("bucket", self.bucket, "OBJ keeps pages in a bucket", "name one that exists")
        self.s3().checked()

    def s3(self) -> S3Options:
        """The same bucket as options of the s3 tier. Raises OptionError where that is not installed."""
        try:
            from storage_backends.s3.options import S3Options
        except ImportError as error:
            problem = f"NIXL cannot ask what is in a bucket, and the s3 tier's client is missing ({error})"
            raise OptionError("plugin", self.plugin, problem, "pip install 'hicache-ext[nixl,s3]'") from None
        return S3Options.model_validate({name: getattr(self, name) for name in _S3_KEYS})

    def plugin_params(self) -> dict[str, str]:
        """What the plugin is opened with. Holds secrets: not to be shown."""
        if self.files:
            return dict(self.params)
        secret_names = {
            "access_key_id": "access_key", "secret_access_key": "secret_key", "session_token": "session_token",
        }  # fmt: skip
        params = {"bucket": self.bucket, "region": self.region, "num_threads": str(min(64, 2 * self.connections))}
        params.update({secret_names[name]: value for name, value in self.s3().credentials().items()})
        if self.endpoint:
            params["endpoint_override"] = self.endpoint
            params["scheme"] = self.endpoint.partition(":")[0]
        if self.tls_ca is not None:
            params["ca_bundle"] = str(self.tls_ca)
        return {**params, **self.params}

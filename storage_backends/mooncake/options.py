"""The options of the mooncake tier."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field

from storage_backends.base import OptionError
from storage_backends.object_backend import ObjectOptions

PEER_TO_PEER = "P2PHANDSHAKE"
_METADATA = ("http://", "https://", "etcd://", "redis://")


class MooncakeOptions(ObjectOptions):
    """master: "host:port" of mooncake_master.

    metadata: where clients find each other: an address (http://host:8080/metadata, etcd://, redis://), the same for all
    clients of a store; P2PHANDSHAKE: they ask each other, and nothing but the master is needed.
    host: this machine's name or address as other clients reach it. Empty: the one that leads to the master.
    protocol, devices: tcp, or rdma with the names of its devices ("mlx5_0,mlx5_1"; empty: Mooncake chooses).
    segment: bytes of this machine's memory that are given to the store; 0 where other machines have them.
    replicas: copies of a page in the store, each on another segment.
    buffer: bytes of memory through which pages travel that lie in memory of which Mooncake knows nothing.
    direct: whether the host pool is made known to Mooncake, so that pages travel from and to it without a copy. None:
    with rdma; over tcp each piece of a page is a request of its own, which costs more than the copy into one piece.
    log: a file for what Mooncake itself has to say.
    """

    master: str = "127.0.0.1:50051"
    metadata: str = PEER_TO_PEER
    host: str = ""
    protocol: Literal["tcp", "rdma"] = "tcp"
    devices: str = ""
    segment: ByteSize = ByteSize(0)
    replicas: int = Field(1, ge=1, le=16)
    buffer: ByteSize = ByteSize(128 << 20)
    direct: bool | None = None
    log: Path | None = None
    timeout: float = Field(10.0, ge=0.1, le=600)

    @property
    def is_direct(self) -> bool:
        """Whether pages are moved where they lie."""
        return self.protocol == "rdma" if self.direct is None else self.direct

    @property
    def address(self) -> tuple[str, int]:
        """The master's host and port."""
        host, _, port = self.master.rpartition(":")
        return host.strip("[]"), int(port)

    def checked(self) -> None:
        """Raise OptionError for what cannot work. Connects to nothing: a master may come later."""
        host, _, port = self.master.rpartition(":")
        if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise OptionError("master", self.master, "is not host:port", "write host:port, without http://")
        if self.metadata != PEER_TO_PEER and not self.metadata.startswith(_METADATA):
            raise OptionError(
                "metadata", self.metadata, "is no address of a metadata server",
                f"{PEER_TO_PEER}, or http://host:port/metadata",
            )  # fmt: skip
        if self.devices and self.protocol != "rdma":
            raise OptionError("devices", self.devices, "are for rdma", "write `protocol: rdma`, or leave them out")
        if 0 < self.segment < 16 << 20:
            raise OptionError("segment", int(self.segment), "is too small to be a segment", "0, or 16MiB and more")
        if self.buffer < (1 << 20) * self.connections:
            raise OptionError(
                "buffer", int(self.buffer), "is less than 1 MiB for each connection",
                f"{self.connections}MiB or more, and room for a page on each connection",
            )  # fmt: skip
        if self.log is not None and not self.log.parent.is_dir():
            raise OptionError("log", str(self.log), "its folder does not exist", "name a file in one that does")
        if importlib.util.find_spec("mooncake") is None:
            raise OptionError(
                "type", "mooncake", "the package mooncake is not installed",
                "pip install 'hicache-ext[mooncake]'; on a machine without CUDA mooncake-transfer-engine-non-cuda",
            )  # fmt: skip

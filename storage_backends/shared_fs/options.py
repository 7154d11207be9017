"""The options of the shared_fs tier."""

from __future__ import annotations

from pathlib import Path

from pydantic import ByteSize, Field

from storage_backends.base import BackendOptions, OptionError
from storage_backends.secrets import load_seal

#: Clocks of hosts may be this far apart (seconds), so no age below it means anything.
SKEW_SECONDS = 3600.0
_SEGMENTS_IN_CAPACITY = 8


class SharedFsOptions(BackendOptions):
    """path: directory on the share; the last part of it is made if need be.

    mount: mount point that must be mounted before `path` is used, so that nothing fills the disk below it.
    capacity: bytes that all hosts together may keep there; 0: no limit. Give all of them the same.
    ttl: seconds since its last use after which a segment is removed; 0: never.
    segment_size: bytes of pages in one file.
    linger: seconds after which a segment that is not full is closed, and seen by other hosts.
    refresh: seconds between two looks for other hosts' segments, at least.
    threads: transfers at the same time.
    timeout: seconds after which a share that does not answer is away.
    index_pages: pages that are remembered, at about 300 bytes of memory each; the oldest ones are forgotten.
    fsync: whether segments are on the server's disk before others see them.
    direct: whether to use O_DIRECT where the share does it.
    seal_key_env, seal_key_file: variable or file with a key (64 hex digits): pages are sealed with AES-256-GCM.
    """

    path: Path
    mount: Path | None = None
    capacity: ByteSize = ByteSize(0)
    ttl: float = Field(0.0, ge=0)
    segment_size: ByteSize = Field(ByteSize(128 << 20), ge=1 << 20, le=4 << 30)
    linger: float = Field(1.0, ge=0, le=60)
    refresh: float = Field(2.0, ge=0.05, le=3600)
    threads: int = Field(8, ge=1, le=256)
    timeout: float = Field(10.0, ge=0.1, le=600)
    index_pages: int = Field(1_000_000, ge=1000)
    fsync: bool = False
    direct: bool = True
    seal_key_env: str = ""
    seal_key_file: Path | None = None

    def checked(self) -> None:
        """Raise OptionError for what cannot work. Looks at nothing on the share: it may come later, or hang."""
        if not self.path.is_absolute():
            raise OptionError("path", str(self.path), "is not absolute", "write /mnt/share/hicache")
        if self.mount is not None and not self.path.is_relative_to(self.mount):
            raise OptionError("mount", str(self.mount), "`path` is not below it", "name the share's mount point")
        if self.capacity and self.capacity < 1 << 20:
            raise OptionError("capacity", int(self.capacity), "is too small", "write 1MiB or more, or 0 for no limit")
        if 0 < self.ttl < SKEW_SECONDS:
            raise OptionError(
                "ttl", self.ttl, "clocks of hosts may be an hour apart", "write 3600 or more, or 0 for never"
            )
        load_seal(self.seal_key_env, self.seal_key_file)

    @property
    def segment_bytes(self) -> int:
        """Bytes of pages in one file, small enough for several files to fit in the capacity."""
        limit = int(self.capacity) // _SEGMENTS_IN_CAPACITY
        return min(int(self.segment_size), limit) if limit else int(self.segment_size)

"""Options of the memory tier.

Belongs here: keys and defaults. Does not belong here: what they lead to (backend.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ByteSize, Field

from storage_backends.base import BackendOptions


class MemoryOptions(BackendOptions):
    """capacity: bytes for pages ("64GiB"), taken as they fill, or all at once where they are pinned; of a region that
    is there already, its own counts.
    region: name under which other processes of this user find the same pages; empty: this process's alone.
    directory: where they meet; containers that share a region share this folder.
    threads: copies at the same time.
    pin: where an engine's KV lies on a GPU, take and pin all of `capacity` at the start: its pages then go straight to
    the GPU and back, past the CPU. false: they go through host memory of the engine's adapter.
    """

    capacity: ByteSize = Field(default=ByteSize(1 << 30), ge=1 << 18, le=1 << 42)
    region: str = Field("", pattern=r"^[A-Za-z0-9_-]{0,32}$")
    directory: Path = Field(default_factory=lambda: Path(f"/dev/shm/hicache-ext-{os.geteuid()}"))
    threads: int = Field(4, ge=1, le=64)
    pin: bool = True

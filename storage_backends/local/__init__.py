"""The local tier: pages in preallocated files on disks of this machine. See format.py for what is on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage_backends.local.backend import LocalBackend
    from storage_backends.local.options import LocalOptions

__all__ = ["LocalBackend", "LocalOptions"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: what only reads a directory does not need the backend.
    if name in __all__:
        from storage_backends.local import backend

        return getattr(backend, name)
    raise AttributeError(name)

"""A tier on a shared file system: NFS, Lustre, WEKA, VAST, 3FS. See segment.py for what is on the share."""

from storage_backends.shared_fs.backend import SharedFsBackend, SharedFsOptions

__all__ = ["SharedFsBackend", "SharedFsOptions"]

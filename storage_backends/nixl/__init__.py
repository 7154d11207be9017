"""A tier through a plugin of NVIDIA's NIXL: files (POSIX, GDS, GDS_MT) or objects of a bucket (OBJ).

Needs the extra `nixl`; OBJ also `s3`.
"""

from storage_backends.nixl.backend import NixlBackend, NixlOptions

__all__ = ["NixlBackend", "NixlOptions"]

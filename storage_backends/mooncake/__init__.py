"""A tier in a Mooncake store, over TCP or RDMA. Needs the extra `mooncake`."""

from storage_backends.mooncake.backend import MooncakeBackend, MooncakeOptions

__all__ = ["MooncakeBackend", "MooncakeOptions"]

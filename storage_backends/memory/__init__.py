"""`memory`: a tier in this machine's DRAM that the processes of one user share."""

from storage_backends.memory.backend import MemoryBackend
from storage_backends.memory.options import MemoryOptions

__all__ = ["MemoryBackend", "MemoryOptions"]

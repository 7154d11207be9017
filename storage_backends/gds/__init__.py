"""GPU-direct storage: a local tier whose pages may also come from and go to device memory, through NVIDIA's cuFile.

Belongs here, by file:

    GdsBackend      the tier (backend.py); its options (options.py)
    decision.py     whether cuFile is used here and how, decided once by a trial in a process of its own (trial.py)
    volume.py       why cuFile takes no file of a directory
    route.py        cuFile open in this process: registered memory, files, lanes
    slots.py        pages between slots and device memory: the order of steps, verification on the device
"""

from storage_backends.gds.backend import GdsBackend

__all__ = ["GdsBackend"]

"""Libraries that stand in for CUDA's driver and for cuFile, as tests see them: their switches, counters and memory.

Belongs here: what stand_in_driver.c and stand_in_cufile.c offer to whoever loaded them. Does not belong here: cases.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

from storage_backends.base import PageBatch
from tests.pages import HostPool


def library(name: str) -> Any:
    return ctypes.CDLL({"cuda": "libcuda.so.1", "cufile": "libcufile.so.0"}[name])


def set_number(name: str, value: int) -> None:
    for one in ("cuda", "cufile"):
        try:
            (ctypes.c_int if one == "cuda" else ctypes.c_ssize_t).in_dll(library(one), f"stand_in_{name}").value = value
        except (OSError, ValueError):  # not there, or it has no such switch
            continue


def number(name: str) -> int:
    return ctypes.c_long.in_dll(library("cufile"), f"stand_in_{name}").value


class OnDevice(HostPool):
    """Pages in what the driver takes for device memory."""

    def __init__(self, space: Any, pages: int, declared: bool = True) -> None:
        super().__init__(space, pages)
        if declared:
            library("cuda").stand_in_device_memory(
                ctypes.c_uint64(self.memory.address), ctypes.c_uint64(self.memory.size)
            )

    def batch(self, *arguments: Any, **named: Any) -> PageBatch:
        return replace(super().batch(*arguments, **named), memory="device")

    def pull(self) -> None:
        """It is host memory all along."""


class OnGpu:
    """A tensor of host memory that says it lies on a GPU; so do its views."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self.tensor, self.device = tensor, torch.device("cuda:0")
        memory = tensor.untyped_storage()
        library("cuda").stand_in_device_memory(ctypes.c_uint64(memory.data_ptr()), ctypes.c_uint64(memory.nbytes()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def __getitem__(self, where: Any) -> OnGpu:
        return OnGpu(self.tensor[where])

    def permute(self, *order: int) -> OnGpu:
        return OnGpu(self.tensor.permute(*order))

    def as_strided(self, *where: Any) -> OnGpu:
        return OnGpu(self.tensor.as_strided(*where))

    def unbind(self, dimension: int) -> list[OnGpu]:
        return [OnGpu(part) for part in self.tensor.unbind(dimension)]

"""Pages in a GPU's memory, for tests that move them there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from storage_backends.base import PageBatch
from tests.pages import HostPool


class GpuPool(HostPool):
    """Pages on the device, and their mirror in host memory: `bytes` is as of the last `pull`."""

    def __init__(self, space: Any, pages: int, skew: int = 0) -> None:
        super().__init__(space, pages, skew)
        self.device = torch.zeros(self.memory.size, dtype=torch.uint8, device="cuda")
        self.mirror = torch.from_numpy(self.bytes)

    def batch(self, *arguments: Any, **named: Any) -> PageBatch:
        made = super().batch(*arguments, **named)
        addresses = made.addresses - np.uint64(self.memory.address) + np.uint64(self.device.data_ptr())
        return replace(made, addresses=addresses, owner=self.device, memory="device")

    def write_batch(self, *arguments: Any, **named: Any) -> PageBatch:
        made = super().write_batch(*arguments, **named)
        self.push()
        return made

    def poison(self) -> None:
        super().poison()
        self.push()

    def get(self, page: int) -> np.ndarray:
        self.pull()
        return super().get(page)

    def push(self) -> None:
        self.device.copy_(self.mirror)
        torch.cuda.synchronize()

    def pull(self) -> None:
        self.mirror.copy_(self.device)
        torch.cuda.synchronize()

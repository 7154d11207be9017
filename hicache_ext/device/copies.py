"""Pages between device pools and slots: one interface, two ways, chosen once at open and said.

Belongs here: copying whole pages and layer after layer. Does not belong here: which pages (engines' adapters), or how a
GPU copies (hicache_ext.cuda).

`BlockCopies` uses the block copies of hicache_ext.cuda and is for CUDA pools. `TorchCopies` uses torch's indexing:
plain memory copies where the pools lie in host memory, and what is left where the block copies cannot be had.

A call returns when nothing of it touches memory any more, whether it worked or raised.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hicache_ext.cuda import BlockShape, Copier, CopyError, CudaUnavailable, Side
from hicache_ext.device.planes import HostSlots, Plane, Pool, Slots

logger = logging.getLogger(__name__)

Numbers = NDArray[np.int64]

_BEFORE_OTHERS = -1


@dataclass(frozen=True)
class Part:
    """Pages of one pool: those in `slots` are, or become, those in `pages` of the pool, one by one."""

    pool: str
    slots: Numbers
    pages: Numbers


class Copies(Protocol):
    """name: for people."""

    name: str

    def store(self, part: Part) -> None:
        """From the pool to the slots."""

    def load(self, part: Part) -> None:
        """From the slots to the pool."""

    def load_layers(self, parts: Sequence[Part], layers: int, arrived: Callable[[int], None]) -> None:
        """As load, layer after layer; `arrived(layer)` once all of a layer is there, for each layer in order."""


def choose(pools: Mapping[str, Pool], sides: Sequence[Mapping[str, HostSlots]]) -> list[Copies]:
    """The copies between these pools and the slots of each side."""
    devices = {plane.buffer.device for pool in pools.values() for plane in pool.planes}
    kinds = {device.type for device in devices}
    why = "" if kinds == {"cpu"} else f"the pools lie on {', '.join(sorted(map(str, devices)))}"
    if kinds == {"cuda"} and len(devices) == 1:
        try:
            return [BlockCopies(pools, staging, next(iter(devices))) for staging in sides]
        except (CudaUnavailable, CopyError) as error:
            why = str(error)
    if why:
        logger.warning("hicache_ext: no block copies (%s): pages go through torch's indexing, slowly", why)
    return [TorchCopies(pools, staging) for staging in sides]


class TorchCopies:
    """By torch's indexing, on whatever device the pools are."""

    def __init__(self, pools: Mapping[str, Pool], staging: Mapping[str, HostSlots]) -> None:
        self._views = {
            name: [(plane.layer, *_views(plane, pool, staging[name])) for plane in pool.planes]
            for name, pool in pools.items()
        }
        self._device = next(plane.buffer.device for pool in pools.values() for plane in pool.planes)
        self.name = "memory copies" if self._device.type == "cpu" else "torch copies"
        self._stream = None if self._device.type == "cpu" else torch.get_device_module(self._device).Stream()

    def store(self, part: Part) -> None:
        with self._entered():
            slots, pages = torch.from_numpy(part.slots), self._there(part.pages)
            for _, device, slot in self._views[part.pool]:
                slot[slots] = device[pages].to("cpu")

    def load(self, part: Part) -> None:
        with self._entered():
            self._load(part, None)

    def load_layers(self, parts: Sequence[Part], layers: int, arrived: Callable[[int], None]) -> None:
        for layer in range(layers):
            with self._entered():
                for part in parts:
                    self._load(part, layer)
            arrived(layer)

    def _load(self, part: Part, only: int | None) -> None:
        slots, pages = torch.from_numpy(part.slots), self._there(part.pages)
        for layer, device, slot in self._views[part.pool]:
            if only is None or layer == only:
                device[pages] = slot[slots].to(self._device)

    def _there(self, numbers: Numbers) -> Any:
        return torch.from_numpy(numbers).to(self._device)

    @contextlib.contextmanager
    def _entered(self) -> Any:
        if self._stream is None:
            yield
            return
        try:
            with torch.get_device_module(self._device).stream(self._stream):
                yield
        finally:
            self._stream.synchronize()


def _views(plane: Plane, pool: Pool, staging: HostSlots) -> tuple[Any, Any]:
    """uint8 [pages, tokens, heads, run] of the plane in the pool, and in the slots."""
    flat = plane.buffer.view(torch.uint8)
    dims = (plane.tokens, plane.heads, plane.run)
    device = flat.as_strided((pool.pages, *dims), (plane.page, plane.token, plane.head, 1), flat.storage_offset())
    memory = torch.frombuffer(staging.view, dtype=torch.uint8)
    slot = memory.as_strided(
        (staging.slots, *dims), (staging.stride, plane.slot_token, plane.slot_head, 1), plane.at
    )  # fmt: skip
    return device, slot


class BlockCopies:
    """By hicache_ext.cuda, on a stream of its own. Planes of one shape and one stride make one copier."""

    def __init__(self, pools: Mapping[str, Pool], staging: Mapping[str, Slots], device: Any) -> None:
        """CudaUnavailable, CopyError: it cannot be had here."""
        self._copiers = {name: _copiers(pool, staging[name], device.index or 0) for name, pool in pools.items()}
        memory = sorted({one.copier.memory for group in self._copiers.values() for one in group})
        on_device = memory == ["device"]
        # Within the device a copy takes a few multiprocessors a tenth of a millisecond, and whoever waits behind the
        # blocks of a forward's kernels waits for many times that. Over PCIe it would keep them for a millisecond.
        self._stream = torch.cuda.Stream(device=device, priority=_BEFORE_OTHERS if on_device else 0)
        self.name = "block copies, " + ("slots on it" if on_device else f"{' and '.join(memory)} host memory")

    def store(self, part: Part) -> None:
        try:
            for one in self._copiers[part.pool]:
                one.copier.store(part.pages, part.slots, self._stream.cuda_stream)
        finally:
            self._stream.synchronize()

    def load(self, part: Part) -> None:
        try:
            for one in self._copiers[part.pool]:
                one.copier.load(part.slots, part.pages, self._stream.cuda_stream)
        finally:
            self._stream.synchronize()

    def load_layers(self, parts: Sequence[Part], layers: int, arrived: Callable[[int], None]) -> None:
        chosen = [(one, part) for part in parts for one in self._copiers[part.pool]]
        try:
            for one, part in chosen:
                one.copier.load_layers(part.slots, part.pages, self._stream.cuda_stream, one.events)
            for layer in range(layers):
                for one, _ in chosen:
                    if (last := one.last.get(layer)) is not None:
                        one.events.synchronize(last)
                arrived(layer)
        finally:
            self._stream.synchronize()


@dataclass(frozen=True)
class _Copier:
    """last: layer of the forward -> the copier's own layer whose end it waits for."""

    copier: Copier
    events: Any
    last: dict[int, int]


def copied_sides(pool: Pool, staging: Slots) -> list[tuple[BlockShape, Side, Side, dict[int, int]]]:
    """For each copier that a pool needs: shape, pools, pages, and which of its layers each layer waits for."""
    alike: dict[tuple[int, int, int, int, int, int, int, int], list[Plane]] = {}
    for plane in pool.planes:
        key = (
            plane.tokens, plane.heads, plane.run, plane.page, plane.token, plane.head, plane.slot_token, plane.slot_head
        )  # fmt: skip
        alike.setdefault(key, []).append(plane)
    found = []
    for key, planes in alike.items():
        tokens, heads, run, page, token, head, slot_token, slot_head = key
        layers = [plane.layer for plane in planes]
        each = {layers.count(layer) for layer in layers}
        kv = each.pop() if len(each) == 1 else 1
        last = {layer: number // kv for number, layer in enumerate(layers)}
        shape = BlockShape(len(planes) // kv, kv, tokens, heads, run)
        in_pool = Side(tuple(plane.buffer.data_ptr() for plane in planes), pool.pages, page, token, head)
        in_slots = Side(
            tuple(staging.address + plane.at for plane in planes), staging.slots, staging.stride, slot_token, slot_head
        )
        found.append((shape, in_pool, in_slots, last))
    return found


def _copiers(pool: Pool, staging: Slots, ordinal: int) -> list[_Copier]:
    made = []
    for shape, in_pool, in_slots, last in copied_sides(pool, staging):
        copier = Copier(shape, in_pool, in_slots, ordinal)
        made.append(_Copier(copier, copier.events(), last))
    return made

"""Cases of SGLang's linker over a gds tier, where a driver and a cuFile stand in: its loads and offloads, not SGLang.

Belongs here: pools in what that driver takes for device memory, and what a linker does between them and tiers. Does not
belong here: the tier (gds_cases.py, gds_worker.py), or the whole linker (sglang/, gpu/).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hicache_ext.device.planes import Plane
from hicache_ext.device.sides import Sides
from hicache_ext.page import Namespace, PageLayout
from hicache_ext.sglang import linker_sides
from hicache_ext.sglang.linker_loads import Load, Loads, Wanted
from hicache_ext.sglang.linker_offloads import Leaving, Offload, Offloads
from hicache_ext.sglang.linker_planes import DevicePool
from hicache_ext.sglang.stats import AdapterStats
from hicache_ext.store import TieredStore
from hicache_ext.store.tier import Tier
from storage_backends.base import Dispatcher, KeyBatch
from storage_backends.local import LocalBackend
from tests.gds_cases import flip, opened, place_of
from tests.pages import chain, namespace
from tests.stand_ins import OnDevice, OnGpu, number

LAYERS, TOKENS, ROW, PAGES = 4, 8, 512, 40


class Rows:
    """What a linker asks of SGLang's view of a pool. Indices are page numbers here."""

    def prepare_locations(self, indices: Any) -> Any:
        return np.asarray(indices) * TOKENS


class Linked:
    """A linker's loads and offloads, between a pool on the device and tiers."""

    def __init__(self, tiers: list[Tier]) -> None:
        torch.cuda.Stream = lambda device=None, priority=0: SimpleNamespace(cuda_stream=0x200, synchronize=lambda: None)
        planes, at = [], 0
        for layer in range(LAYERS):
            for _ in range(2):
                buffer = OnGpu(torch.zeros((PAGES * TOKENS, ROW), dtype=torch.uint8))
                planes.append(Plane(buffer, layer, TOKENS, 1, ROW, TOKENS * ROW, ROW, ROW, at, ROW, ROW))
                at += TOKENS * ROW
        layout = PageLayout("kv", "linker", "uint8", TOKENS, (at,))
        self.space = Namespace(model="0" * 64, weights="w", layout=layout)
        self.pool = DevicePool("kv", Rows(), layout, tuple(planes), None)
        self.store = TieredStore(tiers, Dispatcher())
        pools = {"kv": self.pool}
        incoming, outgoing = linker_sides.host_sides(pools, 1 << 20)
        past = linker_sides.device_sides(pools, self.store, 1 << 20)
        assert past[0] is not None
        self.sides = [Sides(incoming, past[0]), Sides(outgoing, past[1])]
        self.layers: list[int] = []
        self.ended: SimpleQueue[Any] = SimpleQueue()
        counter = SimpleNamespace(
            complete=lambda index, layer: self.layers.append(layer), fail=lambda index, error: None
        )
        self.loads = Loads(self.store, pools, self.sides[0], LAYERS, counter, lambda _, error: self.ended.put(error))
        self.offloads = Offloads(self.store, pools, self.sides[1], AdapterStats(per_batch=False))

    def fill(self, value: int | None = None) -> list[Any]:
        """Draw the pool's bytes, or set them; what they are then."""
        draw = np.random.default_rng(3)
        for plane in self.pool.planes:
            there = plane.buffer.tensor.numpy()
            there[:] = draw.integers(0, 256, there.shape, np.uint8) if value is None else value
        return [plane.buffer.tensor.clone().view(PAGES, -1) for plane in self.pool.planes]

    def offload(self, keys: list[str], pages: list[int]) -> bool:
        self.offloads.put(Offload({"kv": Leaving(self.space, keys, pages)}, []))
        until = time.monotonic() + 30
        while not self.offloads.completed():
            assert time.monotonic() < until
            time.sleep(0.002)
        return self.offloads.pop()

    def load(self, keys: list[str], pages: list[int]) -> Exception | None:
        self.layers.clear()
        self.loads.put(Load(0, {"kv": Wanted(self.space, keys, [pages])}, [], time.monotonic() + 30))
        return self.ended.get(timeout=60)

    def holds(self, wanted: list[Any], source: list[int], target: list[int]) -> bool:
        now = [plane.buffer.tensor.view(PAGES, -1) for plane in self.pool.planes]
        return all(bool((one[target] == other[source]).all()) for one, other in zip(now, wanted, strict=True))

    def close(self) -> None:
        self.loads.close()
        self.offloads.close()
        self.store.close()
        for sides in self.sides:
            sides.close()


def keys_of(first: int, count: int) -> list[str]:
    return [f"{first + i:064x}" for i in range(count)]


def pages_go_past_the_host(folder: Path) -> None:
    linked = Linked([Tier("gds", opened(folder))])
    keys, there, back = keys_of(1, 30), list(range(30)), list(range(9, 39))
    wanted = linked.fill()
    assert linked.offload(keys, there)
    assert number("writes"), "past the host"
    linked.fill(0xEE)
    assert linked.load(keys, back) is None
    assert linked.layers == list(range(LAYERS))
    assert linked.holds(wanted, there, back)
    assert number("reads"), "past the host"
    # The tier stops reaching the device: the same pages come through host memory, and new ones go that way.
    linked.store.tiers[0].backend._out("a test")
    before = number("reads"), number("writes")
    linked.fill(0xEE)
    assert linked.load(keys, back) is None
    assert linked.holds(wanted, there, back)
    wanted = linked.fill()
    more = keys_of(101, 30)
    assert linked.offload(more, there)
    linked.fill(0xEE)
    assert linked.load(more, back) is None
    assert linked.holds(wanted, there, back)
    assert (number("reads"), number("writes")) == before
    linked.close()
    assert number("registered") == 0


def a_bad_page_fails_its_load_alone(folder: Path) -> None:
    backend = opened(folder)
    linked = Linked([Tier("gds", backend)])
    keys, there, back = keys_of(1, 12), list(range(12)), list(range(20, 32))
    linked.fill()
    assert linked.offload(keys, there)
    file, at = place_of(backend, linked.space, bytes.fromhex(keys[5]))
    flip(file, at + 4096 + 77)
    untouched = linked.fill(0xEE)
    error = linked.load(keys, back)
    assert error is not None
    assert "1 corrupt of 8 pages" in str(error)
    assert linked.holds(untouched, back, back), "nothing of it reached the pool"
    assert linked.load(keys[:5], back[:5]) is None
    linked.close()


def with_a_tier_below_pages_are_written_through_the_host(folder: Path) -> None:
    """Its copies are made there. What lies in the first tier is read past the host all the same."""
    first, below = opened(folder), opened(folder.parent / "below", LocalBackend)
    linked = Linked([Tier("gds", first), Tier("below", below)])
    assert (linked.store.reads_to_device, linked.store.writes_from_device) == (0, False)
    keys, there, back = keys_of(1, 12), list(range(12)), list(range(20, 32))
    wanted = linked.fill()
    assert linked.offload(keys, there)
    assert number("writes") == 0
    assert linked.store.settled(30)
    packed = KeyBatch(linked.space, b"".join(map(bytes.fromhex, keys)))
    assert below.lookup(packed).all()
    linked.fill(0xEE)
    assert linked.load(keys, back) is None
    assert linked.holds(wanted, there, back)
    assert number("reads") == 12, "past the host"
    assert first.remove(packed.only([3])) == 1
    linked.fill(0xEE)
    assert linked.load(keys, back) is None, "one of them comes from below"
    assert linked.holds(wanted, there, back)
    assert number("reads") == 12 + 4, "a part with such a page goes through the host, the other one past it"
    with pytest.raises(ValueError, match="writes_from_device"):
        linked.store.write(replace(OnDevice(namespace((4096,)), 1).batch(chain("one", 1)), memory="device"))
    linked.close()

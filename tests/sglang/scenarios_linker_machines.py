"""The external linker on machines and with settings that it cannot work with as asked; and what a GPU would be told."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import Any

import linker_rig
import numpy as np
import rig
import torch
from linker_rig import TOKENS, fresh, has_linker, keys, linked, stored
from support import LAYOUTS, changed, logged, refused


def plain_linker_what_a_gpu_would_be_told_to_copy() -> None:
    """The copies that hicache_ext.cuda is given, carried out here: the bytes that torch's indexing moves, and for each
    layer the one of its own ends after which that layer is whole."""
    if not has_linker():
        return
    import ctypes

    from hicache_ext import _cuda
    from hicache_ext.cuda import layouts
    from hicache_ext.device.copies import Part, copied_sides

    cases = [("mla" if mla else "mha", layout) for layout, mla in LAYOUTS]
    for kind, layout in [*cases, ("swa", "page_first"), ("dsa", "page_first")]:
        with linked(kind=kind, extra=fresh(), layout=layout, slots=24) as found:
            draw = np.random.default_rng(1)
            for name, pool in found.linker._pools.items():
                staging = found.linker._sides[0].host.staging[name]
                memory = np.frombuffer(staging.view, np.uint8).reshape(staging.slots, -1)
                buffers = [plane.buffer.view(torch.uint8) for plane in pool.planes]
                for buffer in buffers:
                    buffer.copy_(torch.from_numpy(draw.integers(0, 256, tuple(buffer.shape), np.uint8)))
                part = Part(name, draw.permutation(staging.slots)[:7], draw.permutation(pool.pages)[:7])
                routes = []
                for shape, in_pool, in_slots, last in copied_sides(pool, staging):
                    blocks = layouts.reduce(shape, in_pool, in_slots)
                    routes.append((shape, blocks, in_pool.offsets(part.pages), in_slots.offsets(part.slots), last))

                def go(route: Any, store: bool, first: int, planes: int) -> None:
                    _, blocks, at_pages, at_slots, _ = route
                    for from_, to, length in _cuda.runs(
                        np.array(blocks.a_planes, np.uint64), np.array(blocks.b_planes, np.uint64), blocks.tokens,
                        blocks.heads, blocks.run, blocks.a_token, blocks.a_head, blocks.b_token, blocks.b_head, store,
                        at_pages, at_slots, first, planes,
                    ):  # fmt: skip
                        ctypes.memmove(to, from_, length)

                memory[:] = 0xA5
                found.linker._sides[0].host.copies.store(part)
                wanted = memory.copy()
                memory[:] = 0xA5
                for route in routes:
                    go(route, True, 0, route[0].planes)
                assert (memory == wanted).all(), (kind, layout, name)
                # And back, layer by layer.
                originals = [buffer.clone() for buffer in buffers]
                for buffer in buffers:
                    buffer.fill_(0x5A)
                found.linker._sides[0].host.copies.load(part)
                loaded = [buffer.clone() for buffer in buffers]
                for buffer in buffers:
                    buffer.fill_(0x5A)
                done = [0] * len(routes)
                for layer in range(found.layers):
                    for number, route in enumerate(routes):
                        kv_planes, last = route[0].kv, route[4].get(layer, -1)
                        while done[number] <= last:
                            go(route, False, done[number] * kv_planes, kv_planes)
                            done[number] += 1
                    for plane, buffer, whole in zip(pool.planes, buffers, loaded, strict=True):
                        assert torch.equal(buffer, whole) == (plane.layer <= layer), (kind, layout, name, layer)
                assert done == [route[0].layers for route in routes]
                assert not all(torch.equal(one, other) for one, other in zip(originals, loaded, strict=True))


# --- mistakes and machines


def plain_linker_mistakes_name_the_key() -> None:
    if not has_linker():
        return
    from hicache_ext.config import ConfigError
    from hicache_ext.sglang import linker_settings

    tier = rig.shared_tier()
    for extra, said in {
        "nothing": ({}, "linker_extra_config.config: missing"),
        "both": ({"config": "a.yaml", **tier}, "linker_extra_config.config: 'tiers' stands beside it"),
        "typo": ({**tier, "stagin_bytes": 3}, "stagin_bytes"),
        "size": ({**tier, "staging_bytes": "much"}, "linker_extra_config.staging_bytes"),
        "time": ({**tier, "load_timeout": 0}, "linker_extra_config.load_timeout"),
        "file": ({"config": "/nowhere/hicache.yaml"}, "/nowhere/hicache.yaml: cannot be read"),
        "tier": ({"tiers": [{"type": "local", "capacity": "1GiB"}]}, "tiers[0].path"),
    }.values():
        line = refused(lambda extra=extra: linker_settings.read(extra))
        assert said in line, (said, line)
        assert "Fix: " in line
    line = refused(lambda: linker_rig.Linked(layout="page_first_kv_split"))
    assert "--hicache-mem-layout page_first_kv_split" in line, line
    pool = linker_rig.device_pool("mha", 8)
    pool.k_scale_buffer = [pool.k_buffer[0]]
    with changed(linker_rig, device_pool=lambda *_: pool):
        line = refused(linker_rig.Linked)
    assert "A scaled KV cache is not supported" in line, line
    assert "--enable-hierarchical-cache" in line
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("tiers:\n  - {type: memory, capacity: 1GiB}\n")
        file.flush()
        options, config = linker_settings.read({"config": file.name, "staging_bytes": "64MiB"})
        assert (int(options.staging_bytes), config.tiers[0].type) == (64 << 20, "memory")
    assert issubclass(ConfigError, ValueError)


def plain_linker_a_forked_process() -> None:
    """A child has neither the threads nor the device: it answers, loads nothing and ends."""
    if not has_linker():
        return
    import signal

    with linked(extra=fresh()) as found:
        stored(found)
        request, loaded = found.admit([*TOKENS, 7])
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            good = (
                found.linker.lookup("x", [keys()]) == []
                and found.linker.finish_layer_wise_loading(found.linker.start_layer_wise_loading()) is False
            )
            found.linker.reset()
            found.linker.close()
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert found.forward([(TOKENS, request, loaded)])[0]["landed"]


class _OnGpu:
    """A tensor in host memory that says it lies on a GPU."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.device = tensor, torch.device("cuda:0")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def plain_linker_a_gpu_that_cannot_be_had() -> None:
    """No driver, no device, no memory: one line, and torch's copies."""
    if not has_linker():
        return
    from hicache_ext.cuda import CopyError, CudaUnavailable
    from hicache_ext.device import copies as device_copies

    class Torch:
        def __init__(self, pools: Any, staging: Any) -> None:
            self.name = "torch copies"

    def missing(error: Exception) -> Any:
        def raising(*_: Any) -> Any:
            raise error

        return raising

    with linked(extra=fresh()) as found:
        linker = found.linker
        pools = {
            name: replace(pool, planes=tuple(replace(plane, buffer=_OnGpu(plane.buffer)) for plane in pool.planes))
            for name, pool in linker._pools.items()
        }
        ways = [missing(CudaUnavailable("no usable device")), missing(CopyError("out of device memory"))]
        if not torch.cuda.is_available():
            ways.append(device_copies.BlockCopies)  # the real one: this machine has no driver
        for way in ways:
            with changed(device_copies, TorchCopies=Torch, BlockCopies=way), logged() as lines:
                chosen = device_copies.choose(pools, [sides.host.staging for sides in linker._sides])
            assert [one.name for one in chosen] == ["torch copies"] * 2
            assert len(lines.lines) == 1, lines.lines
            assert "no block copies (" in lines.lines[0], lines.lines


def plain_linker_memory_that_is_not_pinned() -> None:
    if not has_linker():
        return
    from hicache_ext.device import slots as device_slots
    from hicache_ext.sglang import linker_sides

    with linked(extra=fresh()) as found:
        with changed(device_slots, pin=lambda *_: "cuMemHostRegister: error 2"), logged() as lines:
            pools = found.linker._pools
            made = {"kv": linker_sides._host_slots(pools["kv"], pools, 4 << 20, True)}
        assert lines.count("is not pinned (cuMemHostRegister: error 2)") == 1, lines.lines
        made["kv"].close()
        if not torch.cuda.is_available():
            assert "no CUDA driver" in device_slots.pin(made["kv"].address, 4096)
        assert found.linker._sides[0].host.staging["kv"].not_pinned

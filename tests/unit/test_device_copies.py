"""Two ways of copying between pools and slots, held against each other over a driver that stands in for CUDA's.

What a machine without a GPU can show of the block copies: that hicache_ext.device, .cuda and csrc/cuda fit together
call by call, and what is said, and done next, when the driver refuses. Each case has a process of its own, since a
process loads one driver. On a GPU: tests/gpu/test_linker.py.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import stand_in

pytest.importorskip("torch")
pytest.importorskip("hicache_ext._cuda", reason="not built")

ROOT = Path(__file__).parents[2]

HEAD = """
    import ctypes, logging, os, sys, threading
    driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    def set(**values):
        for name, value in values.items():
            ctypes.c_int.in_dll(driver, "stand_in_" + name).value = value
    driver.stand_in_enter()
    def copies():
        return ctypes.c_long.in_dll(driver, "stand_in_copies").value
    import numpy as np, torch
    from types import SimpleNamespace
    torch.cuda.Stream = lambda device=None, priority=0: SimpleNamespace(cuda_stream=0x200, synchronize=lambda: None)
    from hicache_ext.cuda import CopyError, CudaUnavailable
    from hicache_ext.page import PageLayout
    from hicache_ext.device import copies as device_copies
    from hicache_ext.device.copies import BlockCopies, Part, TorchCopies
    from hicache_ext.device.planes import Plane
    from hicache_ext.sglang.linker_planes import DevicePool
    from hicache_ext.device.slots import Staging
    logging.basicConfig(stream=sys.stdout, format="said: %(message)s")

    LAYERS, TOKENS, ROW, PAGES, SLOTS = 4, 8, 192, 20, 12

    class OnGpu:
        def __init__(self, tensor):
            self.tensor, self.device = tensor, torch.device("cuda:0")
            driver.stand_in_device_memory(ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(tensor.numel()))
        def __getattr__(self, name):
            return getattr(self.tensor, name)

    def pool_of(wrap, seed=0):
        # K and V, and a third buffer of another width that layers 1 and 3 alone have.
        generator = torch.Generator().manual_seed(seed)
        planes, at = [], 0
        for layer in range(LAYERS):
            for row in (ROW, ROW, *((64,) if layer % 2 else ())):
                buffer = torch.randint(0, 256, (PAGES * TOKENS, row), dtype=torch.uint8, generator=generator)
                planes.append(Plane(wrap(buffer), layer, TOKENS, 1, row, TOKENS * row, row, row, at, row, row))
                at += TOKENS * row
        layout = PageLayout("kv", "linker", "uint8", TOKENS, (at,))
        return DevicePool("kv", None, layout, tuple(planes), None)

    def open_case(pinned=True):
        pool, host = pool_of(OnGpu), pool_of(lambda tensor: tensor)
        staging = Staging(pool.layout, SLOTS, pinned)
        memory = np.frombuffer(staging.view, np.uint8)
        memory[:] = np.random.default_rng(2).integers(0, 256, len(memory), np.uint8)
        draw = np.random.default_rng(1)
        part = Part("kv", draw.permutation(SLOTS)[:9], draw.permutation(PAGES)[:9])
        return SimpleNamespace(
            pool=pool, host=host, staging=staging, memory=memory, part=part,
            reference=TorchCopies({"kv": host}, {"kv": staging}),
        )

    def same(case):
        return all(
            torch.equal(one.buffer.tensor, other.buffer)
            for one, other in zip(case.pool.planes, case.host.planes, strict=True)
        )

    def block(case):
        return BlockCopies({"kv": case.pool}, {"kv": case.staging}, torch.device("cuda:0"))

    def choose(case):
        device_copies.TorchCopies = lambda pools, staging: SimpleNamespace(name="torch copies")
        return device_copies.choose({"kv": case.pool}, [{"kv": case.staging}] * 2)
"""

CASES = {
    "there and back": (
        """
        case = open_case()
        chosen = device_copies.choose({"kv": case.pool}, [{"kv": case.staging}])[0]
        print(chosen.name)
        made = copies()
        chosen.load(case.part); case.reference.load(case.part)
        assert same(case) and copies() > made
        before = case.memory.copy()
        case.memory[:] = 0xA5
        chosen.store(case.part)
        got = case.memory.copy()
        case.memory[:] = 0xA5
        case.reference.store(case.part)
        assert (got == case.memory).all() and (got != 0xA5).any()
        """,
        ["block copies, pinned host memory"],
    ),
    "layer by layer": (
        """
        case = open_case()
        seen = []
        block(case).load_layers([case.part], LAYERS, seen.append)
        case.reference.load(case.part)
        assert same(case)
        print(seen)
        """,
        ["[0, 1, 2, 3]"],
    ),
    "pinned memory refused": (
        """
        set(refuses_pinning=1)
        case = open_case()
        print("not pinned:", case.staging.not_pinned)
        chosen = block(case)
        print(chosen.name)
        chosen.load(case.part); case.reference.load(case.part)
        assert same(case)
        """,
        [
            "not pinned: cuMemHostRegister: error 2",
            "said: block copies: the page buffers are not pinned",
            "block copies, pageable host memory",
        ],
    ),
    "no device": (
        """
        set(devices=0)
        print([one.name for one in choose(open_case())])
        """,
        ["no block copies (the CUDA driver finds no usable device", "['torch copies', 'torch copies']"],
    ),
    "out of device memory": (
        """
        set(memory=0)
        print([one.name for one in choose(open_case())])
        """,
        ["no block copies (out of device memory", "['torch copies', 'torch copies']"],
    ),
    "a copy that fails": (
        """
        case = open_case()
        chosen = block(case)
        set(fails_copies=1)
        seen = []
        for call in (lambda: chosen.load_layers([case.part], LAYERS, seen.append), lambda: chosen.load(case.part),
                     lambda: chosen.store(case.part)):
            try:
                call(); print("copied")
            except CopyError as error:
                print("refused:", error)
        assert not seen, "a layer that was not copied is said to be there"
        set(fails_copies=0)
        chosen.load(case.part); case.reference.load(case.part)
        assert same(case)
        print("and goes on")
        """,
        ["refused: a copy: CUDA_ERROR", "and goes on"],
    ),
    "a capture in progress": (
        """
        set(refuses_pinning=1)
        case = open_case()
        chosen = block(case)
        set(capturing=1)
        try:
            chosen.load(case.part); print("copied")
        except CopyError as error:
            print("refused:", error)
        set(capturing=0)
        chosen.load(case.part); case.reference.load(case.part)
        assert same(case)
        print("and goes on")
        """,
        ["refused: page buffers that are not pinned cannot be part of a CUDA graph", "and goes on"],
    ),
    "slots dropped without a close": (
        """
        # By what another thread dropped last, and by the collector of cycles: no context is current there.
        import gc
        for turn in range(4):
            case = open_case()
            assert case.staging.not_pinned == "" and driver.stand_in_pinned() == 1
            held = [case.staging.batch(None, b"", None, [0])]
            del case.memory, case.reference, case.staging
            if turn % 2:
                held[0] = cycle = [held[0]]
                cycle.append(cycle)
                del cycle
            assert driver.stand_in_pinned() == 1, "a page in use lost its pinning"
            def drop():
                held.pop(0)
                globals().pop("held")
                gc.collect()
            thread = threading.Thread(target=drop)
            thread.start(); thread.join()
            assert driver.stand_in_pinned() == 0, "unmapped while the driver holds it"
            del case
        print("unpinned")
        """,
        ["unpinned"],
    ),
    "a driver that does not let go": (
        """
        case = open_case()
        memory, address = case.staging._memory.map, case.staging.address
        set(keeps_pinned=1)
        del case.memory, case.reference
        case.staging.close()
        del case, memory
        other = open_case()
        assert other.staging.address != address, "memory that is pinned still went to another"
        """,
        ["said: hicache_ext: cuMemHostUnregister: error 1"],
    ),
    "a forked process": (
        """
        case = open_case()
        chosen = block(case)
        child = os.fork()
        if child == 0:
            for call in (lambda: chosen.load(case.part), lambda: block(case)):
                try:
                    call(); print("copied", flush=True)
                except (CopyError, CudaUnavailable) as error:
                    print("child:", error, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        chosen.load(case.part); case.reference.load(case.part)
        assert same(case)
        print("the parent goes on")
        """,
        ["child: this process was forked", "start it with spawn", "the parent goes on"],
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case printed."""
    return stand_in.run(tmp_path_factory.mktemp("cases"), HEAD, {name: script for name, (script, _) in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_over_a_driver_that_stands_in(name: str, said: dict[str, str]) -> None:
    assert "Traceback" not in said[name], said[name]
    for part in CASES[name][1]:
        assert part in said[name], said[name]
    assert "copied" not in said[name]


def test_without_a_driver_pools_on_a_gpu_go_by_torch() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script = """
    import torch
    from hicache_ext.device import copies as device_copies
    from hicache_ext.device import slots as device_slots
    from types import SimpleNamespace
    buffer = SimpleNamespace(
        device=torch.device("cuda:0"), data_ptr=lambda: 4096, shape=(8, 64), element_size=lambda: 1, stride=lambda _: 64
    )
    from hicache_ext.page import PageLayout
    from hicache_ext.device.planes import Plane
    from hicache_ext.sglang.linker_planes import DevicePool
    pool = DevicePool("kv", None, PageLayout("kv", "linker", "uint8", 1, (64,)),
                      (Plane(buffer, 0, 1, 1, 64, 64, 64, 64, 0, 64, 64),), None)
    staging = device_slots.Staging(pool.layout, 4, True)
    device_copies.TorchCopies = lambda *_: SimpleNamespace(name="torch copies")
    print(device_copies.choose({"kv": pool}, [{"kv": staging}])[0].name, "/", staging.not_pinned)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch copies / no CUDA driver"), done.stdout
    assert done.stderr.count("no block copies (no CUDA driver: libcuda.so.1 cannot be loaded)") == 1, done.stderr

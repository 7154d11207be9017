"""The linker's copies on a GPU, and the whole linker over CUDA pools where SGLang 0.5.23 or later is installed.

The first half needs CUDA and torch alone; the second builds the cache of an installed SGLang 0.5.23 or later over CUDA
pools, as tests/sglang/linker_rig.py does over host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from hicache_ext.device import copies as device_copies  # noqa: E402
from hicache_ext.device import slots as device_slots  # noqa: E402
from hicache_ext.device.copies import BlockCopies, Part, TorchCopies  # noqa: E402
from hicache_ext.device.planes import Plane  # noqa: E402
from hicache_ext.device.slots import Staging  # noqa: E402
from hicache_ext.page import PageLayout  # noqa: E402
from hicache_ext.sglang.linker_planes import DevicePool  # noqa: E402
from tests.gds_cases import cufile_mode  # noqa: E402

POISON = 0xA5
LAYERS, TOKENS, HEADS, RUN = 6, 16, 4, 256
PAGES, SLOTS, MOVED = 64, 48, 40


def pool_of(device: str, order: str = "page_first") -> DevicePool:
    """K and V of six layers, poisoned, as planes; order: of a slot."""
    row = HEADS * RUN
    heads = HEADS if order == "page_head" else 1
    planes = []
    for layer in range(LAYERS):
        for part in range(2):
            buffer = torch.full((PAGES * TOKENS, row), POISON, dtype=torch.uint8, device=device)
            whole = part * LAYERS * TOKENS * row
            match order:
                case "page_first":
                    at, token, head = whole + layer * row, LAYERS * row, row
                case "page_first_direct":
                    at, token, head = whole + layer * TOKENS * row, row, row
                case _:
                    at, token, head = whole + layer * RUN, LAYERS * RUN, TOKENS * LAYERS * RUN
            planes.append(
                Plane(buffer, layer, TOKENS, heads, row // heads, TOKENS * row, row, row // heads, at, token, head)
            )
    layout = PageLayout("mha", order, "uint8", TOKENS, (LAYERS * TOKENS * row,) * 2)
    return DevicePool("kv", None, layout, tuple(planes), None)


class Case:
    def __init__(self, order: str = "page_first", pinned: bool = True) -> None:
        self.pool = pool_of("cuda", order)
        self.staging = Staging(self.pool.layout, SLOTS, pinned)
        if pinned:
            assert self.staging.not_pinned == "", self.staging.not_pinned
        self.copies = BlockCopies({"kv": self.pool}, {"kv": self.staging}, torch.device("cuda:0"))
        self.memory = np.frombuffer(self.staging.view, np.uint8)
        draw = np.random.default_rng(1)
        self.memory[:] = draw.integers(0, 256, len(self.memory), np.uint8)
        self.part = Part("kv", draw.permutation(SLOTS)[:MOVED], draw.permutation(PAGES)[:MOVED])
        # The reference: the same copy by torch, between host memory and the same slots.
        self.host = pool_of("cpu", order)
        self.reference = TorchCopies({"kv": self.host}, {"kv": self.staging})

    def close(self) -> None:
        del self.copies, self.memory, self.reference
        self.staging.close()

    def check(self) -> None:
        torch.cuda.synchronize()
        for plane, wanted in zip(self.pool.planes, self.host.planes, strict=True):
            assert torch.equal(plane.buffer.cpu(), wanted.buffer), "a byte outside the target, or a wrong one"


@pytest.fixture(params=["page_first", "page_first_direct", "page_head"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    made = Case(request.param)
    yield made
    made.close()


def test_whole_pages_there_and_back(case: Case) -> None:
    case.copies.load(case.part)
    case.reference.load(case.part)
    case.check()
    before = case.memory.copy()
    case.memory[:] = POISON
    case.copies.store(case.part)
    slots = np.zeros(SLOTS, bool)
    slots[case.part.slots] = True
    rows, stride = case.memory.reshape(SLOTS, -1), case.pool.layout.payload_bytes
    assert (rows[slots, :stride] == before.reshape(SLOTS, -1)[slots, :stride]).all()
    assert (rows[~slots] == POISON).all()


def test_layers_arrive_in_order_and_each_is_whole(case: Case) -> None:
    case.reference.load(case.part)
    seen: list[int] = []

    def arrived(layer: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for plane, wanted in zip(case.pool.planes, case.host.planes, strict=True):
                if plane.layer == layer:
                    assert torch.equal(plane.buffer.cpu(), wanted.buffer)
        seen.append(layer)

    case.copies.load_layers([case.part], LAYERS, arrived)
    assert seen == list(range(LAYERS))
    case.check()


def test_pinned_memory_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_slots, "pin", lambda *_: "cuMemHostRegister: error 2")
    case = Case(pinned=False)
    assert "pageable" in case.copies.name
    case.copies.load(case.part)
    case.reference.load(case.part)
    case.check()


def test_memory_that_nobody_closed_is_unpinned_before_it_is_unmapped() -> None:
    """As where a tier that is late has the last slots of a linker that is closed: some thread drops them in the end."""
    seen = set()
    for _ in range(4):
        kept = [Staging(pool_of("cpu").layout, SLOTS, True)]
        assert kept[0].not_pinned == ""  # where it is not unpinned: 712, the addresses are the driver's still
        seen.add(kept[0].address)
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
    assert len(seen) < 4, "no addresses came twice: nothing is shown"
    torch.cuda.synchronize()


def test_a_capture_elsewhere_lives_through_a_load(case: Case) -> None:
    """As when SGLang captures its graphs again after a weight update: our copies run on a stream of their own."""
    x = torch.ones(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    failed: list[BaseException] = []

    def load() -> None:
        try:
            case.copies.load(case.part)
        except BaseException as error:
            failed.append(error)

    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = x * 2
        thread = threading.Thread(target=load)
        thread.start()
        thread.join(60)
        y += 1
    graph.replay()
    case.reference.load(case.part)
    case.check()
    assert not failed
    assert (y == 3).all()


def test_block_copies_are_chosen_and_torch_s_agree(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    (chosen,) = device_copies.choose({"kv": case.pool}, [{"kv": case.staging}])
    assert isinstance(chosen, BlockCopies)
    assert "pinned" in chosen.name
    assert not caplog.records
    slow = TorchCopies({"kv": case.pool}, {"kv": case.staging})
    assert slow.name == "torch copies"
    slow.load(case.part)
    case.reference.load(case.part)
    case.check()


# --- the whole linker


@pytest.mark.parametrize("kind", ["mha", "mla", "swa"])
def test_round_trip_under_sglang_s_cache(linker_on_cuda: Any, kind: str) -> None:
    """Cold, device hit, loaded; every layer's bytes are checked after the pool's own wait for it."""
    linker_rig, rig = linker_on_cuda.linker_rig, linker_on_cuda.rig
    extra = rig.shared_tier()
    rig.SharedMemory.pages.clear()
    tokens = list(range(100, 100 + 20 * rig.PAGE))
    with linker_rig.linked(kind=kind, extra=extra, slots=128) as found:
        assert found.linker.details()["copies"] == "block copies, pinned host memory"
        assert found.serve(tokens) == {"device": 0, "loaded": 0, "landed": True}
        found.settle()
        assert found.serve(tokens)["device"] == len(tokens)
        found.flush()
        assert found.serve(tokens) == {"device": 0, "loaded": len(tokens), "landed": True}


@pytest.mark.parametrize("kind", ["mha", "mla", "swa"])
def test_pages_go_past_the_host(linker_on_cuda: Any, kind: str, tmp_path: Path) -> None:
    """SGLang's own cache over CUDA pools and a gds tier; every layer's bytes are checked after the wait for it."""
    linker_rig, rig = linker_on_cuda.linker_rig, linker_on_cuda.rig
    extra = {"tiers": [{"type": "gds", "path": str(tmp_path / "tier"), "capacity": "256MiB", "mode": cufile_mode()}]}
    tokens = list(range(100, 100 + 20 * rig.PAGE))
    with linker_rig.linked(kind=kind, extra=extra, slots=128) as found:
        if found.linker.store.reads_to_device is None:
            pytest.skip(f"no GPU-direct storage here: {found.linker.details()['tiers']['gds']['gds_reason']}")
        assert found.linker.details()["copies"].startswith("block copies, slots on it; else block copies")
        assert found.serve(tokens) == {"device": 0, "loaded": 0, "landed": True}
        found.settle()
        found.flush()
        assert found.serve(tokens) == {"device": 0, "loaded": len(tokens), "landed": True}
        tier = found.linker.details()["tiers"]["gds"]
        print({name: tier[name] for name in ("gds_mode", "gds_way", "gds_unregistered", "stored", "pages_direct")})
        found.linker.store.tiers[0].backend._out("a test")
        found.flush()
        assert found.serve(tokens) == {"device": 0, "loaded": len(tokens), "landed": True}, "through the host"


def test_a_bad_page_fails_the_load_alone(linker_on_cuda: Any) -> None:
    linker_rig, rig = linker_on_cuda.linker_rig, linker_on_cuda.rig
    extra = rig.shared_tier()
    rig.SharedMemory.pages.clear()
    tokens = list(range(100, 100 + 20 * rig.PAGE))
    with linker_rig.linked(extra=extra, slots=128) as found:
        found.serve(tokens)
        found.settle()
        found.flush()
        next(iter(rig.SharedMemory.pages.values()))[0][37] ^= 1
        assert found.serve(tokens)["landed"] is False
        assert found.serve(tokens)["landed"] is True
        assert found.linker.details()["staged"] == [{"kv": 0}, {"kv": 0}]

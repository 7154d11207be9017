"""Pages between vLLM's blocks on a GPU and the store: every layout, beside kernels that write the same blocks.

No vLLM is needed; with real engines: examples/h100/vllm.sh.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from hicache_ext.device import copies as device_copies  # noqa: E402
from hicache_ext.device import slots as device_slots  # noqa: E402
from storage_backends.base import Outcome  # noqa: E402
from tests import device_blocks as rig  # noqa: E402
from tests.device_blocks import BLOCKS, LAYOUTS, TOKENS, Case, opened  # noqa: E402
from tests.unit.test_vllm_device import ELSEWHERE, SCATTERED, there_and_back, wait_for  # noqa: E402

#: Cycles of a kernel that does nothing else: about a second.
LONG = 1_700_000_000


@pytest.fixture(params=[0, 1 << 20], ids=["by the host", "past it"])
def room(request: pytest.FixtureRequest) -> int:
    """Bytes of slots on the device: none, so that pages go by host memory, or some, so that they go past it."""
    return int(request.param)


def went(case: Case, room: int) -> bool:
    """Whether all pages went the way that they should."""
    past = [case.counts[name] for name in ("save_past_host", "load_past_host", "load_again")]
    saved, loaded = case.counts["saved"], case.counts["loaded"]
    return past == ([saved, loaded, 0] if room else [0, 0, 0])


@pytest.mark.parametrize("page", [None, TOKENS // 4, TOKENS, TOKENS * 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: str, page: int | None, room: int) -> None:
    if page is None and layout.endswith("*"):
        pytest.skip("blocks that do not lie in one piece are pages only where they are shared")
    with opened(layout, "cuda", page, device_bytes=room) as case:
        by_host = "block copies, pinned host memory"
        assert case.moves.copies == (f"block copies, slots on it; else {by_host}" if room else by_host)
        there_and_back(case)
        assert went(case, room)
        assert not case.moves.lent


def test_torch_s_copies_do_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refused(*_: Any) -> Any:
        raise device_copies.CopyError("out of device memory")

    monkeypatch.setattr(device_copies, "BlockCopies", refused)
    for layout in ("0.25 NHD", "0.25 HND", "LBHNC"):
        with opened(layout, "cuda", TOKENS * 4) as case:
            assert case.moves.copies == "torch copies"
            there_and_back(case)
    assert "no block copies (out of device memory)" in caplog.text


def test_memory_that_is_not_pinned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device_slots, "pin", lambda *_: "cuMemHostRegister: error 2")
    with opened("0.25 NHD", "cuda", TOKENS * 4) as case:
        assert case.moves.copies == "block copies, pageable host memory"
        there_and_back(case)
    assert caplog.text.count("is not pinned (cuMemHostRegister: error 2)") == 1


def test_saves_come_after_the_forward(room: int) -> None:
    """A kernel that takes a second, then the forward's writes, then the save: the bytes are the new ones, and the
    forward's thread did not wait for any of it."""
    with opened("0.25 NHD", "cuda", device_bytes=room) as case:
        told: list[Any] = []
        pages = case.pages("chain", 0, 4, SCATTERED[:4])
        case.poison()  # the first launch of a kernel waits for the device
        torch.cuda.synchronize()
        since = time.monotonic()
        torch.cuda._sleep(LONG)
        for tensor in case.tensors:
            tensor.fill_(3.0)
        case.moves.save([pages], [case.space], lambda *said: told.append(said))
        event = torch.cuda.Event()
        event.record()
        assert not event.query(), "the kernel was not long enough to show anything"
        assert time.monotonic() - since < 0.5
        assert wait_for(lambda: bool(told))
        case.poison()
        assert case.load(pages) == ([], [Outcome.HIT] * 4)
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert (now[:, :, SCATTERED[:4]] == 3.0).all()


def test_loads_come_after_the_forward(room: int) -> None:
    """Whoever had the blocks before still writes into them when the load begins."""
    with opened("0.25 NHD", "cuda", device_bytes=room) as case:
        before = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        case.save(case.pages("chain", 0, 8, SCATTERED))
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        for tensor in case.tensors:
            tensor.fill_(rig.POISON)
        assert case.load(case.pages("chain", 0, 8, ELSEWHERE)) == ([], [Outcome.HIT] * 8)
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert torch.equal(now[:, :, ELSEWHERE], before[:, :, SCATTERED])


def test_blocks_that_somebody_else_gets_are_not_stored(room: int) -> None:
    """Told before the forward that writes: what had not been computed by then is dropped, at once, and nothing false
    is stored."""
    with opened("0.25 NHD", "cuda", device_bytes=room) as case:
        told: list[Any] = []
        pages = case.pages("a", 0, 4, SCATTERED[:4])
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        case.moves.save([pages], [case.space], lambda *said: told.append(said))
        since = time.monotonic()
        case.moves.make_way([SCATTERED[2]])
        assert time.monotonic() - since < 0.5
        for tensor in case.tensors:
            tensor.fill_(5.0)
        assert wait_for(lambda: bool(told))
        assert told == [(0, b"", 4)]
        assert case.load(case.pages("a", 0, 4, ELSEWHERE[:4]))[1] == [Outcome.MISS] * 4


def test_a_page_that_is_gone_costs_its_blocks_alone(room: int) -> None:
    from tests.unit.test_vllm_device import rig_keys

    with opened("0.25 NHD", "cuda", TOKENS * 4, device_bytes=room) as case:
        pages = case.pages("chain", 0, 2, SCATTERED)
        case.save(pages)
        case.store.remove(rig_keys(case, pages, 0))
        case.poison()
        assert case.load(case.pages("chain", 0, 2, ELSEWHERE)) == (
            sorted(ELSEWHERE[:4]), [Outcome.MISS, Outcome.HIT],
        )  # fmt: skip
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert (now[:, :, ELSEWHERE[:4]] == rig.POISON).all()
        assert not (now[:, :, ELSEWHERE[4:]] == rig.POISON).all()


@pytest.fixture
def busy() -> Iterator[None]:
    """Kernels on the device all the while."""
    over = threading.Event()

    def burn() -> None:
        x = torch.randn(2048, 2048, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not over.is_set():
                x = (x @ x).tanh()
                stream.synchronize()

    thread = threading.Thread(target=burn)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.usefixtures("busy")
def test_many_turns_beside_a_busy_device(room: int) -> None:
    """Blocks are written, saved, given to somebody else, and loaded again, with two slots at a time."""
    generator = torch.Generator().manual_seed(7)
    with opened("0.25 NHD", "cuda", load_bytes=1, device_bytes=min(room, 1)) as case:
        stored: dict[str, Any] = {}
        for turn in range(60):
            name, blocks = f"turn {turn}", torch.randperm(BLOCKS, generator=generator)[:6].tolist()
            case.moves.make_way(blocks)
            for layer, tensor in enumerate(case.tensors):
                tensor[blocks] = float(turn + layer)
            if case.save(case.pages(name, 0, 6, blocks)) == {"HIT": 6}:
                stored[name] = turn
            past = max(0, turn - 9)
            target = torch.randperm(BLOCKS, generator=generator)[:6].tolist()
            if f"turn {past}" in stored:
                assert case.load(case.pages(f"turn {past}", 0, 6, target)) == ([], [Outcome.HIT] * 6)
                now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
                for layer in range(rig.LAYERS):
                    assert (now[layer, :, target] == float(past + layer)).all(), f"turn {turn}"
        assert len(stored) == 60
        assert went(case, room)


def test_a_spoilt_page_never_meets_a_block() -> None:
    """Its checksum is computed on the device: the page is a load error of its block, and the others are there."""
    with opened("0.25 NHD", "cuda", device_bytes=1 << 20) as case:
        pages = case.pages("chain", 0, 8, SCATTERED)
        case.save(pages)
        memory = case.store.tiers[0].backend._memory.map
        begin = case.tensors[0][SCATTERED[3]].cpu().contiguous().view(torch.uint8).flatten()[:64]
        start = memory.find(begin.numpy().tobytes())
        assert start > 0
        memory[start + 77] ^= 0x40
        case.poison()
        bad, outcomes = case.load(case.pages("chain", 0, 8, ELSEWHERE))
        assert bad == [ELSEWHERE[3]]
        assert [i for i, outcome in enumerate(outcomes) if outcome != Outcome.HIT] == [3], outcomes
        assert case.counts["load_past_host"] == 7
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert (now[:, :, bad] == rig.POISON).all()


def test_the_case_itself_can_fail() -> None:
    """A byte that is changed behind the store's back is seen."""
    with opened("0.25 NHD", "cuda") as case:
        case.poison()
        case.tensors[1][3, 0, 0, 0, 0] = 1.0
        assert case.differing() == [3]
        assert isinstance(case, Case)

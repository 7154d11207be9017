"""Pages between vLLM's blocks "on a device" and the store, over host memory: everything but the GPU itself.

The same over a driver that stands in for CUDA's, so that the block copies' calls are made: test_vllm_driver.py. On a
GPU: tests/gpu/test_vllm_blocks.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hicache_ext.vllm.blocks import UnsupportedLayout  # noqa: E402
from hicache_ext.vllm.device_moves import objection  # noqa: E402
from storage_backends.base import Completion, Outcome  # noqa: E402
from tests import device_blocks as rig  # noqa: E402
from tests.device_blocks import BLOCKS, LAYOUTS, TOKENS, Case, opened  # noqa: E402

SCATTERED = [9, 2, 17, 5, 11, 0, 23, 14]
ELSEWHERE = [1, 20, 3, 16, 8, 12, 4, 22]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_pages_there_and_back(layout: str) -> None:
    if layout.endswith("*"):
        with pytest.raises(UnsupportedLayout, match="do not lie in one piece"), opened(layout, "cpu"):
            pass
        return
    with opened(layout, "cpu") as case:
        there_and_back(case)


@pytest.mark.parametrize("page", [TOKENS // 4, TOKENS, TOKENS * 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_pages_there_and_back(layout: str, page: int) -> None:
    with opened(layout, "cpu", page) as case:
        there_and_back(case)


def there_and_back(case: Case) -> None:
    """Eight blocks go to the store and come back to others; no other byte changes."""
    tokens = len(SCATTERED) * TOKENS
    before = case.kv(case.tensors)
    values = torch.cat([before[:, :, block * TOKENS : (block + 1) * TOKENS] for block in SCATTERED], 2)
    pages = case.pages("chain", 0, tokens // case.page, SCATTERED)
    assert case.save(pages) == {"HIT": pages.count}
    if case.space.layout.order == "canonical":
        wanted = [
            rig.bits(values[:, :, i * case.page : (i + 1) * case.page]).numpy().tobytes() for i in range(pages.count)
        ]
        assert case.canonical_pages(pages) == wanted
    case.poison()
    back = case.pages("chain", 0, pages.count, ELSEWHERE)
    assert case.load(back) == ([], [Outcome.HIT] * pages.count)
    rig.move_in_host(case, values, 0, tokens, ELSEWHERE)
    assert case.differing() == []
    assert not (case.kv(case.tensors)[:, :, ELSEWHERE[0] * TOKENS] == rig.POISON).any()


def test_pages_in_the_middle_of_blocks() -> None:
    """Pages 3 to 5 of a chain, four to a block, of which the first block's own tokens come before."""
    with opened("0.25 NHD", "cpu", TOKENS // 4) as case:
        before = case.kv(case.tensors)
        pages = case.pages("chain", 3, 3, [7, 2])
        assert pages.skip == 12
        assert case.save(pages) == {"HIT": 3}
        case.poison()
        assert case.load(case.pages("chain", 3, 3, [5, 6])) == ([], [Outcome.HIT] * 3)
        now = case.kv(case.tensors)
        assert torch.equal(now[:, :, 5 * TOKENS + 12 : 6 * TOKENS], before[:, :, 7 * TOKENS + 12 : 8 * TOKENS])
        assert torch.equal(now[:, :, 6 * TOKENS : 6 * TOKENS + 8], before[:, :, 2 * TOKENS : 2 * TOKENS + 8])
        assert (now[:, :, : 5 * TOKENS + 12] == rig.POISON).all()
        assert (now[:, :, 6 * TOKENS + 8 :] == rig.POISON).all()


def test_tokens_that_are_there_already_are_left_alone() -> None:
    with opened("0.25 NHD", "cpu", TOKENS * 4) as case:
        assert case.save(case.pages("chain", 0, 2, SCATTERED)) == {"HIT": 2}
        case.poison()
        assert case.load(case.pages("chain", 0, 2, ELSEWHERE, lead=2 * TOKENS)) == ([], [Outcome.HIT] * 2)
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        written = [block for block in range(BLOCKS) if not (now[:, :, block] == rig.POISON).all()]
        assert written == sorted(ELSEWHERE[2:])
        missing = case.load(case.pages("other", 0, 2, ELSEWHERE, lead=2 * TOKENS))
        assert missing == (sorted(ELSEWHERE[2:]), [Outcome.MISS] * 2), "blocks before `lead` are nobody's loss"


@pytest.mark.parametrize("page", [None, TOKENS // 4, TOKENS * 4])
def test_a_page_that_is_gone_costs_its_blocks_alone(page: int | None) -> None:
    with opened("0.25 NHD", "cpu", page) as case:
        count = len(SCATTERED) * TOKENS // case.page
        pages = case.pages("chain", 0, count, SCATTERED)
        case.save(pages)
        gone = 1
        case.store.remove(rig_keys(case, pages, gone))
        case.poison()
        bad, outcomes = case.load(case.pages("chain", 0, count, ELSEWHERE))
        assert outcomes == [Outcome.MISS if i == gone else Outcome.HIT for i in range(count)]
        first, last = gone * case.page // TOKENS, -(-(gone + 1) * case.page // TOKENS)
        assert bad == sorted(ELSEWHERE[first:last])
        now = case.kv(case.tensors)
        lost = [ELSEWHERE[t // TOKENS] * TOKENS + t % TOKENS for t in range(gone * case.page, (gone + 1) * case.page)]
        assert (now[:, :, lost] == rig.POISON).all()
        assert case.blocks.pages >= count


def rig_keys(case: Case, pages: Any, number: int) -> Any:
    from storage_backends.base import KeyBatch

    return KeyBatch(case.space, pages.keys[number * 32 : (number + 1) * 32])


class Held:
    """A store whose reads end when told to, or write what was never asked for."""

    def __init__(self, store: Any) -> None:
        self._store, self.open, self.reads = store, threading.Event(), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, batch: Any, deadline: float | None = None) -> Any:
        assert deadline is None
        done = Completion(len(batch))
        self.reads.append((batch, done))
        return done


def test_a_tier_that_is_late_never_meets_a_block() -> None:
    held: list[Held] = []

    def hold(store: Any) -> Any:
        held.append(Held(store))
        return held[0]

    with opened("0.25 NHD", "cpu", store=hold) as case:
        pages = case.pages("chain", 0, 8, ELSEWHERE)
        case.poison()
        assert case.load(pages, 0.2) == (sorted(ELSEWHERE), [Outcome.TIMEOUT] * 8)
        staging = case.moves._sides[0].host.staging["0"]
        assert staging.lent == 8, "the tier may still write there"
        for batch, done in held[0].reads:
            for page in range(len(batch)):
                batch.buffers(page)[0][:] = bytes(len(batch.buffers(page)[0]))
            done.settle_many(range(len(batch)), [Outcome.HIT] * len(batch))
        for _ in range(500):
            if not staging.lent:
                break
            threading.Event().wait(0.01)
        assert staging.lent == 0
        assert (case.kv(case.tensors) == rig.POISON).all()


def test_more_pages_than_slots_come_in_parts() -> None:
    """Two slots, one page at a time; and several requests at once."""
    with opened("0.25 NHD", "cpu", load_bytes=1) as case:
        assert case.moves._sides[0].host.staging["0"].slots == 2
        before = case.kv(case.tensors)
        assert case.save(case.pages("a", 0, 4, SCATTERED[:4]), case.pages("b", 0, 4, SCATTERED[4:])) == {"HIT": 8}
        case.poison()
        ended = threading.Barrier(3)
        for name, blocks in (("a", ELSEWHERE[:4]), ("b", ELSEWHERE[4:])):
            threading.Thread(
                target=lambda name=name, blocks=blocks: (case.load(case.pages(name, 0, 4, blocks)), ended.wait(60)),
                daemon=True,
            ).start()
        ended.wait(60)
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert torch.equal(now[:, :, ELSEWHERE], before.unflatten(2, (BLOCKS, TOKENS))[:, :, SCATTERED])


def test_a_page_of_two_requests_is_stored_once() -> None:
    with opened("0.25 NHD", "cpu") as case:
        assert case.save(case.pages("a", 0, 4, SCATTERED[:4]), case.pages("a", 0, 4, SCATTERED[4:])) == {"HIT": 4}


class Later:
    """An event of the device that happens when told to."""

    def __init__(self) -> None:
        self.happened = threading.Event()

    def synchronize(self) -> None:
        assert self.happened.wait(60)


@pytest.fixture
def late() -> Iterator[Later]:
    event = Later()
    yield event
    event.happened.set()


def test_blocks_are_read_only_after_the_device_s_work(late: Later) -> None:
    with opened("0.25 NHD", "cpu", mark=lambda: late) as case:
        told: list[Any] = []
        pages = case.pages("chain", 0, 4, SCATTERED[:4])
        case.moves.save([pages], [case.space], lambda *said: told.append(said))
        for tensor in case.tensors:
            tensor.fill_(3.0)  # the forward, which the save comes after
        late.happened.set()
        assert wait_for(lambda: bool(told))
        for tensor in case.tensors:
            tensor.fill_(rig.POISON)
        assert case.load(pages) == ([], [Outcome.HIT] * 4)
        assert (case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))[:, :, SCATTERED[:4]] == 3.0).all()


def test_blocks_that_somebody_else_gets_are_not_stored(late: Later) -> None:
    with opened("0.25 NHD", "cpu", mark=lambda: late) as case:
        told: list[Any] = []
        one, other = case.pages("a", 0, 4, SCATTERED[:4]), case.pages("b", 0, 4, SCATTERED[4:])
        case.moves.save([one], [case.space], lambda *said: told.append(("a", *said)))
        case.moves.save([other], [case.space], lambda *said: told.append(("b", *said)))
        case.moves.make_way([SCATTERED[2], 1])  # one block of the first, and one of nobody's
        late.happened.set()
        assert wait_for(lambda: len(told) == 2)
        assert sorted(told) == [("a", 0, b"", 4), ("b", 0, bytes([Outcome.HIT]) * 4, 0)]
        assert case.load(one)[1] == [Outcome.MISS] * 4


def test_a_block_that_is_being_copied_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("0.25 NHD", "cpu") as case:
        begun, go = threading.Event(), threading.Event()
        real = case.moves._sides[1].host.copies.store

        def slow(part: Any) -> None:
            begun.set()
            assert go.wait(60)
            real(part)

        monkeypatch.setattr(case.moves._sides[1].host.copies, "store", slow)
        told: list[Any] = []
        case.moves.save([case.pages("a", 0, 4, SCATTERED[:4])], [case.space], lambda *said: told.append(said))
        assert begun.wait(60)
        case.moves.make_way([1, 3])  # not its blocks
        asking = threading.Thread(target=case.moves.make_way, args=([SCATTERED[0]],))
        asking.start()
        asking.join(0.2)
        assert asking.is_alive(), "somebody may write into a block that is being read"
        go.set()
        asking.join(60)
        assert not asking.is_alive()
        assert wait_for(lambda: bool(told))
        assert told == [(0, bytes([Outcome.HIT]) * 4, 0)]


def test_a_copy_that_fails_costs_its_pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("0.25 NHD", "cpu") as case:
        pages = case.pages("a", 0, 4, SCATTERED[:4])
        case.save(pages)

        def fails(part: Any) -> None:
            raise RuntimeError("no copy")

        with monkeypatch.context() as broken:
            broken.setattr(case.moves._sides[0].host.copies, "load", fails)
            broken.setattr(case.moves._sides[1].host.copies, "store", fails)
            assert case.load(pages) == (sorted(SCATTERED[:4]), [Outcome.FAILED] * 4)
            assert case.save(case.pages("b", 0, 4, SCATTERED[4:])) == {"dropped": 4}
        assert case.load(pages) == ([], [Outcome.HIT] * 4)
        assert not case.moves.lent


def test_blocks_that_do_not_exist_are_a_failure() -> None:
    with opened("0.25 NHD", "cpu") as case:
        pages = case.pages("a", 0, 2, SCATTERED[:2])
        case.save(pages)
        assert case.load(case.pages("a", 0, 2, [BLOCKS, 1])) == ([1, BLOCKS], [Outcome.FAILED] * 2)
        with pytest.raises(IndexError):
            case.blocks.units(case.pages("a", 0, 1, [BLOCKS]))


def test_units_by_definition() -> None:
    """Every size of block, kernel's block and page, against counting tokens."""
    draw = np.random.default_rng(3)
    for layout, page in [("0.25 NHD", 4), ("0.25 kernel blocks", 8), ("0.25 kernel blocks", 32), ("LBHNC", 16)]:
        with opened(layout, "cpu", page) as case:
            blocks, unit = case.blocks, case.blocks.unit
            numbers = draw.permutation(BLOCKS)[:8]
            pages = case.pages("a", 0, 8 * TOKENS // page, numbers.tolist())
            found = blocks.units(pages)
            for number, row in enumerate(found):
                for part, where in enumerate(row):
                    token = number * page + part * unit
                    block, within = numbers[token // TOKENS], token % TOKENS
                    kernel = block * (TOKENS // blocks.kernel) + within // blocks.kernel
                    plane = blocks.planes[0]
                    view = rig.halves(case.tensors[0], rig.SHAPE)[0]
                    address = view[kernel, within % blocks.kernel].data_ptr()
                    assert plane.buffer.data_ptr() + where * plane.page == address


def test_vllm_s_sleep_is_refused() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    assert objection(config).endswith("Fix: start vLLM without --enable-sleep-mode")
    assert not objection(SimpleNamespace(model_config=SimpleNamespace()))


def wait_for(what: Any) -> bool:
    for _ in range(6000):
        if what():
            return True
        threading.Event().wait(0.01)
    return False

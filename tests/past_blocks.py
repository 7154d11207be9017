"""Cases of vLLM's blocks past host memory, over a driver that stands in: loads and saves, and a tier that reaches it.

Belongs here: a rig whose tensors the driver takes for device memory, and cases for whatever tier that is. Does not
belong here: the tier itself (gds_cases.py, unit/test_memory.py), or which tier and process (gds_worker.py,
unit/test_vllm_driver.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from hicache_ext.device import slots
from storage_backends.base import Completion, Outcome
from tests import device_blocks as rig
from tests.device_blocks import BLOCKS, TOKENS, Case
from tests.stand_ins import OnGpu, set_number
from tests.unit import test_vllm_device as cases

HIT, SCATTERED, ELSEWHERE = Outcome.HIT, cases.SCATTERED, cases.ELSEWHERE
#: Of the device: four slots of the largest page in each direction.
DEVICE_BYTES = 1 << 20
#: What the device has left.
FREE_BYTES = 1 << 30
#: Layouts, and tokens of a shared page.
SOME: list[tuple[str, int | None]] = [
    ("0.25 NHD", None), ("0.25 NHD", 4), ("0.25 kernel blocks", 64), ("K and V first", 16), ("BHLNC*", 64),
]  # fmt: skip
EVERY = [
    (layout, page) for layout in rig.LAYOUTS for page in (None, TOKENS // 4, TOKENS, TOKENS * 4)
    if page is not None or not layout.endswith("*")
]  # fmt: skip


class Happened:
    """An event of a device that has no streams."""

    def synchronize(self) -> None: ...


@contextmanager
def opened(layout: str, page: int | None = None, device_bytes: int = DEVICE_BYTES, **more: Any) -> Iterator[Case]:
    torch.cuda.Stream = lambda device=None, priority=0: SimpleNamespace(cuda_stream=0x200, synchronize=lambda: None)
    torch.cuda.mem_get_info = lambda device: (FREE_BYTES, 1 << 40)
    more.setdefault("mark", Happened)
    with rig.opened(layout, "cpu", page, wrap=OnGpu, device_bytes=device_bytes, **more) as case:
        yield case


Tiers = list[dict[str, Any]]


@dataclass(frozen=True)
class Reached:
    """A tier that reaches the device. tiers: a new one each time. below: tiers that go below it. spoil: makes a stored
    page, of this key and beginning with these bytes, one whose bytes are not those of its checksums. out: the tier does
    not reach the device any more."""

    tiers: Callable[[], Tiers]
    below: Callable[[], Tiers]
    spoil: Callable[[Case, bytes, bytes], None]
    out: Callable[[Case], None]
    layouts: Sequence[tuple[str, int | None]] = tuple(SOME)


def keys_of(pages: Any) -> list[bytes]:
    return [pages.keys[i * 32 : (i + 1) * 32] for i in range(pages.count)]


def past(case: Case) -> tuple[int, int, int]:
    """Pages saved past the host, loaded past it, and read again through it."""
    return tuple(case.counts[name] for name in ("save_past_host", "load_past_host", "load_again"))  # type: ignore[return-value]


def pages_go_past_the_host(reached: Reached) -> None:
    """Pages smaller and larger than blocks."""
    for layout, page in reached.layouts:
        with opened(layout, page, tiers=reached.tiers()) as case:
            assert case.moves.copies == "block copies, slots on it; else block copies, pinned host memory"
            cases.there_and_back(case)
            count = len(SCATTERED) * TOKENS // case.page
            assert past(case) == (count, count, 0), (layout, page, case.counts)
            assert not case.moves.lent


def spoilt_pages_are_load_errors_of_their_blocks(reached: Reached) -> None:
    with opened("0.25 NHD", tiers=reached.tiers()) as case:
        pages = case.pages("chain", 0, 8, SCATTERED)
        assert case.save(pages) == {"HIT": 8}
        for number in (2, 7):
            begin = case.tensors[0][SCATTERED[number]].contiguous().view(torch.uint8).flatten()[:64]
            reached.spoil(case, keys_of(pages)[number], begin.numpy().tobytes())
        case.poison()
        bad, outcomes = case.load(case.pages("chain", 0, 8, ELSEWHERE))
        assert bad == sorted([ELSEWHERE[2], ELSEWHERE[7]]), (bad, outcomes)
        assert [i for i, outcome in enumerate(outcomes) if outcome != HIT] == [2, 7], outcomes
        assert case.counts["load_past_host"] == 6
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert (now[:, :, bad] == rig.POISON).all(), "nothing of them reached a block"
        assert not case.moves.lent


def what_is_not_there_any_more_comes_through_the_host(reached: Reached) -> None:
    """Copies for a tier below are made in host memory, so saves go that way; what is missing above is read from it."""
    with opened("0.25 NHD", tiers=[*reached.tiers(), *reached.below()]) as case:
        pages = case.pages("chain", 0, 8, SCATTERED)
        before = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert case.save(pages) == {"HIT": 8}
        assert case.store.settled(30)
        assert case.counts["save_past_host"] == 0, "further tiers want copies"
        read, first = case.store.read, case.store.tiers[0].backend
        gone: list[Any] = []

        def read_without(batch: Any, deadline: float | None = None) -> Any:
            if batch.memory == "device" and not gone:  # evicted after it was looked up
                gone.append(first.remove(cases.rig_keys(case, pages, 5)))
            return read(batch, deadline)

        case.store.read = read_without
        case.poison()
        assert case.load(case.pages("chain", 0, 8, ELSEWHERE)) == ([], [HIT] * 8)
        assert gone == [1]
        assert (case.counts["load_past_host"], case.counts["load_again"]) == (7, 1)
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert torch.equal(now[:, :, ELSEWHERE], before[:, :, SCATTERED])


def a_route_that_goes_out(reached: Reached) -> None:
    """Between a part's turn and its read, and for good: all come through the host, and saves go that way."""
    with opened(
        "0.25 NHD", load_bytes=1 << 20, device_bytes=1, tiers=reached.tiers()
    ) as case:  # two slots: parts of one page
        pages = case.pages("chain", 0, 8, SCATTERED)
        before = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert case.save(pages) == {"HIT": 8}
        read, told = case.store.read, []

        def read_then_out(batch: Any, deadline: float | None = None) -> Any:
            if batch.memory == "device":
                told.append(batch)
                if len(told) == 4:
                    reached.out(case)
                    return Completion.finished(len(batch), Outcome.FAILED)
            return read(batch, deadline)

        case.store.read = read_then_out
        case.poison()
        assert case.load(case.pages("chain", 0, 8, ELSEWHERE)) == ([], [HIT] * 8)
        assert (case.counts["load_past_host"], case.counts["load_again"], len(told)) == (3, 1, 4)
        now = case.kv(case.tensors).unflatten(2, (BLOCKS, TOKENS))
        assert torch.equal(now[:, :, ELSEWHERE], before[:, :, SCATTERED])
        saved = case.counts["save_past_host"]
        assert case.save(case.pages("more", 0, 8, ELSEWHERE)) == {"HIT": 8}
        assert case.counts["save_past_host"] == saved
        assert not case.moves.lent


def staging_that_is_refused(reached: Reached) -> None:
    def full(store: Any) -> Any:
        store.reach_device(0)
        set_number("memory", 64 << 10)
        return store

    with logged() as said, opened("0.25 NHD", tiers=reached.tiers(), store=full) as case:
        set_number("memory", 1 << 30)
        assert case.moves.copies == "block copies, pinned host memory"
        assert "pages go through host memory, not straight to the device" in said()
        cases.there_and_back(case)
        assert past(case) == (0, 0, 0)
    with logged() as said, opened("0.25 NHD", device_bytes=FREE_BYTES // 2, tiers=reached.tiers()) as case:
        assert case.moves.copies.startswith("block copies, slots on it")
        assert said().count("is more than a quarter of the 1073741824 bytes that vLLM left") == 1
        assert "268435456 are taken" in said()
    with opened("0.25 NHD", device_bytes=0, tiers=reached.tiers()) as case:
        assert case.moves.copies == "block copies, pinned host memory"


def one_copy_fills_half_of_the_slots(reached: Reached) -> None:
    """What is stored goes on in parts."""
    with opened("0.25 NHD", tiers=reached.tiers()) as case:
        side = case.moves._saves._sides.device
        assert side is not None
        staging, copied, sent = side.staging["0"], list[int](), list[int]()
        half, whole = staging.slots // 2, slots.PART_BYTES
        store, write = side.copies.store, case.store.write
        side.copies.store = lambda part: (copied.append(len(part.slots)), store(part))  # type: ignore[method-assign, assignment]
        case.store.write = lambda batch: (sent.append(len(batch)), write(batch))[1]  # type: ignore[method-assign, union-attr]
        slots.PART_BYTES = staging.stride
        try:
            cases.there_and_back(case)
        finally:
            slots.PART_BYTES = whole
        assert sent == [1] * 8
        assert max(copied) == min(half, 8) > 1
        assert sum(copied) == 8
        assert past(case)[0] == 8
        assert not case.moves.lent


def blocks_that_somebody_else_gets(reached: Reached) -> None:
    late = cases.Later()
    with opened("0.25 NHD", tiers=reached.tiers(), mark=lambda: late) as case:
        told: list[Any] = []
        one, other = case.pages("a", 0, 4, SCATTERED[:4]), case.pages("b", 0, 4, SCATTERED[4:])
        case.moves.save([one], [case.space], lambda *said: told.append(("a", *said)))
        case.moves.save([other], [case.space], lambda *said: told.append(("b", *said)))
        case.moves.make_way([SCATTERED[2], 1])
        late.happened.set()
        assert cases.wait_for(lambda: len(told) == 2)
        assert sorted(told) == [("a", 0, b"", 4), ("b", 0, bytes([HIT]) * 4, 0)]
        assert case.counts["save_past_host"] == 4
        assert case.load(one)[1] == [Outcome.MISS] * 4
        assert case.load(case.pages("b", 0, 4, ELSEWHERE[:4])) == ([], [HIT] * 4)


def a_tier_that_is_late_keeps_its_slots(reached: Reached) -> None:
    reads: list[Any] = []

    def read(batch: Any, deadline: float | None = None) -> Completion:
        assert deadline is None
        reads.append((batch, Completion(len(batch))))
        return reads[-1][1]

    with opened("0.25 NHD", tiers=reached.tiers()) as case:
        case.save(case.pages("chain", 0, 8, SCATTERED))
        case.store.read = read
        case.poison()
        assert case.load(case.pages("chain", 0, 8, ELSEWHERE), 0.2) == (sorted(ELSEWHERE), [Outcome.TIMEOUT] * 8)
        assert case.moves.lent == sum(len(batch) for batch, _ in reads) > 0
        for batch, done in reads:
            assert batch.memory == "device"
            for page in range(len(batch)):
                batch.buffers(page)[0][:] = bytes(len(batch.buffers(page)[0]))
            done.settle_many(range(len(batch)), [HIT] * len(batch))
        assert cases.wait_for(lambda: not case.moves.lent)
        assert (case.kv(case.tensors) == rig.POISON).all()


@contextmanager
def logged() -> Iterator[Callable[[], str]]:
    """What was said at WARNING or above meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield lambda: "\n".join(lines)
    finally:
        logging.getLogger().removeHandler(handler)


CASES: dict[str, Callable[[Reached], None]] = {
    case.__name__: case
    for case in (
        pages_go_past_the_host, spoilt_pages_are_load_errors_of_their_blocks,
        what_is_not_there_any_more_comes_through_the_host, a_route_that_goes_out, staging_that_is_refused,
        one_copy_fills_half_of_the_slots,
        blocks_that_somebody_else_gets, a_tier_that_is_late_keeps_its_slots,
    )
}  # fmt: skip

"""Loads and stores while a decode runs, every byte and every output checked: of the block copies, and of the linker."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from hicache_ext.cuda import Copier, Way  # noqa: E402
from tests.gpu.decoding import LAYERS, PAGES, SHAPE, Decode, side_of  # noqa: E402

MOVED, CYCLES, LIMIT_S = 40, 12, 60


class Mover:
    """Moves pages to and from a decode's pool, on a stream of its own and into pages of its own."""

    def __init__(self, decode: Decode, name: str, pages: Sequence[int], layout: str, back: str, seed: int) -> None:
        self.decode, self.name = decode, name
        self.pages = np.array(pages)
        _, self.source, source = side_of(layout, MOVED + 5, seed=seed)
        self.target_buffer, self.target, target = side_of(back, MOVED + 5)
        self.there, self.back = Copier(SHAPE, decode.side, source), Copier(SHAPE, decode.side, target)
        self.stream, self.watcher = torch.cuda.Stream(), torch.cuda.Stream()
        self.draw = np.random.default_rng(seed)
        self.cycles = 0
        self._events = self.there.events()
        self._turns = {
            "whole": itertools.cycle([None, *self.there.order(MOVED)]),
            "layers": itertools.cycle([None, *self.there.order(MOVED, layer_wise=True)]),
            "store": itertools.cycle([None, *self.back.order(MOVED)]),
        }

    def numbers(self, of: int) -> Any:
        return self.draw.permutation(of)[:MOVED]

    def load(self, from_: Any, to: Any) -> None:
        self.there.load(from_, to, self.stream.cuda_stream, next(self._turns["whole"]))

    def load_layers(self, from_: Any, to: Any) -> None:
        """A reader on another stream takes each layer once it has arrived, as a forward does."""
        self.there.load_layers(from_, to, self.stream.cuda_stream, self._events, next(self._turns["layers"]))
        on_device = torch.from_numpy(to).to("cuda")
        with torch.cuda.stream(self.watcher):
            taken = []
            for layer in range(LAYERS):
                self._events.wait(self.watcher.cuda_stream, layer)
                taken.append(self.decode.view[on_device, layer])
            found = torch.stack(taken, 1).cpu()
        assert torch.equal(found, self.source[torch.from_numpy(from_)]), f"{self.name}: a layer that had not arrived"

    def store(self, from_: Any, wanted: Any) -> None:
        to = self.numbers(MOVED + 5)
        self.target_buffer.fill_(0xA5)
        self.back.store(from_, to, self.stream.cuda_stream, next(self._turns["store"]))
        self.stream.synchronize()
        expected = torch.full_like(self.target, 0xA5)
        expected[torch.from_numpy(to)] = wanted
        assert torch.equal(self.target, expected), f"{self.name}: a byte outside the target, or a wrong one"

    def there_and_back(self, load: Callable[[Any, Any], None]) -> None:
        from_, to = self.numbers(MOVED + 5), self.draw.permutation(self.pages)[:MOVED]
        load(from_, to)
        self.store(to, self.source[torch.from_numpy(from_)])

    def away(self, known: Any) -> None:
        """Pages that the decode reads at this moment."""
        chosen = self.numbers(len(self.pages))
        self.store(self.pages[chosen], known[torch.from_numpy(chosen)])


@contextmanager
def beside(works: Sequence[Callable[[], None]], over: threading.Event) -> Iterator[list[BaseException]]:
    """Each again and again in a thread of its own, until `over`; the list takes what they raise, and is to be empty."""
    failed: list[BaseException] = []

    def loop(work: Callable[[], None]) -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as error:
            failed.append(error)
            over.set()

    threads = [threading.Thread(target=loop, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield failed
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def test_loads_and_stores_beside_a_decode() -> None:
    """Three that load into pages of the decode's pool and store them again, one that stores the prompts' pages while
    they are read; the decode's outputs are those of a run alone, and no other page of the pool has changed."""
    decode = Decode()
    decode.check()
    before = decode.view.cpu().clone()
    parts = [decode.free[at : at + MOVED] for at in range(0, 3 * MOVED, MOVED)]
    movers = [
        Mover(decode, "page_first", parts[0], "page_first", "layer_first", 1),
        Mover(decode, "page_first_direct, by layers", parts[1], "page_first_direct", "canonical", 2),
        Mover(decode, "page_head, by layers", parts[2], "page_head", "page_first", 3),
        Mover(decode, "prompts", decode.prompts, "canonical", "page_first_direct", 4),
    ]
    known = before[torch.from_numpy(decode.prompts)]

    def counted(mover: Mover, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            work()
            mover.cycles += 1

        return run

    works = [
        counted(movers[0], lambda: movers[0].there_and_back(movers[0].load)),
        counted(movers[1], lambda: movers[1].there_and_back(movers[1].load_layers)),
        counted(movers[2], lambda: movers[2].there_and_back(movers[2].load_layers)),
        counted(movers[3], lambda: movers[3].away(known)),
    ]
    over, runs = threading.Event(), 0
    until = time.monotonic() + LIMIT_S
    with beside(works, over):
        while not over.is_set() and (runs < 4 or min(mover.cycles for mover in movers) < CYCLES):
            decode.check()
            runs += 1
            assert time.monotonic() < until, f"too slow: {[mover.cycles for mover in movers]} cycles, {runs} runs"
    taken = {way for mover in movers for copier in (mover.there, mover.back) for way in copier.used}
    assert set(Way) <= taken, taken
    others = np.setdiff1d(np.arange(PAGES), np.concatenate(parts))
    assert torch.equal(decode.view.cpu()[others], before[others]), "a page of nobody's has changed"


def test_a_wrong_byte_would_be_seen() -> None:
    """The control: one byte of one prompt's page, and one load into a page that the decode reads."""
    decode = Decode()
    decode.check()
    page = int(decode.prompts[5])
    decode.view[page, 3, 1, 2, 1, 7] ^= 0x40
    torch.cuda.synchronize()
    with pytest.raises(AssertionError, match="a step's output"):
        decode.check()
    decode.view[page, 3, 1, 2, 1, 7] ^= 0x40
    torch.cuda.synchronize()
    decode.check()
    mover = Mover(decode, "wrong", [*decode.free[: MOVED - 1], page], "page_first", "page_first", 1)
    mover.there_and_back(mover.load)
    with pytest.raises(AssertionError, match="a step's output"):
        decode.check()


def test_the_linker_beside_a_decode(linker_on_cuda: Any) -> None:
    """SGLang's cache serves, offloads, is emptied and loads, while a decode runs: what each forward reads is what it
    would have computed, and the decode's outputs are those of a run alone."""
    linker_rig, rig = linker_on_cuda.linker_rig, linker_on_cuda.rig
    decode = Decode()
    extra = rig.shared_tier()
    rig.SharedMemory.pages.clear()
    chains = [list(range(1000 * i, 1000 * i + 12 * rig.PAGE)) for i in range(6)]
    over, runs = threading.Event(), []

    def decoded() -> None:
        decode.check()
        runs.append(1)

    with linker_rig.linked(extra=extra, slots=256) as found, beside([decoded], over):
        until = time.monotonic() + LIMIT_S
        for turn in itertools.count():
            for chain in chains:
                assert found.serve(chain)["landed"]
            if turn % 2:
                found.settle()
                found.flush()
            counted = found.linker.counters.snapshot()
            if turn >= 12 and counted["load_pages"] > 200 and len(runs) >= 4:
                break
            assert not over.is_set()
            assert time.monotonic() < until, f"too slow: {counted}"

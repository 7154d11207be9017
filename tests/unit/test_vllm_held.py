"""Pages that wait to be saved: each once, never out of a block that is somebody else's by then, none for ever."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hicache_ext.vllm import held
from hicache_ext.vllm.held import Held, Run

PAGE = 2


@pytest.mark.parametrize(
    ("now", "due", "pages", "most", "goes"),
    [(5, 9, 3, 64, False), (9, 9, 3, 64, True), (5, 9, 64, 64, True), (9, 9, 0, 64, False), (5, 4, 1, 64, True)],
)
def test_what_waits_goes_when_it_is_due_or_enough(now: int, due: float, pages: int, most: int, goes: bool) -> None:
    assert held.ripe(now, due, pages, most) is goes


@pytest.mark.parametrize(
    ("budget", "page", "pages"), [(256 << 20, 4 << 20, 32), (1 << 20, 8 << 20, 1), (1 << 40, 1, 64)]
)
def test_what_waits_leaves_room_for_what_comes_next(budget: int, page: int, pages: int) -> None:
    assert held.limit(budget, page) == pages


def _block(page: int) -> list[int]:
    return [100 + page]


def test_decoded_pages_wait_and_a_prompts_do_not() -> None:
    pages: Held[str] = Held()
    pages.begin()
    pages.add("prompt", 0, 9, _block, 1000)
    assert pages.take(lambda _: 9) == [Run("prompt", 0, 9)]
    for step in range(held.STEPS):
        pages.begin()
        if step == 0:
            pages.add("prompt", 9, 10, _block, 1000)
        assert pages.take(lambda _: 10) == []
    pages.begin()
    assert pages.take(lambda _: 10) == [Run("prompt", 9, 10)]
    assert not pages
    assert pages.given_up == 0


def test_the_last_step_that_a_request_may_take_is_waited_for_and_no_longer() -> None:
    pages: Held[str] = Held()
    pages.begin()
    pages.add("short", 0, 1, _block, 2)
    pages.begin()
    assert pages.take(lambda _: 1) == []
    pages.begin()
    assert pages.take(lambda _: 1) == [Run("short", 0, 1)]


def test_a_page_whose_block_was_given_away_is_left_out() -> None:
    pages: Held[str] = Held()
    pages.begin([101])
    pages.add("a", 0, 3, _block, 9)
    pages.finish("a")
    pages.begin([101])
    assert pages.take(lambda _: 3) == [Run("a", 0, 1, over=True), Run("a", 2, 3, over=True)]
    assert pages.given_up == 1


def test_a_request_that_is_over_does_not_hurry_the_others() -> None:
    pages: Held[str] = Held()
    pages.begin()
    pages.add("a", 0, 1, lambda page: [page], 1000)
    pages.add("b", 0, 1, lambda page: [10 + page], 1000)
    pages.finish("b")
    pages.begin()
    assert pages.take(lambda _: 1) == [Run("b", 0, 1, over=True)]
    assert pages.pages == 1
    pages.finish("a")
    pages.begin([0])
    assert pages.take(lambda _: 1) == []
    assert (pages.pages, pages.given_up) == (0, 1)


@dataclass(eq=False)
class _Request:
    """tokens: those that the engine knows. coming: sampled by steps whose output it has not seen. told, lies: pages and
    their blocks, as the connector was told of them."""

    number: int
    most: int
    tokens: list[int]
    coming: deque[int] = field(default_factory=deque)
    produced: int = 0
    computed: int = 0
    told: int = 0
    table: list[int] = field(default_factory=list)
    lies: list[int] = field(default_factory=list)

    def everything(self) -> list[int]:
        return [*self.tokens, *self.coming]


class Engine(RuleBasedStateMachine):
    """A scheduler of few blocks, with output that is known one step late or not; blocks hold what was computed last."""

    @initialize(late=st.booleans(), blocks=st.integers(6, 40), most=st.integers(1, 12))
    def start(self, late: bool, blocks: int, most: int) -> None:
        self.held: Held[_Request] = Held(most)
        self.late, self.free = late, deque(range(1, blocks))
        self.blocks: dict[int, list[tuple[int, ...] | None]] = {block: [None] * PAGE for block in range(1, blocks)}
        self.running: list[_Request] = []
        self.waiting: list[_Request] = []
        self.over: list[_Request] = []
        self.made = self.saved = self.whole = self.spoiled = self.dropped = 0
        self.taken: set[tuple[int, int, int]] = set()
        self.lives: dict[_Request, int] = {}

    @rule(prompt=st.integers(1, 14), most=st.integers(1, 150))
    def arrive(self, prompt: int, most: int) -> None:
        self.made += 1
        tokens = [self.made * 1000 + at for at in range(prompt)]
        self.waiting.append(_Request(self.made, most, tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._finish(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule()
    def preempt(self) -> None:
        self._preempt()

    @rule()
    def reset(self) -> None:
        self.held.clear()

    @rule(steps=st.integers(1, 90))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            if not self.running and not self.waiting:
                return
            self._step()

    @rule()
    def idle(self) -> None:
        """No requests any more: vLLM makes one step that computes nothing."""
        for request in list(self.running):
            self._finish(request)
        for request in self.waiting:
            self.held.finish(request)
        self.over += self.waiting
        self.waiting.clear()
        self._step()
        assert not self.held
        assert self.held.pages == 0
        assert self.saved + self.held.given_up == self.whole

    def _step(self) -> None:
        fresh: list[int] = []
        scheduled: list[tuple[_Request, int, bool]] = []
        for request in list(self.running):
            if request in self.running:
                self._schedule(request, fresh, scheduled, anew=False)
        scheduled = [one for one in scheduled if one[0] in self.running]
        while self.waiting and len(self.free) > 8:
            request = self.waiting.pop(0)
            self.running.append(request)
            request.table, request.computed = [], 0
            self._schedule(request, fresh, scheduled, anew=True)
        # The connector's half of a step.
        self.held.begin(fresh)
        for request, count, anew in scheduled:
            if anew:
                self.held.drop(request)
                request.told = 0
                self.lives[request] = self.lives.get(request, 0) + 1
            request.lies = list(request.table)
            last = (request.computed + count) // PAGE
            if last > request.told:
                left = max(0, request.most - request.produced - len(request.coming) - 1)
                self.held.add(request, request.told, last, lambda page, lies=request.lies: [lies[page]], left)
                self.whole += last - request.told
                request.told = last
        runs = self.held.take(lambda request: len(request.tokens) // PAGE)
        # The forward: what is computed goes into the blocks, and a token comes out.
        for request, count, _ in scheduled:
            every = request.everything()
            for at in range(request.computed, request.computed + count):
                self.blocks[request.table[at // PAGE]][at % PAGE] = tuple(every[: at + 1])
            request.computed += count
            if request.computed == len(every):
                self.made += 1
                request.coming.append(-self.made)
        for run in runs:
            self._read(run)
        # Its output; with late output that of the step before.
        for request in list(self.running):
            while len(request.coming) > int(self.late):
                self._know(request)

    def _know(self, request: _Request) -> None:
        request.tokens.append(request.coming.popleft())
        request.produced += 1
        if request.produced >= request.most:
            self._finish(request)
            request.coming.clear()

    def _schedule(self, request: _Request, fresh: list[int], scheduled: list[object], anew: bool) -> None:
        if request.produced + len(request.coming) >= request.most:
            return  # its last token is on its way
        count = min(7, len(request.everything()) - request.computed)
        while len(request.table) * PAGE < request.computed + count:
            if not self.free:
                self._preempt()
                if request not in self.running:
                    return
                continue
            block = self.free.popleft()
            fresh.append(block)
            request.table.append(block)
        scheduled.append((request, count, anew))

    def _preempt(self) -> None:
        request = self.running.pop()
        self.free.extend(reversed(request.table))
        request.table, request.computed = [], 0
        request.coming.clear()  # sampled anew
        self.waiting.insert(0, request)

    def _finish(self, request: _Request) -> None:
        self.held.finish(request)
        self.running.remove(request)
        self.free.extend(reversed(request.table))
        self.over.append(request)

    def _read(self, run: Run[_Request]) -> None:
        request = run.owner
        assert run.over == (request in self.over)
        for page in range(run.first, run.last):
            name = (request.number, self.lives[request], page)
            assert name not in self.taken, "saved twice"
            self.taken.add(name)
            self.saved += 1
            right = [tuple(request.tokens[: page * PAGE + at + 1]) for at in range(PAGE)]
            assert self.blocks[request.lies[page]] == right, "what is saved is not what was computed"

    @invariant()
    def nothing_waits_beyond_what_is_asked(self) -> None:
        if hasattr(self, "held"):
            assert self.held.pages + self.saved + self.held.given_up == self.whole


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)

"""Tiers and their cascade, beside their own tools and plain clients, in one run.

Belongs here: opening the tiers of a configuration for a benchmark, and who is measured beside whom. Does not belong
here: rounds (tiers_rounds), yardsticks of single types (tiers_<type>), goals (tiers_goals), presentation
(hicache_ext.cli.bench_tiers).

All subjects of a page size move the same memory, in huge pages where the machine has them; it is shared memory where a
tier asks for that. CPU seconds are this process's, all threads, and those of a tier's own processes, or the tool's own;
a server's are not in them. Plain clients bring a page into its place as
tiers do, and check nothing.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hicache_ext.bench.io_goals import size_name
from hicache_ext.bench.io_memory import Memory
from hicache_ext.bench.tiers_ours import Cascade, OneTier, VerifiedPass
from hicache_ext.bench.tiers_plain import Options, Say, Yardstick, yardstick
from hicache_ext.bench.tiers_rounds import Course, Plan, Subject, rows, space_of
from hicache_ext.config import Config, ConfigError, TierConfig
from hicache_ext.store.tiered import TieredStore
from storage_backends.base import Dispatcher
from storage_backends.registry import backend_class

CASCADE, CHECKSUMS = "cascade", "checksums"
ALONE, ALL = "alone", "all tiers"
DEAD = ("refuses", "hangs")

Row = dict[str, Any]


def run(config: Config, plan: Plan, only: Sequence[str], dead: Sequence[str], say: Say) -> tuple[list[Row], list[str]]:
    """Rows of every tier and the cascade, and of each that could not be measured why.

    only: names of tiers, and "cascade"; none: all. dead: names of the tiers that die in the cascade; none: each but the
    first whose server can be elsewhere. say: told who is left out beside a tier. ConfigError: a name that is none.
    """
    labels = [tier.label for tier in config.tiers]
    for name in (*only, *dead):
        if name not in labels and not (name == CASCADE and name in only):
            raise ConfigError(f"{name!r} is no tier of this file. Fix: use one of {', '.join(labels)}")
    if dead and dead[0] == labels[0]:
        raise ConfigError(f"{dead[0]!r} is the first tier: all pages are there. Fix: name a further one")
    found: list[Row] = []
    failed: list[str] = []

    def attempt(what: str, measured: Callable[[], list[Row]]) -> None:
        try:
            found.extend(measured())
        except Exception as error:  # of a disk, a server, or whatever a client raises: the other tiers are measured
            failed.append(f"{what}, {size_name(page)}: {str(error).partition(chr(10))[0]}")

    opened = [config.backend(tier) for tier in range(len(config.tiers))]
    shared = any(kind.shares_memory(options) for kind, options in opened)
    for page in plan.pages:
        memory = Memory(page, plan.count(page), huge=True, shared=shared)
        found.append(_checksums(plan, memory))
        for tier in config.tiers:
            if not only or tier.label in only:
                attempt(tier.label, lambda tier=tier, memory=memory: _tier(tier, plan, memory, say))  # type: ignore[misc]
        if len(config.tiers) > 1 and (not only or CASCADE in only):
            attempt(CASCADE, lambda memory=memory: _cascade(config, plan, memory, dead, say))  # type: ignore[misc]
    return found, failed


def _checksums(plan: Plan, memory: Memory) -> Row:
    """What checking costs by itself, in one thread: a floor of every verified transfer."""
    course = Course(plan, memory, space_of(memory.block, CHECKSUMS))
    subjects: list[Subject] = [VerifiedPass()]
    return rows(CHECKSUMS, memory.block, plan.batch, memory.pages, subjects, course.run(CHECKSUMS, subjects))[0]


def _tier(tier: TierConfig, plan: Plan, memory: Memory, say: Say) -> list[Row]:
    token, ours = secrets.token_hex(4), Placed(tier, plan, memory)
    space = space_of(memory.block, token)
    with ExitStack() as stack:
        config = stack.enter_context(ours.apart(token))
        kind, options = config.backend(0)
        dispatcher = Dispatcher()
        backend = kind(options, dispatcher)
        subjects: list[Subject] = [OneTier(backend, dispatcher, ours.cases, ours.keeps)]
        stack.callback(subjects[0].close)
        backend.register_memory(memory.address, memory.size)
        for other in ours.about.plain(options, memory, plan, say):
            stack.callback(other.close)
            subjects.append(other)
        taken = Course(plan, memory, space).run(f"{tier.label}, {memory.block >> 10} KiB", subjects)
    return rows(tier.label, memory.block, plan.batch, memory.pages, subjects, taken)


def _cascade(config: Config, plan: Plan, memory: Memory, dead: Sequence[str], say: Say) -> list[Row]:
    """The first tier alone, all of them, and all of them with one that is dead, each with a first tier of its own."""
    first, *further = (Placed(tier, plan, memory) for tier in config.tiers)
    with ExitStack() as stack:
        space = space_of(memory.block, secrets.token_hex(4))
        subjects: list[Subject] = []

        def add(name: str, placed: Sequence[Placed], is_dead: bool = False) -> None:
            tiers = [stack.enter_context(one.apart(secrets.token_hex(4))).tiers[0] for one in placed]
            opened = TieredStore.open(config.model_copy(update={"tiers": tuple(tiers)}))
            opened.register_memory(memory.address, memory.size)
            cleared = [i for i, one in enumerate(placed) if not one.keeps and (i == 0 or not is_dead)]
            subjects.append(Cascade(name, opened, cleared, is_dead, alone=name.endswith(ALONE)))
            stack.callback(subjects[-1].close)

        add(f"{first.label} {ALONE}", [first])
        add(ALL, [first, *further])
        for at, victim in enumerate(further):
            if dead and victim.label not in dead:
                continue
            for how in DEAD:
                port = stack.enter_context(_refusing() if how == "refuses" else _hanging())
                moved = victim.moved(port)
                if moved is None:
                    say(f"{victim.label} has no server that could be elsewhere: its death is not measured")
                    break
                add(f"{victim.label} {how}", [first, *further[:at], moved, *further[at + 1 :]], is_dead=True)
        taken = Course(plan, memory, space).run(f"{CASCADE}, {memory.block >> 10} KiB", subjects)
    return rows(CASCADE, memory.block, plan.batch, memory.pages, subjects, taken)


class Placed:
    """One tier of the configuration, as a benchmark opens it."""

    def __init__(self, tier: TierConfig, plan: Plan, memory: Memory, options: Options | None = None) -> None:
        self._tier, self._plan, self._memory = tier, plan, memory
        self._options = tier.options if options is None else options
        self.label = tier.label
        self.about: Yardstick = yardstick(backend_class(tier.type))
        self.cases, self.keeps = self.about.measured(self._options)

    def moved(self, port: int) -> Placed | None:
        """The same tier with its server at this port of this machine."""
        options = self.about.moved(self._options, port)
        return None if options is None else Placed(self._tier, self._plan, self._memory, options)

    @contextmanager
    def apart(self, token: str) -> Iterator[Config]:
        """A configuration of this tier alone, where nobody's pages are met; what that made is gone afterwards."""
        written = (self._memory.count + self._plan.singles) * (self._memory.block + 4096)
        options = self.about.apart(self._options, token, (self._plan.rounds + 1) * written)
        tier = self._tier
        try:
            opened = TierConfig(
                type=tier.type, name=self.label, write=tier.write, write_hits=tier.write_hits, promote=tier.promote,
                **options,
            )  # fmt: skip
            yield Config(tiers=(opened,))
        finally:
            self.about.clean(options)


@contextmanager
def _refusing() -> Iterator[int]:
    """A port that nobody listens at, and that nobody gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def _hanging() -> Iterator[int]:
    """A port whose connections open and then say nothing."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(128)
        yield held.getsockname()[1]

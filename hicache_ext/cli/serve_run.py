"""The runs of `bench serve`: one engine at a URL, in one go or in two phases, or subjects that it starts itself.

Belongs here: the order of engines, restarts and passes. Does not belong here: options, tables and files
(hicache_ext.cli.bench_serve), or what one engine is asked (hicache_ext.bench.serve).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hicache_ext.bench import serve_trace
from hicache_ext.bench.serve import Course, Plan, drop_page_cache, storage_tiers
from hicache_ext.bench.serve_client import EngineError
from hicache_ext.bench.serve_disk import read_gb_per_s
from hicache_ext.bench.serve_engines import Engine, Facts
from hicache_ext.bench.serve_goals import goals
from hicache_ext.bench.serve_matrix import Draw, Group, Tier, TraceRequest
from hicache_ext.bench.serve_state import State
from hicache_ext.bench.serve_summary import Sample, against_cold, disk_bounds, rows, verdicts
from hicache_ext.cli.serve_subjects import RECOMPUTE, Launched
from hicache_ext.cli.serving import ServerFailed


@dataclass(frozen=True)
class Trace:
    """What to replay instead of the matrix. concurrency 0: at the trace's times, over `speed`."""

    requests: Sequence[TraceRequest]
    concurrency: int
    speed: float


@dataclass
class Report:
    """What a run found so far: complete enough to be written at any time.

    about: of each subject, for the result. kv_bytes: of one token; 0: not known.
    """

    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    other_rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kv_bytes: int = 0

    def rows(self) -> list[dict[str, Any]]:
        pages = [about["page_tokens"] for about in self.about.values() if about.get("page_tokens")]
        names = {name: Tier(about["storage_tier"]) for name, about in self.about.items() if about.get("storage_tier")}
        return self.other_rows + rows(self.samples, pages[0] if pages else 1, names)

    def values(self) -> dict[str, Any]:
        """What the result file holds, besides machine and command."""
        found = self.rows()
        matrix = [row for row in found if "pass" not in row]
        bounds = disk_bounds(matrix, self.speeds(), self.kv_bytes)
        in_memory = {name for name, about in self.about.items() if about.get("ram_backed")}
        return {
            "subjects": self.about,
            "rows": found,
            "crossover": verdicts(matrix),
            "against_disk": bounds,
            "against_cold": against_cold(matrix),
            "goals": [goal.row() for goal in goals(matrix, bounds, in_memory)],
            "notes": self.notes,
        }

    def speeds(self) -> dict[str, float]:
        """For each subject, the most that plain reads of its file system gave in this run: a disk's speed varies."""
        measured = [about for about in self.about.values() if about.get("read_gb_per_s")]
        best: dict[str, float] = {}
        for about in measured:
            mount = about["file_system"]
            best[mount] = max(best.get(mount, 0.0), about["read_gb_per_s"])
        return {name: best[about["file_system"]] for name, about in self.about.items() if about in measured}


@dataclass
class Talk:
    """Where lines go. say: once each, kept in the result. progress: what is going on now. save: writes the report."""

    report: Report
    line: Callable[[str], None]
    progress: Callable[[str], None]
    save: Callable[[], None] = lambda: None

    def say(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)
            self.line(text)


def of_url(
    engine: Engine,
    name: str,
    plan: Plan,
    trace: Trace | None,
    talk: Talk,
    fill_to: Path | None = None,
    read_from: State | None = None,
) -> None:
    """An engine that runs already. Raises EngineError.

    fill_to: only fill, and leave there what the second phase needs. read_from: only read, after a restart.
    """
    facts = engine.facts()
    name = name or _default_name(facts)
    storage = storage_tiers(plan.tiers)
    if len(storage) > 1:
        raise EngineError("local and remote are one tier to an engine that runs. Fix: ask for one of them")
    has = {Tier.NONE, Tier.DEVICE} | ({Tier.HOST} if facts.host else set()) | (set(storage) if facts.storage else set())
    for lacking in sorted(plan.tiers - has):
        talk.say(f"{name}: {lacking} left out: the engine has no such tier")
    course = _course(name, replace(plan, tiers=plan.tiers & has), engine, facts, talk, talk.progress)
    tier: Tier | None = storage[0] if storage and facts.storage else None
    talk.report.about[name] = _about(facts, tier)
    if read_from is not None:
        if tier is None:
            raise EngineError(f"{name}: nothing to read. Fix: ask for --tier local of an engine with a storage backend")
        course.expected = read_from.expected
        talk.report.other_rows += read_from.rows
        course.warm_up(restarted=True)
        course.read(tier)
    elif trace is not None:
        course.warm_up()
        _replay(course, trace, talk, tier or Tier.LOCAL, lambda: engine.flush())
    else:
        course.warm_up()
        then: Callable[[Group], None] = lambda group: None  # noqa: E731
        if tier is not None and fill_to is None:
            chosen = tier

            def then(group: Group) -> None:
                course.flush_and_read(chosen, group)

        course.fill(then)
        if fill_to is not None:
            talk.progress("waiting for the storage tier")
            engine.flush()  # succeeds when nothing is on its way any more
            State(name, plan.draw, plan.new_tokens, course.expected, talk.report.rows()).save(fill_to)


def of_subjects(
    launched: Sequence[Launched],
    plan: Plan,
    rounds: int,
    trace: Trace | None,
    talk: Talk,
    disk_bytes: int = 0,
) -> None:
    """Start each subject's servers in turn, another one first each round; what fails is left out and said.

    disk_bytes: size of the file whose plain reads a storage tier is held against; 0: not measured.
    """
    for turn in range(rounds):
        order = [*launched[turn % len(launched) :], *launched[: turn % len(launched)]]
        for each in order:
            name = each.subject.name
            if plan.until is not None and time.monotonic() > plan.until:
                talk.say(f"{name}: left out: the time limit is over")
                continue
            # Other prompts each round: storage may have kept the last one's.
            drawn = replace(plan, draw=Draw(plan.draw.seed + turn, plan.draw.vocabulary))
            try:
                with each:
                    _one(each, drawn, trace, talk, disk_bytes)
            except (ServerFailed, EngineError, OSError) as error:
                talk.say(f"{name}: stopped: {error}")
            talk.save()


def _one(each: Launched, plan: Plan, trace: Trace | None, talk: Talk, disk_bytes: int) -> None:
    name = each.subject.name

    def progress(text: str) -> None:
        talk.progress(f"{name}: {text}")

    for tier in sorted(plan.tiers - each.subject.tiers):
        if not (name == RECOMPUTE or trace):
            talk.say(f"{name}: {tier} left out: the subject has no such tier")
    speed = None
    if disk_bytes and name != RECOMPUTE:
        progress("measuring the disk")
        each.store.mkdir(parents=True, exist_ok=True)
        speed = read_gb_per_s(each.store, disk_bytes)
        talk.line(f"{name}: plain O_DIRECT reads: {speed} GB/s")
    begin = time.monotonic()
    engine, facts = each.start(progress)
    talk.line(f"{name}: server up after {time.monotonic() - begin:.0f} s")
    storage = storage_tiers(plan.tiers & each.subject.tiers)
    first = storage[0] if storage else Tier.LOCAL
    about = {**_about(facts, first if storage else None), **each.describe()}
    talk.report.about[name] = {**about, **({"read_gb_per_s": speed} if speed else {})}
    course = _course(name, replace(plan, tiers=plan.tiers & each.subject.tiers), engine, facts, talk, progress)

    def restart() -> None:
        course.engine.flush()  # succeeds when nothing is on its way to the storage tier any more
        each.stop()
        course.engine, course.facts = each.start(progress)
        course.warm_up(restarted=True)
        # Last, so that what a server wrote through the page cache is on the disk by now, and nothing came back since.
        if problem := drop_page_cache():
            talk.say(f"{name}: {problem}")

    course.warm_up()
    if trace is not None:
        _replay(course, trace, talk, first, restart)
        return
    course.fill()
    for tier in storage:
        if tier is Tier.REMOTE and (problem := _forget(course, each)):
            talk.say(f"{name}: remote left out: {problem}")
            continue
        restart()
        course.read(tier)


def _forget(course: Course, each: Launched) -> str:
    course.engine.flush()
    each.stop()
    return each.forget_local()


def _course(name: str, plan: Plan, engine: Engine, facts: Facts, talk: Talk, progress: Callable[[str], None]) -> Course:
    """What it measures is the report's at once, and saved: however the run ends, that much is there."""
    return Course(name, plan, engine, facts, talk.say, progress, talk.save, samples=talk.report.samples)


def _replay(course: Course, trace: Trace, talk: Talk, storage: Tier, empty_memory: Callable[[], None]) -> None:
    before = None
    passes = []
    for which in serve_trace.PASSES:
        replies, seconds = course.replay(trace.requests, trace.concurrency, trace.speed)
        for error in sorted({reply.error for reply in replies if reply.error}):
            talk.say(f"{course.subject}: {which}: {error}")
        found = serve_trace.trace_rows(course.subject, which, replies, before, trace.concurrency, storage)
        talk.report.other_rows += found
        passes.append(serve_trace.pass_line(which, replies, seconds))
        before = replies
        if which != serve_trace.PASSES[-1]:
            empty_memory()
    talk.report.about[course.subject]["passes"] = passes


def _about(facts: Facts, storage: Tier | None) -> dict[str, Any]:
    return {
        "version": facts.version,
        "model": facts.model,
        "page_tokens": facts.page_tokens,
        "device_tokens": facts.device_tokens,
        "storage": facts.storage,
        **({"storage_tier": str(storage)} if storage else {}),
    }


def _default_name(facts: Facts) -> str:
    match facts.storage:
        case "":
            return RECOMPUTE
        case "hicache_ext" | "dynamic":
            return "ours"
        case other:
            return f"stock-{other}"

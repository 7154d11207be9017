"""Faults on purpose: an engine around any engine that fails, delays, shortens, tears or corrupts transfers by plan.

Belongs here: the plan, its file, and the engine that carries it out. Does not belong here: what a store does about it.

A plan is a list of rules for each direction, in a JSON file or as Python values:

    {"seed": 1,
     "read":  [{"fault": "delay", "seconds": [0, 0.05], "probability": 0.2},
               {"fault": "errno", "errno": "EIO", "count": 3, "after": 10},
               {"fault": "flip", "probability": 0.01}],
     "write": [{"fault": "errno", "errno": "ENOSPC", "probability": 1}]}

A file is read again when it changes, so that a test can steer a server that runs. What fired is counted in `fired`,
and for a file also in `PATH.fired-PID.json` beside it, which `fired_counts(PATH)` sums over processes.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage_backends.local.engine import IoEngine, Transfer
from storage_backends.local.engine_common import end, on_a_thread_of_its_own

logger = logging.getLogger(__name__)

#: A short transfer ends on this boundary, as a device's would.
_BLOCK = 4096


class Rule(BaseModel):
    """One kind of fault.

    fault: "errno" (nothing is moved), "short" (only a part is moved, and said so), "torn" (only a part is moved, and
    the whole is claimed: a power cut), "delay" (the transfer begins later, and so touches memory late), "flip" (one
    bit is turned over after a read).
    probability: per transfer. count: fires at most this often (0: no limit). after: transfers let through first.
    seconds: of a delay; one number, or the ends of a range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fault: Literal["errno", "short", "torn", "delay", "flip"]
    probability: float = Field(1.0, ge=0, le=1)
    count: int = Field(0, ge=0)
    after: int = Field(0, ge=0)
    errno: int = errno.EIO
    seconds: tuple[float, float] = (0.0, 0.0)

    @field_validator("errno", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return getattr(errno, value, value) if isinstance(value, str) else value

    @field_validator("seconds", mode="before")
    @classmethod
    def _one_or_two(cls, value: object) -> object:
        return (value, value) if isinstance(value, int | float) else value

    @property
    def label(self) -> str:
        return errno.errorcode.get(self.errno, str(self.errno)) if self.fault == "errno" else self.fault


class Rules(BaseModel):
    """The whole plan as a file holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int | None = None
    read: tuple[Rule, ...] = ()
    write: tuple[Rule, ...] = ()


class Faults(NamedTuple):
    """What is to happen to one transfer."""

    delay: float = 0.0
    error: int = 0
    cut: Literal["", "short", "torn"] = ""
    flip: bool = False


@dataclass
class _Tally:
    seen: int = 0
    fired: int = 0


class FaultPlan:
    """Decides for each transfer. `fired` counts by "direction.fault" ("read.EIO", "write.delay"). Thread-safe."""

    def __init__(self, rules: Mapping[str, Any] | Rules | None = None) -> None:
        self.fired: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._path: Path | None = None
        self._stamp: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._use(rules if isinstance(rules, Rules) else Rules.model_validate(rules or {}))

    @classmethod
    def from_file(cls, path: str | Path) -> FaultPlan:
        """The plan in this file, now and whenever it changes; no file: no faults."""
        plan = cls()
        plan._path = Path(path)
        return plan

    def decide(self, write: bool) -> Faults:
        """The faults of the next transfer in this direction."""
        with self._lock:
            self._reload()
            faults = Faults()
            for rule, tally in self._rules[write]:
                tally.seen += 1
                spent = rule.count and tally.fired >= rule.count
                if tally.seen <= rule.after or spent or self._random.random() >= rule.probability:
                    continue
                if (rule.fault in ("errno", "short", "torn") and (faults.error or faults.cut)) or (
                    rule.fault == "flip" and (write or faults.error)
                ):
                    continue
                tally.fired += 1
                self.fired[f"{'write' if write else 'read'}.{rule.label}"] += 1
                match rule.fault:
                    case "errno":
                        faults = faults._replace(error=rule.errno)
                    case "delay":
                        faults = faults._replace(delay=faults.delay + self._random.uniform(*rule.seconds))
                    case "flip":
                        faults = faults._replace(flip=True)
                    case cut:
                        faults = faults._replace(cut=cut)
            return faults

    def report(self) -> None:
        """Bring the file of counters up to date, if there is one."""
        with self._lock:
            if self._path is None or self.fired == self._reported:
                return
            self._reported = self.fired.copy()
            text = json.dumps(self.fired)
        target = Path(f"{self._path}.fired-{os.getpid()}.json")
        try:
            temporary = target.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(target)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", target, error)

    def flip(self, iov: np.ndarray) -> None:
        """Turn over one bit somewhere in these buffers."""
        with self._lock:
            at = self._random.randrange(int(iov[:, 1].sum()))
            bit = self._random.randrange(8)
        for address, length in iov.tolist():
            if at < length:
                ctypes.c_uint8.from_address(address + at).value ^= 1 << bit
                return
            at -= length

    def _use(self, rules: Rules) -> None:
        self._random = random.Random(rules.seed)
        self._rules = {
            False: [(rule, _Tally()) for rule in rules.read],
            True: [(rule, _Tally()) for rule in rules.write],
        }

    def _reload(self) -> None:
        if self._path is None:
            return
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._use(Rules.model_validate_json(self._path.read_bytes()))
            logger.warning("fault plan %s is in force", self._path)
        except FileNotFoundError:
            if self._stamp is not None:
                self._stamp = None
                self._use(Rules())
        except ValueError as error:  # a file that is half written; the last good plan stays
            logger.warning("fault plan %s cannot be read: %s", self._path, error)


def fired_counts(path: str | Path) -> Counter[str]:
    """What fired in every process that uses the plan file at `path`."""
    path = Path(path)
    total: Counter[str] = Counter()
    for report in path.parent.glob(f"{path.name}.fired-*.json"):
        total.update(json.loads(report.read_text()))
    return total


class FaultEngine(IoEngine):
    """`inner` with the faults of `plan`. Delayed and failing transfers pass through one thread of its own."""

    def __init__(self, inner: IoEngine, plan: FaultPlan) -> None:
        self.inner, self.plan = inner, plan
        self.name = f"{inner.name}+faults"  # type: ignore[misc] # a class constant everywhere else
        self.depth, self.passed_over = inner.depth, inner.passed_over
        self._later: list[tuple[float, int, Callable[[], None], Transfer]] = []
        self._order = count()
        self._changed = threading.Condition()
        self._closed = False
        self._running = 0
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="hicache-io-faults", daemon=True).start()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        if os.getpid() != self._pid:  # the thread stayed in the parent
            on_a_thread_of_its_own(transfers)
            return
        now: list[Transfer] = []
        for transfer in transfers:
            faults = self.plan.decide(transfer.write)
            if faults == Faults():
                now.append(transfer)
            elif faults.error:
                self._at(faults.delay, partial(end, transfer, -faults.error), transfer)
            else:
                changed = self._changed_by(transfer, faults)
                if faults.delay:
                    self._at(faults.delay, partial(self.inner.submit, [changed]), changed)
                else:
                    now.append(changed)
        self.plan.report()
        if now:
            self.inner.submit(now)

    def register_memory(self, address: int, length: int) -> None:
        self.inner.register_memory(address, length)

    def close(self, timeout: float) -> bool:
        """Ends what is delayed as -ECANCELED, then closes the engine inside."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            later, self._later = self._later, []
            self._changed.notify_all()
        for _, _, _, transfer in later:
            end(transfer, -errno.ECANCELED)
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._running, timeout)
        return self.inner.close(max(0.0, deadline - time.monotonic())) and idle

    def _at(self, delay: float, call: Callable[[], None], transfer: Transfer) -> None:
        with self._changed:
            if not self._closed:
                heapq.heappush(self._later, (time.monotonic() + delay, next(self._order), call, transfer))
                self._changed.notify_all()
                return
        on_a_thread_of_its_own([transfer])

    def _changed_by(self, transfer: Transfer, faults: Faults) -> Transfer:
        """The transfer with a shorter span or an ending that flips a bit."""
        iov, length = transfer.iov, transfer.length
        if faults.cut:
            iov = _prefix(iov, length // 2 // _BLOCK * _BLOCK)

        def done(result: int) -> None:
            if result > 0 and faults.flip:
                self.plan.flip(iov)
            transfer.done(length if faults.cut == "torn" and result >= 0 else result)

        return replace(transfer, iov=iov, done=done)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._later or self._later[0][0] > time.monotonic()):
                    self._changed.wait(self._later[0][0] - time.monotonic() if self._later else None)
                if self._closed:
                    return
                _, _, call, _ = heapq.heappop(self._later)
                self._running += 1
            call()
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


def _prefix(iov: np.ndarray, length: int) -> np.ndarray:
    """The first `length` bytes of these buffers."""
    ends = np.cumsum(iov[:, 1])
    starts = ends - iov[:, 1]
    kept = np.array(iov[starts < length], order="C")
    if len(kept):
        kept[-1, 1] = np.uint64(length) - starts[len(kept) - 1]
    return kept

"""What publishing KV events costs, beside SGLang's own publisher: the same events, the same reader, in turns.

Belongs here: subjects, the reader, measuring. Does not belong here: options and tables (hicache_ext.cli.bench_events).

A step is what an engine's scheduler does: it hands over the events that have come up since the last. Events are made
before the clock runs. The reader is a process of its own that counts events.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from hicache_ext.events.model import AnyEvent, BlockStored
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.events.queue import EventQueue

BLOCK_TOKENS = 64
_WAIT_SECONDS = 120.0
_PACE_SECONDS = 0.002


class Subject(Protocol):
    """One publisher. name: in the table."""

    name: str

    def open(self, endpoint: str, replay_endpoint: str) -> None: ...

    def events(self, count: int) -> list[Any]:
        """So many events of one block each."""

    def step(self, events: list[Any]) -> None:
        """What runs on the scheduler's thread."""

    def close(self) -> None: ...


def _fields(count: int) -> Iterator[dict[str, Any]]:
    for block in range(count):
        tokens = [(block * BLOCK_TOKENS + i) * 7919 % 128_000 for i in range(BLOCK_TOKENS)]
        yield {"block_hashes": [(block + 1) << 40], "parent_block_hash": block << 40, "token_ids": tokens,
               "block_size": BLOCK_TOKENS, "lora_id": None, "medium": "DISK"}  # fmt: skip


class Ours:
    """The publisher of this package, from a queue that is put to."""

    name = "hicache-ext"

    def open(self, endpoint: str, replay_endpoint: str) -> None:
        self._queue = EventQueue(lambda: (), events=1 << 40)
        self._publisher = Publisher(PublisherOptions(endpoint=endpoint, replay_endpoint=replay_endpoint), self._queue)

    def events(self, count: int) -> list[AnyEvent]:
        return [BlockStored(**fields) for fields in _fields(count)]

    def step(self, events: list[Any]) -> None:
        self._queue.put(events)
        self._publisher.wake()

    def close(self) -> None:
        self._publisher.close()


class Sglang:
    """SGLang's ZmqEventPublisher, as it makes it. Raises ImportError where SGLang is not installed."""

    name = "SGLang ZmqEventPublisher"

    def __init__(self) -> None:
        from sglang.srt.disaggregation import kv_events

        self._theirs = kv_events

    def open(self, endpoint: str, replay_endpoint: str) -> None:
        self._publisher = self._theirs.ZmqEventPublisher(0, endpoint, replay_endpoint)

    def events(self, count: int) -> list[Any]:
        return [self._theirs.BlockStored(**fields) for fields in _fields(count)]

    def step(self, events: list[Any]) -> None:
        self._publisher.publish(self._theirs.KVEventBatch(ts=time.time(), events=events))

    def close(self) -> None:
        self._publisher.shutdown()


@dataclass
class Round:
    """events_per_s: to the reader's last. cpu_s_per_million: of this process, all threads. step_us_per_event: of the
    thread that hands events over. delays_ms: from handing over to the reader, at an easy pace."""

    events_per_s: float
    cpu_s_per_million: float
    step_us_per_event: float
    delays_ms: list[float]


def run(steps: int, each: int, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of {subject, what, value, spread, unit}: the median of `rounds` rounds and their range."""
    subjects: list[Subject] = [Ours()]
    try:
        subjects.append(Sglang())
    except ImportError as error:
        say(f"without SGLang's publisher: {error}")
    found: dict[str, list[Round]] = {subject.name: [] for subject in subjects}
    for number in range(rounds):
        for subject in subjects if number % 2 == 0 else reversed(subjects):
            say(f"round {number + 1} of {rounds}: {subject.name}")
            found[subject.name].append(measure(subject, steps, each))
    rows = []
    for name, measured in found.items():
        for what, unit, values in (
            ("events a second", "1/s", [one.events_per_s for one in measured]),
            ("CPU per million events", "s", [one.cpu_s_per_million for one in measured]),
            ("handing over, per event", "us", [one.step_us_per_event for one in measured]),
            ("delay to the reader, p50", "ms", [_quantile(one.delays_ms, 0.5) for one in measured]),
            ("delay to the reader, p99", "ms", [_quantile(one.delays_ms, 0.99) for one in measured]),
        ):
            rows.append({"subject": name, "what": what, "value": statistics.median(values),
                         "spread": (min(values), max(values)), "unit": unit})  # fmt: skip
    return rows


def measure(subject: Subject, steps: int, each: int) -> Round:
    """One round: `steps` steps of `each` events as fast as they go, then some at an easy pace."""
    events = subject.events(steps * each)
    batches = [events[at : at + each] for at in range(0, len(events), each)]
    paced = batches[: min(200, steps)]
    with tempfile.TemporaryDirectory(prefix="hicache-events-") as folder:
        endpoint = f"ipc://{folder}/live"
        subject.open(endpoint, f"ipc://{folder}/replay")
        try:
            with _reader(endpoint, subject, events[:1]) as (ask, met):
                ask.send(len(events))
                cpu, own, since = time.process_time(), time.thread_time(), time.monotonic()
                for batch in batches:
                    subject.step(batch)
                handed = time.thread_time() - own
                last = _answer(ask)
                seconds, used = last - since, time.process_time() - cpu
                delays = []
                for batch in paced:
                    ask.send(len(batch))
                    time.sleep(_PACE_SECONDS)
                    at = time.monotonic()
                    subject.step(batch)
                    delays.append((_answer(ask) - at) * 1e3)
                assert met.is_set()
        finally:
            subject.close()
    count = len(events)
    return Round(count / seconds, used / count * 1e6, handed / count * 1e6, delays)


@contextmanager
def _reader(endpoint: str, subject: Subject, first: list[Any]) -> Iterator[tuple[Connection, Any]]:
    """A process that counts events: told a number, it says when it has met so many more (monotonic seconds)."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    met = spawn.Event()
    process = spawn.Process(target=_count, args=(endpoint, theirs, met), daemon=True)
    process.start()
    try:
        until = time.monotonic() + _WAIT_SECONDS
        while not met.wait(0.05):  # a subscription takes its time, and what is published before it is lost
            subject.step(first)
            if time.monotonic() > until or not process.is_alive():
                raise RuntimeError("the reader does not answer")
        ours.send(None)
        _answer(ours)
        yield ours, met
    finally:
        process.kill()
        process.join()


def _answer(pipe: Connection) -> float:
    if not pipe.poll(_WAIT_SECONDS):
        raise RuntimeError("events did not reach the reader")
    answer: float = pipe.recv()
    return answer


def _count(endpoint: str, pipe: Connection, met: Any) -> None:
    socket = zmq.Context().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    events = msgspec.msgpack.Decoder(tuple[float, list[msgspec.Raw], int | None])
    socket.recv_multipart()
    met.set()
    while True:
        wanted = pipe.recv()
        if wanted is None:  # forget what came while we met
            while socket.poll(300):
                socket.recv_multipart()
            pipe.send(time.monotonic())
            continue
        while wanted > 0:
            wanted -= len(events.decode(socket.recv_multipart()[2])[1])
        pipe.send(time.monotonic())


def _quantile(values: list[float], which: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(which * len(ordered)))]


def place() -> Path:
    """Where sockets lie: its file system goes into the facts."""
    return Path(tempfile.gettempdir())

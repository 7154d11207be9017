"""What a router makes of storage-tier events: a trace replayed through Dynamo's own selection over simulated workers.

Belongs here: simulated workers, their events, counting what they could reuse. Does not belong here: options and tables
(hicache_ext.cli.bench_router), the router itself, which runs already.

A worker has a device cache and, below it, a storage tier of its own that every page reaches; both forget what was used
the longest ago, ends of chains first. What a request reuses is what the worker that got it has, whether or not the
router knew: the events change where requests go, nothing else.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hicache_ext.bench.dynamo import Service
from hicache_ext.events.model import AnyEvent, BlockRemoved, BlockStored, Medium
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.events.queue import EventQueue

#: Tokens of a block of the Mooncake traces, and those that stand for them on the wire.
TRACE_BLOCK, BLOCK = 512, 16
#: Requests on their way at a time.
_OPEN = 8


class Request(NamedTuple):
    """blocks: of the trace, in order; equal numbers are equal prefixes."""

    blocks: tuple[int, ...]


def read(trace: Path, limit: int) -> list[Request]:
    """The first `limit` requests of a Mooncake trace. ValueError: which line is not one."""
    requests = []
    with trace.open() as lines:
        for number, line in enumerate(islice(lines, limit), 1):
            try:
                requests.append(Request(tuple(map(int, json.loads(line)["hash_ids"]))))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{trace}, line {number}: no trace: JSON lines with `hash_ids` are expected"
                ) from error
    return requests


class Worker:
    """device, storage: blocks that fit. told: media whose changes it publishes."""

    def __init__(self, device: int, storage: int, told: Sequence[Medium], folder: Path, number: int) -> None:
        self._held: dict[Medium, OrderedDict[int, int | None]] = {
            Medium.DEVICE: OrderedDict(),
            Medium.DISK: OrderedDict(),
        }
        self._room = {Medium.DEVICE: device, Medium.DISK: storage}
        self._told = told
        self._queue = EventQueue(self._snapshot, events=1 << 30)
        options = PublisherOptions(
            endpoint=f"ipc://{folder}/live{number}", replay_endpoint=f"ipc://{folder}/replay{number}"
        )
        self.publisher = Publisher(options, self._queue)

    def serve(self, blocks: Sequence[int]) -> int:
        """Blocks at the beginning that were there, on the device or, from where that ends, in storage."""
        found = 0
        for medium in (Medium.DEVICE, Medium.DISK):
            while found < len(blocks) and blocks[found] in self._held[medium]:
                found += 1
        events = [event for medium in self._held for event in self._keep(medium, blocks) if medium in self._told]
        self._queue.put(events)
        self.publisher.wake()
        return found

    def reach(self, blocks: Sequence[int]) -> tuple[int, int]:
        """How many of these a router that was told everything finds on the device, and with what lies below."""
        at, found = 0, []
        for medium in (Medium.DEVICE, Medium.DISK):
            while medium in self._told and at < len(blocks) and blocks[at] in self._held[medium]:
                at += 1
            found.append(at)
        return found[0], found[1]

    def _keep(self, medium: Medium, blocks: Sequence[int]) -> Iterator[AnyEvent]:
        held = self._held[medium]
        parents = dict(zip(blocks, (None, *blocks[:-1]), strict=True))
        for block in blocks:
            if block not in held:
                held[block] = parents[block]
                yield _stored(block, parents[block], medium)
        for block in reversed(blocks):  # beginnings are used last
            held.move_to_end(block)
        while len(held) > self._room[medium]:
            block, _ = held.popitem(last=False)
            yield BlockRemoved([block + 1], medium)

    def _snapshot(self) -> list[AnyEvent]:
        return [_stored(block, parent, medium) for medium in self._told for block, parent in self._held[medium].items()]


def _stored(block: int, parent: int | None, medium: Medium) -> BlockStored:
    return BlockStored([block + 1], None if parent is None else parent + 1, _tokens(block), BLOCK, None, medium)


def _tokens(block: int) -> list[int]:
    return [block >> 16, block & 0xFFFF, *range(BLOCK - 2)]


def run(
    router: Service,
    requests: Sequence[Request],
    workers: int,
    device: int,
    storage: int,
    how: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One row: the share of tokens that were reused. how: "round robin", "device events", "with tier events"."""
    told = {"round robin": (), "device events": (Medium.DEVICE,)}.get(how, (Medium.DEVICE, Medium.DISK))
    model = f"{how.replace(' ', '-')}-{workers}-{time.time_ns()}"
    base = time.time_ns() // 1000 % (1 << 40)
    taken, reused, total = [0] * workers, 0, 0
    with tempfile.TemporaryDirectory(prefix="hicache-router-") as folder:
        made = [Worker(device, storage, told, Path(folder), number) for number in range(workers)]
        try:
            if told:
                for number, worker in enumerate(made):
                    router.ask("POST", "/workers", {
                        "worker_id": base + number, "model_name": model, "endpoint": f"http://worker{number}",
                        "block_size": BLOCK, "kv_events_endpoints": {"0": worker.publisher.endpoint},
                        "replay_endpoint": worker.publisher.replay_endpoint,
                    })  # fmt: skip
                _wait(lambda: all(worker.publisher.stats()["subscribers"] for worker in made))
            open_: deque[str] = deque()
            for at, request in enumerate(requests):
                if at % 50 == 0:
                    say(f"{workers} workers, {how}: request {at} of {len(requests)}")
                chosen = at % workers
                if told:
                    name = f"{model}-{at}"
                    tokens = [token for block in request.blocks for token in _tokens(block)]
                    chosen = router.ask("POST", "/select_and_reserve", {
                        "selection_id": name, "model_name": model, "token_ids": tokens,
                    })["worker_id"] - base  # fmt: skip
                    open_.append(name)
                    if len(open_) > _OPEN:
                        router.ask("DELETE", f"/reservations/{open_.popleft()}")
                found = made[chosen].serve(request.blocks)
                taken[chosen] += 1
                reused += found
                total += len(request.blocks)
                if told:  # so that what counts is what the router was told, and not how fast this machine is
                    asked = {"model_name": model, "token_ids": tokens}
                    _wait(partial(_knows, router, asked, base + chosen, made[chosen].reach(request.blocks)))
            for number in range(workers) if told else ():
                router.ask("DELETE", f"/workers/{base + number}")
        finally:
            for worker in made:
                worker.publisher.close()
    return {"workers": workers, "how": how, "reused": reused / total, "tokens": total * TRACE_BLOCK,
            "busiest": max(taken) / len(requests)}  # fmt: skip


def _knows(router: Service, asked: dict[str, Any], worker: int, wanted: tuple[int, int]) -> bool:
    scores = router.ask("POST", "/overlap_scores", asked)["workers"]
    return wanted in [(one["device_blocks"], one["disk_blocks"]) for one in scores if one["worker_id"] == worker]


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError("the router does not follow the workers' events")
        time.sleep(0.001)

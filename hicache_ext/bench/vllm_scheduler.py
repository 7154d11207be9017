"""What the connector costs vLLM's scheduler thread: microseconds of a request, by its pages.

Belongs here: measuring. Does not belong here: options and tables (cli.bench_vllm_scheduler).

vLLM's own requests go through the scheduler's half of the connector as vLLM's scheduler sends them: arrival, lookup,
block table, the metadata of its steps, end. Once with nothing in the tier (every page is to be saved), once with all of
it there (every page is to be loaded). The tier is a local one with real pages. Chunks of a prompt are steps of their
own; here it is one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hicache_ext.config import Config
from hicache_ext.page import KEY_BYTES, Namespace, PageLayout, chain_parents
from hicache_ext.store import TieredStore
from storage_backends.base import PageBatch

PAGES = (1, 32, 256, 2048)
PAGE = 16
#: Requests of each length in each round.
REQUESTS, ROUNDS = 10, 5
#: The goal: microseconds of a request, and more for each of its pages.
BASE_US, PAGE_US = 100.0, 1.0
_PAYLOAD = 4096


def run(
    folder: Path, pages: Sequence[int] = PAGES, page: int = PAGE, requests: int = REQUESTS,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of pages, what ("saved", "loaded"), us (median of the rounds), spread, goal. folder: an empty one."""
    from hicache_ext.vllm.scheduler import SchedulerHalf
    from hicache_ext.vllm.settings import Options, Settings

    tier = {"type": "local", "path": str(folder / "tier"), "capacity": "2GiB"}
    config = Config.load({"tiers": [tier]})
    space = Namespace("model", "weights", PageLayout("mha", "bench", "bfloat16", page, (_PAYLOAD,)), tag="bench")
    store = TieredStore.open(config)
    rows = []
    try:
        half = SchedulerHalf(Settings(config, Options(), True, True), store, page)
        half.workers([[space]])
        for number in pages:
            say(f"{number} pages")
            made = [_request(f"{number}/{i}", number * page + 1, i * 7919 + number) for i in range(ROUNDS * requests)]
            rounds = [made[i::ROUNDS] for i in range(ROUNDS)]
            saved = [_seconds(partial(_saved, half, pages=number), part) for part in rounds]
            for request in made:
                _store(store, space, half, request, number)
            loaded = [_seconds(partial(_loaded, half, pages=number), part) for part in rounds]
            goal = BASE_US + PAGE_US * number
            rows += [_row(number, "saved", saved, goal), _row(number, "loaded", loaded, goal)]
    finally:
        store.close()
    return rows


def _request(name: str, tokens: int, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    ids = np.random.default_rng(seed).integers(0, 32000, tokens).tolist()
    return Request(name, ids, SamplingParams(max_tokens=1), None)


def _seconds(one: Callable[[Any], None], requests: Sequence[Any]) -> float:
    """CPU seconds of this thread for each of the requests. Reading its clock is a system call: once for all of them."""
    began = time.thread_time()
    for request in requests:
        one(request)
    return (time.thread_time() - began) / len(requests)


def _saved(half: Any, request: Any, pages: int) -> None:
    """A request of which the tier has nothing."""
    half.begin(request)
    found = half.matched(request, 0)
    half.allocated(request, [list(range(pages + 1))], 0)
    meta = half.step(_step(request, pages, 0, request.num_tokens))
    half.finished(request)
    assert found == 0
    assert sum(run.count for run in meta.saves) == pages


def _loaded(half: Any, request: Any, pages: int) -> None:
    """A request of which the tier has every page."""
    tokens = request.num_tokens - 1
    half.begin(request)
    found = half.matched(request, 0)
    half.allocated(request, [list(range(pages + 1))], tokens)
    half.tiers_of(request)
    first = half.step(
        SimpleNamespace(
            total_num_scheduled_tokens=0, scheduled_new_reqs=[], scheduled_cached_reqs=_NONE, num_scheduled_tokens={}
        )
    )  # fmt: skip
    half.loaded({request.request_id}, set())
    second = half.step(_step(request, pages, tokens, 1))
    half.finished(request)
    assert found == tokens
    assert sum(run.count for run in first.loads) == pages
    assert not second.saves


_NONE = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())


def _step(request: Any, pages: int, computed: int, scheduled: int) -> Any:
    new = SimpleNamespace(
        req_id=request.request_id, block_ids=(list(range(pages + 1)),), num_computed_tokens=computed
    )  # fmt: skip
    return SimpleNamespace(
        total_num_scheduled_tokens=scheduled, scheduled_new_reqs=[new], scheduled_cached_reqs=_NONE,
        num_scheduled_tokens={request.request_id: scheduled},
    )  # fmt: skip


def _store(store: TieredStore, space: Namespace, half: Any, request: Any, pages: int) -> None:
    """Put the request's pages into the tier."""
    from hicache_ext.vllm.chains import Adapters, RequestChain

    chain = RequestChain.of(request, half.page_size, Adapters())
    assert chain is not None
    keys = chain.keys(pages)
    memory = np.zeros(_PAYLOAD, np.uint8)
    for at in range(0, pages, 256):
        part = keys[at * KEY_BYTES : (at + 256) * KEY_BYTES]
        count = len(part) // KEY_BYTES
        batch = PageBatch(
            space, part, chain_parents(part, keys[(at - 1) * KEY_BYTES : at * KEY_BYTES] if at else None),
            np.full(count, memory.ctypes.data, np.uint64), np.full(count, _PAYLOAD, np.uint64),
            np.arange(count + 1, dtype=np.int64), memory,
        )  # fmt: skip
        store.write(batch).wait(60)


def _row(pages: int, what: str, seconds: list[float], goal: float) -> dict[str, Any]:
    us = [1e6 * one for one in seconds]
    return {
        "pages": pages, "what": what, "us": statistics.median(us), "spread": [min(us), max(us)], "goal_us": goal
    }  # fmt: skip

"""What Dynamo's own indexer answers is what the stores hold, tier by tier, whatever happens to them."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from msgspec.structs import replace

from hicache_ext.events.model import BlockRemoved, BlockStored, CostedBlockStored, LoadCost
from storage_backends.base import Outcome
from tests.pages import key_batch
from tests.redis_server import RedisServer
from tests.router.indexer import PORT, Indexer
from tests.router.worker import PAGE, SPACE, Prompt, Worker, prompt, wait


@pytest.fixture(scope="module")
def indexer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Indexer]:
    with Indexer(tmp_path_factory.mktemp("indexer"), threads=2) as one:
        yield one


@pytest.fixture
def disk(tmp_path: Path) -> dict[str, Any]:
    return {"type": "local", "path": str(tmp_path / "disk"), "capacity": "1MiB", "engine": "threads"}


@pytest.fixture(scope="module")
def external() -> Iterator[dict[str, Any]]:
    with RedisServer() as server:
        yield {"type": "redis", "url": f"redis://127.0.0.1:{server.port}/0"}


Run = Callable[..., Worker]
_numbers = iter(range(1, 1000))


@pytest.fixture
def run(indexer: Indexer, tmp_path: Path) -> Iterator[Run]:
    """Starts a worker that the indexer knows as `worker.number`."""
    started: list[Worker] = []

    def start(*tiers: dict[str, Any], folder: Path = tmp_path, **more: Any) -> Worker:
        folder.mkdir(exist_ok=True)
        worker = Worker(folder, list(tiers), **more)
        worker.number = next(_numbers)
        started.append(worker)
        indexer.register(worker.number, worker.publisher.endpoint, worker.publisher.replay_endpoint, PAGE)
        return worker

    yield start
    for worker in started:
        indexer.unregister(worker.number)
        worker.stop()


def agrees(indexer: Indexer, worker: Worker) -> bool:
    """Every block of every tier, with the block before it; and what a query for each prompt finds."""
    if indexer.held(worker.number) != worker.truth():
        return False
    return all(indexer.query(one.tokens, worker.number)[2] == worker.reach(one) for one in worker.prompts[-6:])


def prompts(seed: int, count: int = 40) -> list[Prompt]:
    """Prompts that share beginnings, as conversations do."""
    draw = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(count):
        start = draw.choice(made)[: draw.randrange(1, 8) * PAGE] if made and draw.random() < 0.6 else []
        made.append([*start, *(draw.randrange(32000) for _ in range(draw.randrange(4, 24) * PAGE))])
    return [prompt(tokens) for tokens in made]


@pytest.mark.parametrize("seed", range(3))
def test_random_workload(indexer: Indexer, run: Run, disk: dict[str, Any], external: dict[str, Any], seed: int) -> None:
    """Stores, evictions by want of room, removals, flushes, a tier that fails and comes back."""
    worker = run(disk, {**external, "prefix": f"seed{seed}"})
    draw, store = random.Random(seed), worker.store
    every = iter(prompts(seed))
    while not store.stats()[store.tiers[0].name].get("evicted"):
        worker.save(next(every))
    done: list[str] = []
    for _ in range(20):
        what = draw.choice(["store"] * 5 + ["remove", "flush", "fail", "recover"])
        done.append(what)
        tier = draw.choice(store.tiers)
        if what == "store":
            worker.save(next(every))
        elif what == "remove" and worker.prompts:
            one = draw.choice(worker.prompts)
            worker.forget(one, slice(draw.randrange(len(one.keys)), None))
        elif what == "flush":
            worker.publisher.resync()
        elif what == "fail":
            for _ in range(3):
                tier.account("read", bytes([Outcome.FAILED]))
        elif what == "recover":
            tier.account("read", bytes([Outcome.HIT]))
        assert wait(lambda: agrees(indexer, worker)), (done, indexer.held(worker.number), worker.truth())


def test_a_restart_is_followed(indexer: Indexer, run: Run, disk: dict[str, Any]) -> None:
    """Another publisher on the same addresses: nobody registers the worker again."""
    worker = run(disk)
    every = prompts(7)
    for one in every[:4]:
        worker.save(one)
    assert wait(lambda: agrees(indexer, worker))
    before = indexer.held(worker.number)
    worker.stop()
    worker.start()
    worker.forget(every[0], slice(2, None))
    assert wait(lambda: agrees(indexer, worker))
    assert set(before["disk"]) > set(indexer.held(worker.number)["disk"])
    worker.save(every[5])
    assert wait(lambda: agrees(indexer, worker))


def test_shared_storage_is_announced_by_each_worker(
    indexer: Indexer, run: Run, tmp_path: Path, disk: dict[str, Any], external: dict[str, Any]
) -> None:
    """By each worker that can load the page, and withdrawn by each, once it knows."""
    shared = {**external, "prefix": "shared"}
    first, second = run(disk, shared), run(shared, folder=tmp_path / "second")
    one = prompts(11)[0]
    first.save(one)
    assert wait(lambda: agrees(indexer, first))
    second.store.lookup(key_batch(SPACE, list(one.keys)))  # as for a prefetch
    assert wait(lambda: second.announcer.stats()["unknown"] == len(one.keys))
    second.save(one)
    assert wait(lambda: agrees(indexer, second))
    assert indexer.held(first.number)["external"] == indexer.held(second.number)["external"]
    other = prompts(12)[0]  # computed by both at a time: neither has looked for it
    first.save(other)
    second.save(other)
    assert wait(lambda: agrees(indexer, first) and agrees(indexer, second))
    assert set(other.hashes()) <= indexer.held(second.number)["external"].keys()
    first.forget(one, slice(2, None))
    assert wait(lambda: agrees(indexer, first))
    assert not agrees(indexer, second)  # nobody told it
    second.store.lookup(key_batch(SPACE, list(one.keys)))
    assert wait(lambda: agrees(indexer, second))


def _once(change: Callable[[Any], Any], kind: type) -> Callable[[list[Any]], list[Any]]:
    """Changes one event of this kind, and none after it."""
    left = [True]

    def meddle(events: list[Any]) -> list[Any]:
        out = []
        for event in events:
            if left and isinstance(event, kind):
                left.clear()
                event = change(event)
            if event is not None:
                out.append(event)
        return out

    return meddle


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (BlockStored, lambda event: replace(event, medium="EXTERNAL")),
        (BlockStored, lambda event: replace(event, medium="disk")),
        (BlockStored, lambda event: replace(event, block_hashes=[event.block_hashes[0] ^ 1, *event.block_hashes[1:]])),
        (BlockStored, lambda event: replace(event, parent_block_hash=12345)),
        (BlockStored, lambda event: replace(event, block_size=event.block_size * 2)),
        (BlockStored, lambda event: replace(event, token_ids=[9, *event.token_ids[1:]])),
        (BlockStored, lambda event: None),
        (BlockRemoved, lambda event: None),
        (BlockRemoved, lambda event: replace(event, medium=None)),
    ],
    ids=["medium", "unknown medium", "hash", "parent", "block size", "tokens", "lost store", "lost removal",
         "removal without medium"],
)  # fmt: skip
def test_one_wrong_event_is_seen(indexer: Indexer, run: Run, disk: dict[str, Any], kind: type, change: Any) -> None:
    """What these tests compare would not be there by chance."""
    one = prompts(3)[2]
    worker = run(disk, meddle=_once(change, kind))
    worker.save(one)
    if kind is BlockRemoved:
        assert wait(lambda: agrees(indexer, worker))  # else both cancel out unsaid
        worker.forget(one, slice(2, None))
    assert not wait(lambda: agrees(indexer, worker), 1.0)
    worker.publisher.resync()
    assert wait(lambda: agrees(indexer, worker)), "a resync makes it good"


def test_a_cost_is_passed_over(indexer: Indexer, run: Run, disk: dict[str, Any]) -> None:
    def costed(events: list[Any]) -> list[Any]:
        return [
            CostedBlockStored(**structs.asdict(event), load_cost=LoadCost(1.8e9, 4e-4))
            if isinstance(event, BlockStored)
            else event
            for event in events
        ]

    worker = run(disk, meddle=costed)
    worker.save(prompts(13)[0])
    assert wait(lambda: agrees(indexer, worker))


def test_delay(indexer: Indexer, run: Run, disk: dict[str, Any], record_property: Any) -> None:
    """From a durable page to the indexer's answer. No limit is set here: the bench says how long."""
    worker = run(disk)
    delays = []
    for one in prompts(5, 20):
        worker.save(one)
        since = time.monotonic()
        assert wait(lambda one=one: indexer.query(one.tokens, worker.number)[2] == len(one.tokens))
        delays.append(time.monotonic() - since)
    record_property("p50_ms", statistics.median(delays) * 1e3)


def test_the_example_sends_a_prompt_to_who_has_it(
    tmp_path: Path, disk: dict[str, Any], external: dict[str, Any]
) -> None:
    """As a user runs it; the workers' answers apart."""
    (tmp_path / "other").mkdir()
    with Indexer(tmp_path) as indexer:
        has, other = Worker(tmp_path, [disk]), Worker(tmp_path / "other", [{**external, "prefix": "other"}])
        one = prompts(17)[0]
        has.save(one)
        script = Path(__file__).parents[2] / "examples" / "router" / "route.py"
        words = [str(script), "--indexer", f"http://127.0.0.1:{PORT}", "--block-size", str(PAGE), "--dry-run"]
        for name, worker in (("other", other), ("has", has)):
            words += ["--worker", f"http://{name},{worker.publisher.endpoint},{worker.publisher.replay_endpoint}"]
        for _ in range(2):  # begun again, as after a restart of a worker
            process = indexer.host.python(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

            def chosen(process: subprocess.Popen[str] = process) -> dict[str, Any]:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(list(one.tokens)) + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            assert wait(lambda chosen=chosen: chosen()["worker"] == "http://has")
            assert chosen()["found"]["disk"] == len(one.tokens)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(20) == 0
        for worker in (has, other):
            worker.stop()
        indexer.host.kill()
        alone = indexer.host.python(*words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert alone.stderr is not None
        assert alone.wait(20) == 1
        assert "Connection refused" in (said := alone.stderr.read()), said
        assert "Traceback" not in said

"""Two real SGLang servers over one store, Dynamo's own indexer and selection, and prompts that go by what these answer.

One start of each server, side by side, and one restart; the tests run in order. Servers, Redis, indexer and selection
live on a host of their own, since Dynamo's services listen on every address that they find. What the indexer says of
the storage tiers is compared with what the directory and Redis themselves hold.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from msgspec.structs import replace

from hicache_ext.bench.dynamo import Service
from hicache_ext.cli import tiny_model
from hicache_ext.cli.demo import Backend, Settings, _environment, launch_line
from hicache_ext.cli.serving import Server, free_port
from hicache_ext.events.check import Checker, Violation
from hicache_ext.events.model import AllBlocksCleared, AnyEvent, BlockRemoved, BlockStored, CostedBlockStored, Medium
from hicache_ext.events.publisher import Publisher, PublisherOptions
from hicache_ext.events.subscriber import Subscriber
from hicache_ext.events.view import View
from storage_backends.format import SlotHeader
from storage_backends.object import STEP
from tests.e2e.router import namespaces, on_disk
from tests.e2e.test_server import ADMIN, PAGE, VOCABULARY, Client
from tests.netns import Host
from tests.redis_server import RedisServer
from tests.router.indexer import PORT, Indexer
from tests.router.worker import Prompt, prompt, wait

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs the SGLang CPU environment (make venv)"),
]

ROUTE = Path(__file__).parents[2] / "examples" / "router" / "route.py"
#: About 700 pages of 64 KiB: less than what is stored in the end.
CAPACITY = "48MiB"
TAIL = 5  # tokens after the last whole page: all whole pages can then be reused
SELECTION = 8092
Held = dict[str, dict[int, int | None]]
"""By tier, each block's hash and that of the block before."""


def talk(name: object, pages: int, start: Prompt | None = None) -> Prompt:
    """A prompt of whole pages, the first ones those of `start`."""
    draw = random.Random(str(name))
    begun = [] if start is None else list(start.tokens)
    return prompt([*begun, *(draw.randrange(300, VOCABULARY) for _ in range(pages * PAGE))])


def adapter(folder: Path) -> Path:
    """A small LoRA adapter for the tiny model."""
    from safetensors.numpy import save_file

    folder.mkdir()
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    draw = np.random.default_rng(3)
    weights = {}
    for layer in range(4):
        for name, out in (("q_proj", 256), ("v_proj", 128)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = (draw.standard_normal((4, 256)) * 0.1).astype(np.float32)
            weights[f"{at}.lora_B.weight"] = (draw.standard_normal((out, 4)) * 0.1).astype(np.float32)
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return folder


def has_lora() -> bool:
    """Whether the stand-ins for CUDA that are installed here let a server have LoRA (`make venv` brings them)."""
    return hasattr(importlib.import_module("hicache_ext_sglang_cpu.plugin"), "_lora_without_pinning")


class Worker:
    """One server, which the indexer knows by its number, and its faults."""

    def __init__(self, root: Path, number: int, tier: Path, model: Path, lora: Path | None) -> None:
        self.number, self.root = number, root
        self.faults = root / f"faults{number}.json"
        self.faults.write_text("{}")
        config = root / f"{number}.yaml"
        self.tiers = [{"type": "local", "path": str(tier), "capacity": CAPACITY}]
        config.write_text(yaml.safe_dump({"prefetch_threshold": PAGE, "tiers": self.tiers, "event_costs": True}))
        self.live, self.replay = f"ipc://{root}/live{number}", f"ipc://{root}/replay{number}"
        events = {"publisher": "zmq", "endpoint": self.live, "replay_endpoint": self.replay}
        flags = ["--admin-api-key", ADMIN, "--kv-events-config", json.dumps(events)]
        if lora is not None:
            flags += ["--enable-lora", "--lora-paths", f"mine={lora}", "--lora-backend", "torch_native"]
            flags += ["--max-lora-rank", "4", "--lora-target-modules", "q_proj", "v_proj"]
        settings = Settings(root, Backend.HICACHE_EXT, [], tuple(flags))
        port = free_port()
        env = {**_environment(settings), "HICACHE_EXT_FAULTS": str(self.faults), "GLOO_SOCKET_IFNAME": "lo"}
        self.server = Server(launch_line(settings, model, config, port), root / f"server{number}.log", port, env)
        self.client = Client(self.server)

    def set_faults(self, **rules: Any) -> None:
        self.faults.write_text(json.dumps(rules))
        os.utime(self.faults, ns=(time.time_ns(), time.time_ns()))

    def kill(self) -> None:
        assert self.server.process is not None
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.stop()

    def attach(self, tiers: list[dict[str, Any]]) -> None:
        """These tiers, in place of those that are attached."""
        self.client.settle()
        self.client.flush()
        answer = self.client.admin("DELETE", "/hicache/storage-backend")
        assert answer.status_code == 200, answer.text
        config = json.dumps({"prefetch_threshold": PAGE, "tiers": tiers})
        answer = self.client.admin(
            "PUT", "/hicache/storage-backend", hicache_storage_backend="hicache_ext",
            hicache_storage_backend_extra_config_json=config, hicache_storage_prefetch_policy="wait_complete",
        )  # fmt: skip
        assert answer.status_code == 200, answer.text


class Stage:
    """Both workers, Redis, the indexer, and the example that sends prompts to workers."""

    def __init__(self, root: Path, host: Host, stack: ExitStack) -> None:
        self.root, self.host = root, host
        self.tier = root / "tier"
        self.lora = adapter(root / "adapter") if has_lora() else None
        self.redis = stack.enter_context(RedisServer())
        self.indexer = stack.enter_context(Indexer(root, threads=2, host=host))
        model = tiny_model.make(root / "model", VOCABULARY)
        self.workers = [Worker(root, number, self.tier, model, self.lora) for number in (1, 2)]
        for worker in self.workers:
            stack.enter_context(worker.server)
        for worker in self.workers:
            worker.server.wait_until_up(600)
        words = [str(ROUTE), "--indexer", f"http://127.0.0.1:{PORT}", "--block-size", str(PAGE), "--new-tokens", "4"]
        for worker in self.workers:
            words += ["--worker", f"{worker.client.base},{worker.live},{worker.replay}"]
        self._route = host.python(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.prompts: list[Prompt] = []
        self.external = False

    def route(self, one: Prompt) -> dict[str, Any]:
        """Give this prompt to the example; what it says of it."""
        if one not in self.prompts:
            self.prompts.append(one)
        assert self._route.stdin is not None
        assert self._route.stdout is not None
        self._route.stdin.write(json.dumps([*one.tokens, *range(300, 300 + TAIL)]) + "\n")
        self._route.stdin.flush()
        said = self._route.stdout.readline()
        assert said, "route.py has ended"
        found: dict[str, Any] = json.loads(said)
        return found

    def worker_of(self, said: dict[str, Any]) -> Worker:
        return next(worker for worker in self.workers if worker.client.base == said["worker"])

    def objects(self) -> dict[bytes, SlotHeader]:
        """The headers of what Redis holds, by its names for them."""
        client = self.redis.client()
        names = list(client.scan_iter(match="shared:*", count=1000))
        values = zip(names, client.mget(names) if names else (), strict=True)
        return {name: SlotHeader.decode(value, STEP) for name, value in values if value is not None}

    def truth(self) -> Held:
        """What the directory holds, or Redis, whichever is attached."""
        if self.external:
            return {"external": {one.event_hash: one.parent_event_hash or None for one in self.objects().values()}}
        spaces = namespaces(self.tier)
        assert len(spaces) == 1
        there = on_disk(self.tier, next(iter(spaces)))
        return {"disk": {block: parent for block, (parent, _, _) in there.items()}}

    def reach(self, one: Prompt, held: Held) -> tuple[int, int, int]:
        """Tokens of the prompt that a query finds down to device, host, and what lies below."""
        at, found = 0, []
        for tiers in (("device",), ("host_pinned",), ("disk",), ("external",)):
            while at < len(one.keys) and any(one.hashes()[at] in held.get(tier, ()) for tier in tiers):
                at += 1
            found.append(at * PAGE)
        return found[0], found[1], found[3]

    def agrees(self, number: int, truth: Held | None = None) -> bool:
        """Every block of every storage tier, with the block before it; and a query of the latest prompts."""
        truth = {tier: blocks for tier, blocks in (self.truth() if truth is None else truth).items() if blocks}
        held = self.indexer.held(number)
        if {tier: blocks for tier, blocks in held.items() if tier in ("disk", "external")} != truth:
            return False
        return all(self.indexer.query(one.tokens, number) == self.reach(one, held) for one in self.prompts[-6:])

    def both_agree(self, *stored: Prompt, seconds: float = 60) -> None:
        """Wait until these prompts are stored and the indexer says of both workers what the store says."""

        def settled() -> bool:
            there = {block for blocks in self.truth().values() for block in blocks}
            if not all(there.issuperset(one.hashes()) for one in stored):
                return False
            return all(self.agrees(worker.number) for worker in self.workers)

        assert wait(settled, seconds), [
            (tier, len(blocks), {n: len(self.indexer.held(n).get(tier, {})) for n in (1, 2)})
            for tier, blocks in self.truth().items()
        ]

    def forget_memory(self, *workers: Worker) -> None:
        """Nothing is left on the devices and hosts of these workers, in the indexer's view either."""
        for worker in workers or self.workers:
            worker.client.settle()
            worker.client.flush()
            assert wait(lambda worker=worker: not self.indexer.held(worker.number).keys() & {"device", "host_pinned"})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    pytest.importorskip("dynamo.indexer", reason="needs ai-dynamo-runtime")
    with Host() as host, host.inside(), ExitStack() as stack:
        yield Stage(tmp_path_factory.mktemp("routing"), host, stack)


def reused(said: dict[str, Any]) -> tuple[int, int, int]:
    """What the server says that it took from device, device and host, and all tiers: as the indexer counts."""
    details = said["answer"]["meta_info"]["cached_tokens_details"] or {}
    device, host, storage = ((details.get(tier) or 0) for tier in ("device", "host", "storage"))
    return device, device + host, device + host + storage


def found(said: dict[str, Any]) -> tuple[int, int, int]:
    gpu = said["found"].get("gpu", 0)
    cpu = max(gpu, said["found"].get("cpu", 0))
    return gpu, cpu, max(cpu, said["found"].get("disk", 0))


def test_prompts_go_to_who_has_them_and_find_what_was_promised(stage: Stage) -> None:
    firsts = {name: talk(name, 12) for name in ("a", "b", "c", "d")}
    went = {}
    for name, one in firsts.items():
        said = stage.route(one)
        assert found(said) == reused(said) == (0, 0, 0)
        went[name] = stage.worker_of(said)
        stage.both_agree(one)
    assert {worker.number for worker in went.values()} == {1, 2}, "equals are taken in turns"
    for name, one in firsts.items():
        said = stage.route(talk(f"{name} goes on", 6, one))
        assert stage.worker_of(said) is went[name], "its device has it, the other has only storage"
        assert found(said) == reused(said)
        assert found(said)[0] == len(one.tokens)
        stage.both_agree(talk(f"{name} goes on", 6, one))


def test_after_a_flush_storage_serves_either_worker(stage: Stage) -> None:
    stage.forget_memory()
    stage.both_agree()
    every = list(stage.prompts)
    assert all(stage.indexer.query(one.tokens, n) == (0, 0, len(one.tokens)) for one in every for n in (1, 2))
    went = set()
    for one in every[:4]:
        said = stage.route(one)
        went.add(stage.worker_of(said).number)
        assert found(said) == reused(said) == (0, 0, len(one.tokens)), "what one wrote the other loads"
        stage.both_agree()
    assert went == {1, 2}


def test_dynamos_own_selection(stage: Stage) -> None:
    """A second reader of both streams, which chooses by itself."""
    stage.host.python(
        "-m", "dynamo.select_service", "--port", str(SELECTION), "--threads", "1", stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env={**os.environ, "DYN_LOG": "error"},
    )  # fmt: skip
    selection = Service(f"http://127.0.0.1:{SELECTION}")

    def up() -> bool:
        try:
            selection.ask("GET", "/health")
            return True
        except OSError:
            return False

    assert wait(up, 60)
    for worker in stage.workers:
        selection.ask("POST", "/workers", {
            "worker_id": worker.number, "model_name": "m", "endpoint": worker.client.base, "block_size": PAGE,
            "kv_events_endpoints": {"0": worker.live}, "replay_endpoint": worker.replay,
        })  # fmt: skip
    ones = {worker.number: talk(f"of {worker.number}", 16) for worker in stage.workers}
    for worker in stage.workers:
        worker.client.ask([*ones[worker.number].tokens, *range(300, 300 + TAIL)])
    stage.both_agree(*ones.values())

    def chosen(one: Prompt) -> int:
        body = {"selection_id": str(time.time_ns()), "model_name": "m", "token_ids": list(one.tokens)}
        answer = selection.ask("POST", "/select_and_reserve", body)
        selection.ask("DELETE", f"/reservations/{body['selection_id']}")
        return int(answer["worker_id"])

    for number, one in ones.items():
        assert wait(lambda one=one, number=number: {chosen(one) for _ in range(5)} == {number})


def test_an_adapters_pages(stage: Stage) -> None:
    if stage.lora is None:
        pytest.skip("the stand-ins for CUDA here are older: make venv")
    one = talk("with an adapter", 20)
    ids = [*one.tokens, *range(300, 300 + TAIL)]
    plain = talk("without", 20)
    first = stage.workers[0].client
    outputs, cached = first.ask(ids, lora_path="mine")
    assert not any(cached.values())
    stage.both_agree(one)
    assert one.hashes()[-1] in stage.indexer.held(1)["device"]
    assert first.ask([*plain.tokens, *range(300, 300 + TAIL)])[1]["storage"] == 0
    stage.forget_memory(stage.workers[0])
    stage.both_agree(one, plain)
    again, cached = first.ask(ids, lora_path="mine")
    assert (again, cached["storage"]) == (outputs, len(one.tokens))
    again, cached = stage.workers[1].client.ask(ids, lora_path="mine")
    assert (again, cached["storage"]) == (outputs, len(one.tokens)), "what one wrote the other loads"
    other, cached = first.ask(ids)
    assert not any(cached.values()), "a page of the adapter was served without it"
    assert other != outputs


def test_a_tier_that_fails_is_withdrawn_by_its_worker_alone(stage: Stage) -> None:
    broken = stage.workers[1]
    stage.forget_memory()
    stage.both_agree()
    broken.set_faults(read=[{"fault": "errno", "errno": "EIO"}])
    asked = iter(stage.prompts)

    def withdrawn() -> bool:
        broken.client.ask([*next(asked).tokens, *range(300, 300 + TAIL)])
        return "disk" not in stage.indexer.held(broken.number)

    assert wait(withdrawn, 60)
    assert wait(lambda: stage.agrees(1)), "the other can still load all of it"
    broken.set_faults()
    fresh = iter(range(1000))

    def back() -> bool:
        """Something must be asked of a tier for it to be found well again."""
        broken.client.flush()
        broken.client.ask([*stage.prompts[next(fresh) % 4].tokens, *range(300, 300 + TAIL)])
        return stage.agrees(broken.number)

    assert wait(back, 90)
    stage.both_agree()


def test_a_restarted_worker_says_what_the_directory_holds(stage: Stage) -> None:
    worker = stage.workers[1]
    worker.client.settle()
    worker.kill()
    stale = stage.indexer.held(worker.number)
    assert stale["disk"]
    stage.indexer.unregister(worker.number)
    with stage.host.inside():
        worker.server.__enter__()
    worker.server.wait_until_up(600)
    stage.indexer.register(worker.number, worker.live, worker.replay, PAGE)
    # The indexer asks for what it missed when it sees a gap, so a worker that says nothing it knows nothing of.
    nudge = talk("nudge", 1)
    worker.client.ask([*nudge.tokens, *range(300, 300 + TAIL)])
    stage.both_agree(nudge)
    device = stage.indexer.held(worker.number)["device"].keys()
    assert device >= set(nudge.hashes())
    assert len(device) <= len(nudge.hashes()) + 1, "nothing of before the restart; the answer may fill a page"
    one = stage.prompts[0]
    _, cached = worker.client.ask([*one.tokens, *range(300, 300 + TAIL)])
    assert cached["storage"] == stage.indexer.query(one.tokens, 1)[2] == len(one.tokens)


def test_random_course_with_evictions(stage: Stage) -> None:
    draw = random.Random(5)
    before = set(stage.truth()["disk"])
    for turn in range(24):
        start = draw.choice(stage.prompts) if stage.prompts and draw.random() < 0.4 else None
        long = len(start.keys) if start is not None else 0
        said = stage.route(talk(f"turn {turn}", draw.randrange(20, 60) - min(long, 10), start if long < 80 else None))
        assert reused(said)[2] >= 0
        if turn % 6 == 5:
            stage.forget_memory(draw.choice(stage.workers))
        if turn % 4 == 3:
            stage.both_agree()
    stage.both_agree()
    assert before - set(stage.truth()["disk"]), "nothing was evicted"


def _recorded(worker: Worker) -> tuple[list[AnyEvent], list[Violation]]:
    """All that the worker has published so far, asked of its replay socket; and which of the ten rules it broke."""
    events, broken, checker = list[AnyEvent](), list[Violation](), Checker()
    with Subscriber(worker.live, worker.replay) as source:
        until, quiet = time.monotonic() + 60, 0
        nudge = talk(f"nudge {time.time_ns()}", 1)  # what comes late learns that it missed something from a message
        worker.client.ask([*nudge.tokens, *range(300, 300 + TAIL)])
        while quiet < 3 and time.monotonic() < until:
            got = source.receive(1.0)
            quiet = 0 if got is not None else quiet + 1
            if got is not None:
                batch = got.decoded.batch.events
                # SGLang's own may be said twice: an adapter's blocks have the plain ones' names.
                broken += [
                    one for one in checker.feed(got)
                    if one.event is None or getattr(batch[one.event], "medium", None) in ("DISK", "EXTERNAL")
                ]  # fmt: skip
                events += batch
        assert source.answered
    return events, broken


class _Told:
    """A publisher's source: these events, in order."""

    def __init__(self, events: list[AnyEvent]) -> None:
        self._all, self._left = events, list(reversed(events))

    def clear(self) -> None:
        self._left = list(reversed(self._all))

    def take(self, limit: int) -> list[AnyEvent]:
        return [self._left.pop() for _ in range(min(100, len(self._left)))]


def _says_of_disk(stage: Stage, number: int) -> bool:
    return bool(stage.indexer.held(number).get("disk"))


MUTATIONS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "medium": (BlockStored, lambda event: replace(event, medium="EXTERNAL")),
    "hash": (BlockStored, lambda event: replace(event, block_hashes=[event.block_hashes[0] ^ 1, *event.block_hashes[1:]])),  # noqa: E501
    "parent": (BlockStored, lambda event: replace(event, parent_block_hash=12345)),
    "block size": (BlockStored, lambda event: replace(event, block_size=2 * PAGE)),
    "tokens": (BlockStored, lambda event: replace(event, token_ids=[9, *event.token_ids[1:]])),
    "lost store": (BlockStored, lambda event: None),
    "lost removal": (BlockRemoved, lambda event: None),
}  # fmt: skip


def test_one_wrong_event_of_a_real_stream_is_seen(stage: Stage) -> None:
    """What these tests compare would not be there by chance: the same stream again, with one event changed."""
    worker = stage.workers[0]
    stage.forget_memory()
    stage.both_agree()
    before, turns = set(stage.truth()["disk"]), iter(range(100))
    while before <= stage.truth()["disk"].keys():  # until something is evicted
        worker.client.ask([*talk(f"pushes {next(turns)}", 50).tokens, *range(300, 300 + TAIL)])
        worker.client.settle()
    events, broken = _recorded(worker)
    assert not broken, broken[:5]
    assert any(isinstance(event, CostedBlockStored) for event in events), "with what loading costs, on the way as well"
    stage.both_agree()
    held, view, last = stage.truth()["disk"], View(), dict[int, int]()
    repeats = set[int]()  # stores of blocks that a store before them has told already, which stays if they are changed
    for at, event in enumerate(events):
        disk = view.media[Medium.DISK].keys()
        if isinstance(event, BlockStored) and event.medium == "DISK" and not disk.isdisjoint(event.block_hashes):
            repeats.add(at)
        view.apply(event)
        if isinstance(event, AllBlocksCleared):
            last.clear()
        elif event.medium == "DISK":
            last.update(dict.fromkeys(event.block_hashes, at))
    of = {block: one for one in stage.prompts for block in one.hashes()}

    def decides(at: int, kind: type) -> bool:
        """Whether nothing after it says anything of its blocks, and a query would go by it: so a change of it stays."""
        event = events[at]
        if not isinstance(event, kind) or at in repeats:
            return False
        if any(last.get(block) != at for block in event.block_hashes):
            return False
        first = event.block_hashes[0]
        if kind is BlockRemoved:
            return first not in held
        above = any(first in view.media[medium] for medium in (Medium.DEVICE, Medium.HOST))
        if first not in of or above:
            return False
        chain = of[first].hashes()  # whose beginning the other worker's writer may have evicted: a query ends there
        return all(block in held for block in chain[: chain.index(first) + 1])

    for number, name in enumerate(["none", *MUTATIONS], 100):
        told = list(events)
        if name != "none":
            kind, change = MUTATIONS[name]
            at = max(at for at in range(len(events)) if decides(at, kind))
            if kind is BlockStored:
                stage.prompts.append(of[events[at].block_hashes[0]])  # the latest are asked for
            told[at : at + 1] = [changed] if (changed := change(events[at])) is not None else []
        options = PublisherOptions(
            endpoint=f"ipc://{stage.root}/told{number}", replay_endpoint=f"ipc://{stage.root}/again{number}"
        )
        publisher = Publisher(options, _Told(told))
        stage.indexer.register(number, publisher.endpoint, publisher.replay_endpoint, PAGE)
        seen = partial(stage.agrees, number, stage.truth())
        if name == "none":
            assert wait(seen), "the stream as it was"
        else:
            assert wait(partial(_says_of_disk, stage, number)), name
            assert not wait(seen, 1.5), name
        publisher.close()
        stage.indexer.unregister(number)


def test_one_redis_for_both(stage: Stage) -> None:
    redis = {"type": "redis", "url": f"redis://127.0.0.1:{stage.redis.port}", "prefix": "shared", "timeout": 2}
    for worker in stage.workers:
        worker.attach([redis])
    stage.external, stage.prompts = True, []
    stage.both_agree()
    assert "disk" not in stage.indexer.held(1), "a tier that is detached holds nothing"
    ones = [talk(f"remote {n}", 10) for n in range(3)]
    for one in ones:
        said = stage.route(one)
        number = stage.worker_of(said).number
        assert wait(lambda one=one: set(stage.truth()["external"]) >= set(one.hashes()))
        assert wait(
            lambda one=one, number=number: stage.indexer.held(number).get("external", {}).keys() >= set(one.hashes())
        )
    stage.forget_memory()
    for worker in stage.workers:  # who has loaded a page says that it can
        for one in ones:
            _, cached = worker.client.ask([*one.tokens, *range(300, 300 + TAIL)])
            assert cached["storage"] == len(one.tokens)
    stage.both_agree(*ones)
    gone = set(ones[0].hashes()[4:6])
    evicted = [name for name, header in stage.objects().items() if header.event_hash in gone]
    assert stage.redis.client().delete(*evicted) == len(gone)
    stage.redis.client().config_set("maxmemory", 1)  # nothing is written, so that what is gone stays so
    stage.forget_memory()
    ids = [*ones[0].tokens[: 6 * PAGE], *range(300, 300 + TAIL)]
    for worker in stage.workers:  # a server tells nobody what it evicts: who asks for it learns
        assert worker.client.ask(ids)[1]["storage"] == 4 * PAGE
        assert wait(partial(stage.agrees, worker.number), 60)
    stage.redis.client().config_set("maxmemory", 0)

    def healed() -> bool:
        stage.workers[0].client.flush()
        stage.workers[0].client.ask(ids)
        return gone <= stage.truth()["external"].keys() and stage.agrees(1)

    assert wait(healed, 90)

"""Scenarios of the connector under real vLLM. Each returns what the test asserts on; assertions here are of the rig.

Run by rig.py, in forked children.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rig import PAGE, Engine, local, make_hybrid, prompt

LONG, SHORT = prompt(400), prompt(37, seed=8)
WHOLE = LONG[: len(LONG) // PAGE * PAGE]
MANY = [prompt(150, seed=20 + i) for i in range(4)]
KILLED = [prompt(400, seed=40 + i) for i in range(20)]


def plain(root: Path) -> Any:
    """No connector: what every other scenario must agree with."""
    engine = Engine(root)
    return {
        "outputs": engine.run(LONG, SHORT), "many": engine.run(*MANY, tokens=100), "killed": engine.run(KILLED[0])
    }  # fmt: skip


def cold(root: Path) -> Any:
    engine = Engine(root, local(root))
    outputs = engine.run(LONG, SHORT)
    engine.settle()
    result = {"outputs": outputs, "stored": engine.store.stats()["local"]["pages"], "leaked": engine.leaked()}
    engine.close()
    return result


def warm(root: Path) -> Any:
    """A fresh process; then the same one again and again, with and without the connector's own reset."""
    engine = Engine(root, local(root))
    result: dict[str, Any] = {"first": engine.run(LONG, SHORT)}
    engine.forget_device()
    result["again"] = engine.run(LONG, SHORT)
    result["counts"] = engine.worker.counts()
    engine.forget_device(connector=True)
    result["after_reset"] = engine.run(LONG, SHORT)
    engine.settle()
    engine.forget_device()
    result["stored_anew"] = engine.run(LONG, SHORT)
    result["leaked"] = engine.leaked()
    engine.close()
    return result


def decoded(root: Path) -> Any:
    """Pages that decode steps complete wait for one another: requests that end at their limit, at a stop token and by
    an abort, and the step without a forward that an engine makes after its last request."""
    from vllm import SamplingParams

    engine = Engine(root, local(root, "decoded"))
    llm, steps = engine.llm.llm_engine, []
    real = engine.worker._moves.save

    def save(pages: Any, *more: Any) -> Any:
        steps.append(sum(one.count for one in pages))
        return real(pages, *more)

    engine.worker._moves.save = save
    whole = engine.run(*MANY, tokens=100)
    idle = _idle_step(engine)
    engine.settle()
    result: dict[str, Any] = {"outputs": whole, "steps": list(steps), "left": engine.scheduler_half._saves.waiting}
    first, again = whole[0]["tokens"], prompt(150, seed=60)
    stop = next(token for at, token in enumerate(first) if at > 75 and first.index(token) == at)
    for name, ids, more in (("stops", MANY[0], {"stop_token_ids": [stop]}), ("aborted", again, {})):
        sampling = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, **more)
        llm.add_request(name, {"prompt_token_ids": ids, "cache_salt": "again"}, sampling)
    told: dict[str, list[int]] = {}
    for step in range(450):
        for output in llm.step():
            told[next(name for name in ("stops", "aborted") if output.request_id.startswith(name))] = list(
                output.outputs[0].token_ids
            )
        if step == 60:
            llm.abort_request(["aborted"], internal=False)
        if not llm.has_unfinished_requests():
            break
    idle += _idle_step(engine)
    engine.settle()
    result |= {"told": told, "again": again, "idle": idle, "left_again": engine.scheduler_half._saves.waiting}
    result |= {"counts": engine.scheduler_half.take_counts(), "leaked": engine.leaked()}
    engine.close()
    return result


def _idle_step(engine: Engine) -> int:
    """What the engine's own process does once more when its last request is over. How many pages it saved."""
    half, found = engine.scheduler_half, 0
    real = half.step

    def step(output: Any) -> Any:
        nonlocal found
        meta = real(output)
        assert meta.idle
        found += sum(pages.count for pages in meta.leaving)
        return meta

    half.step = step
    while engine.scheduler.has_requests():
        engine.core.step_fn()
    half.step = real
    return found


def decoded_fresh(root: Path) -> Any:
    """A fresh process goes on with those conversations."""
    engine = Engine(root, local(root, "decoded"))
    before = json.loads((root / "decoded.json").read_text())
    talks = [ids + one["tokens"] for ids, one in zip(MANY, before["outputs"], strict=True)]
    salted = [MANY[0] + before["told"]["stops"], before["again"] + before["told"]["aborted"]]
    found = engine.run(*talks, tokens=4) + engine.run(*salted, tokens=4, salt="again")
    result = {"outputs": found, "lengths": [len(talk) for talk in talks + salted], "counts": engine.worker.counts()}
    return result | {"reset": _reset_while_waiting(engine, prompt(64, seed=61))}


def _reset_while_waiting(engine: Engine, ids: list[int]) -> dict[str, Any]:
    """The pages that wait are of what came before the reset."""
    from vllm import SamplingParams

    llm, half, saved = engine.llm.llm_engine, engine.scheduler_half, []
    real = engine.worker._moves.save

    def save(pages: Any, *more: Any) -> Any:
        saved.append(sum(one.count for one in pages))
        return real(pages, *more)

    engine.worker._moves.save = save
    sampling = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    llm.add_request("reset", {"prompt_token_ids": ids}, sampling)
    for _ in range(70):
        llm.step()
    waiting = half._saves.waiting
    engine.scheduler.connector.reset_cache()
    counts = half.take_counts()
    llm.abort_request(["reset"], internal=False)
    _idle_step(engine)
    return {"waiting": waiting, "given_up": counts.get("save_given_up"), "steps": saved, "leaked": engine.leaked()}


def producer(root: Path) -> Any:
    """Stores and never loads."""
    engine = Engine(root, local(root, "roles"), transfer={"kv_role": "kv_producer"})
    engine.run(LONG)
    engine.settle()
    engine.forget_device()
    outputs = engine.run(LONG)
    engine.close()
    return {"outputs": outputs}


def consumer(root: Path) -> Any:
    """Loads and never stores."""
    engine = Engine(root, local(root, "roles"), transfer={"kv_role": "kv_consumer"})
    outputs = engine.run(LONG, SHORT)
    return {"outputs": outputs, "counts": engine.worker.counts(), "leaked": engine.leaked()}


def salts(root: Path) -> Any:
    engine = Engine(root, local(root, "salts"))
    result = {}
    for name, salt in (("a", "a"), ("b", "b"), ("a_again", "a"), ("none", None)):
        result[name] = engine.run(LONG, salt=salt)
        engine.settle()
        engine.forget_device()
    return result


def damaged(root: Path) -> Any:
    """Every stored byte behind the headers set to zero, by hand: served pages would give other tokens."""
    engine = Engine(root, local(root, "damaged"))
    engine.run(LONG)
    engine.settle()
    engine.close()
    zeroed = 0
    for extent in (root / "damaged").rglob("*.ext"):
        with extent.open("r+b") as file:
            size = file.seek(0, 2)
            for at in range(64 << 10, size, 64 << 10):  # leaves the headers of slots alone, all but by chance
                file.seek(at + 16384)
                file.write(bytes(16384))
                zeroed += 1
    engine = Engine(root, local(root, "damaged"))
    result = {"zeroed": zeroed, "outputs": engine.run(LONG), "counts": engine.worker.counts()}
    engine.settle()
    engine.forget_device()
    result |= {"healed": engine.run(LONG), "leaked": engine.leaked()}
    return result


def unverified(root: Path) -> Any:
    """The negative control: a store that says HIT and gives zeroes. The tokens must be wrong, or loads do nothing."""
    from storage_backends.base import Completion, Outcome

    engine = Engine(root, local(root, "unverified"))
    engine.run(LONG)
    engine.settle()
    engine.forget_device()

    def lie(batch: Any, deadline: float | None = None) -> Completion:
        for page in range(len(batch)):
            for buffer in batch.buffers(page):
                buffer[:] = bytes(len(buffer))
        return Completion.finished(len(batch), Outcome.HIT)

    engine.store.read = lie
    return {"outputs": engine.run(LONG)}


def _some_fail(engine: Engine, every: int) -> None:
    """Every so many-th page that is read has failed."""
    from storage_backends.base import Completion, Outcome

    real = engine.store.read

    def read(batch: Any, deadline: float | None = None) -> Completion:
        told = Completion(len(batch))
        outcomes = real(batch, deadline).result(30)
        told.settle_many(
            range(len(batch)),
            [Outcome.FAILED if page % every == every - 1 else outcome for page, outcome in enumerate(outcomes)],
        )
        return told

    engine.store.read = read


def failing(root: Path) -> Any:
    """Loads fail in the middle of the prefix: those pages are computed, nothing else happens."""
    engine = Engine(root, local(root, "failing"))
    engine.run(LONG, SHORT)
    engine.settle()
    engine.forget_device()
    _some_fail(engine, 5)
    outputs = engine.run(LONG, SHORT)
    return {"outputs": outputs, "counts": engine.worker.counts(), "leaked": engine.leaked()}


def hung(root: Path) -> Any:
    """A device that never answers: the request goes on after its time, and no late byte lands in its blocks."""
    from storage_backends.base import Completion

    engine = Engine(root, local(root, "hung"), options={"load_timeout": 0.5})
    engine.run(LONG)
    engine.settle()
    engine.forget_device()
    backend = engine.store.tiers[0].backend
    held: list[tuple[Any, Completion]] = []
    real = backend.read

    def never(batch: Any) -> Completion:
        held.append((batch, Completion(len(batch), backend.dispatcher)))
        return held[-1][1]

    backend.read = never
    outputs = engine.run(LONG)
    counts = engine.worker.counts()
    backend.read = real
    for batch, completion in held:  # the device answers at last, with other bytes
        for page in range(len(batch)):
            for buffer in batch.buffers(page):
                buffer[:] = b"\x77" * len(buffer)
        completion.settle_many(range(len(batch)), [1] * len(batch))
    result = {"outputs": outputs, "counts": counts, "held": len(held), "after": engine.run(LONG)}
    return result | {"leaked": engine.leaked()}


def preempted(root: Path) -> Any:
    """Too few blocks for all: vLLM preempts, and takes the prefix of what it resumes from the tiers."""
    engine = Engine(root, local(root, "preempted"), num_gpu_blocks_override=20, max_model_len=512)
    preemptions = 0
    real = engine.scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal preemptions
        preemptions += 1
        return real(*args, **kwargs)

    engine.scheduler._preempt_request = counted
    outputs = engine.run(*MANY, tokens=100)
    engine.settle()
    result = {"outputs": outputs, "preemptions": preemptions, "leaked": engine.leaked()}
    engine.forget_device()
    result["counts"] = engine.worker.counts()
    engine.close()
    return result


def chunked(root: Path) -> Any:
    """Prompts prefilled in pieces that are no multiple of a page."""
    engine = Engine(
        root,
        local(root, "chunked"),
        enable_chunked_prefill=True,
        max_num_batched_tokens=72,
        long_prefill_token_threshold=72,
    )
    result: dict[str, Any] = {"first": engine.run(LONG, SHORT)}
    engine.settle()
    engine.forget_device()
    result |= {"again": engine.run(LONG, SHORT), "leaked": engine.leaked()}
    return result


def whole(root: Path) -> Any:
    """A prompt of whole pages, all of which are loaded, its last token computed again; and without its last page."""
    engine = Engine(root, local(root, "whole"))
    result: dict[str, Any] = {"first": engine.run(WHOLE), "device": engine.run(WHOLE)}
    engine.settle()
    engine.forget_device()
    result |= {"loaded": engine.run(WHOLE), "twice": engine.run(WHOLE), "counts": engine.worker.counts()}
    engine.forget_device()
    _some_fail(engine, len(WHOLE) // PAGE)
    result |= {"without_last": engine.run(WHOLE), "leaked": engine.leaked(), "failed": engine.worker.counts()}
    return result


def _held_back(engine: Engine, call: str) -> tuple[threading.Event, Callable[[], None]]:
    """The first tier's `call` ("read", "write") moves no byte before the event. And: make it the real one again."""
    from storage_backends.base import Completion

    backend, gate = engine.store.tiers[0].backend, threading.Event()
    real = getattr(backend, call)

    def slow(batch: Any) -> Completion:
        told = Completion(len(batch), backend.dispatcher)

        def later() -> None:
            gate.wait(30)
            told.settle_many(range(len(batch)), real(batch).result(30))

        threading.Thread(target=later, daemon=True).start()
        return told

    setattr(backend, call, slow)
    return gate, lambda: setattr(backend, call, real)


def aborted(root: Path) -> Any:
    """A request is aborted while its pages are on their way: its blocks come back when they have arrived."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine = Engine(root, local(root, "aborted"))
    engine.run(LONG)
    engine.settle()
    engine.forget_device()
    gate, as_before = _held_back(engine, "read")
    llm = engine.llm.llm_engine
    name = llm.add_request(
        "aborted", TokensPrompt(prompt_token_ids=LONG), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    )
    llm.step()
    on_its_way = engine.leaked()
    llm.abort_request([name or "aborted"])
    llm.step()
    still = engine.leaked()
    gate.set()
    until = time.monotonic() + 30
    while engine.leaked() and time.monotonic() < until:
        llm.step() if llm.has_unfinished_requests() else engine.core.step()
        time.sleep(0.01)
    as_before()
    return {"on_its_way": on_its_way, "still": still, "leaked": engine.leaked(), "after": engine.run(LONG)}


def reset_while_saving(root: Path) -> Any:
    """What is on its way to be stored when the cache is reset is not served afterwards."""
    engine = Engine(root, local(root, "reset"))
    gate, as_before = _held_back(engine, "write")
    engine.run(LONG)
    engine.forget_device(connector=True)
    gate.set()
    engine.settle()
    as_before()
    return {"after": engine.run(LONG), "leaked": engine.leaked()}


def killed_writer(root: Path) -> Any:
    """Stores, and is killed while it does."""
    engine = Engine(root, local(root, "killed"))
    killer = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGKILL))
    real = engine.store.write
    written = 0

    def write(batch: Any) -> Any:
        nonlocal written
        written += len(batch)
        if written > 20:
            killer.start()
        return real(batch)

    engine.store.write = write
    for one in KILLED:
        engine.run(one)
    raise AssertionError("it lives")


def after_kill(root: Path) -> Any:
    """What the killed writer left is served where it is whole."""
    engine = Engine(root, local(root, "killed"))
    outputs = engine.run(KILLED[0])
    return {"outputs": outputs, "counts": engine.worker.counts(), "leaked": engine.leaked()}


def server_away(root: Path) -> Any:
    """A server that is down at start, as the only tier: nothing is cached, nothing fails."""
    tiers = {"tiers": [{"type": "redis", "url": "redis://127.0.0.1:1/0", "connect_timeout": 0.2}]}
    engine = Engine(root, tiers, options={"lookup_timeout": 0.3})
    return {"outputs": engine.run(LONG, SHORT), "leaked": engine.leaked()}


def remote(root: Path) -> Any:
    """Pages from a server: lookups go there in the background. The server is at the port in FOLDER/redis.port."""
    url = f"redis://127.0.0.1:{(root / 'redis.port').read_text()}/0"
    engine = Engine(root, {"tiers": [{"type": "redis", "url": url, "prefix": "vllm"}]})
    result: dict[str, Any] = {"first": engine.run(LONG, SHORT)}
    engine.settle()
    engine.forget_device()
    result["again"] = engine.run(LONG, SHORT)
    engine.close()
    return result


def remote_fresh(root: Path) -> Any:
    """A process that has never seen the server's pages."""
    url = f"redis://127.0.0.1:{(root / 'redis.port').read_text()}/0"
    engine = Engine(root, {"tiers": [{"type": "redis", "url": url, "prefix": "vllm"}]})
    waits = 0
    real = engine.scheduler.connector._scheduler._lookups.tiers

    def tiers(*args: Any) -> Any:
        nonlocal waits
        found = real(*args)
        waits += found is None
        return found

    engine.scheduler.connector._scheduler._lookups.tiers = tiers
    return {"outputs": engine.run(LONG, SHORT), "waits": waits, "leaked": engine.leaked()}


def mistakes(root: Path) -> Any:
    """Configurations that cannot work: one clear message each, from the constructor."""
    said = {}
    for name, given in {
        "policy": {"transfer": {"kv_load_failure_policy": "fail"}},
        "option": {"options": {"load_timeuot": 3}},
        "tier": {"tiers": {"tiers": [{"type": "lokal", "path": "/x"}]}},
        "file": {"tiers": str(root / "none.yaml")},
    }.items():
        try:
            Engine(root, **{"tiers": local(root, "mistakes"), **given})
        except Exception as error:
            chain, told = error, []
            while chain is not None:
                told.append(str(chain))
                chain = chain.__cause__ or chain.__context__
            said[name] = " | ".join(told)
    return said


def beside_writer(root: Path) -> Any:
    """Two engines that live at the same time on one tier: this one has started before the other one stores."""
    engine = Engine(root, local(root, "beside"))
    pid = os.fork()  # of an engine that has done nothing yet; the child starts one of its own
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(Path(__file__).parent / "rig.py"), str(root), "beside_other"])
    assert os.waitpid(pid, 0)[1] == 0
    until = time.monotonic() + 20
    seen = 0
    while time.monotonic() < until:
        seen = engine.store.stats()["local"]["pages"]
        if seen:
            break
        time.sleep(0.1)
    return {"outputs": engine.run(LONG), "seen": seen, "leaked": engine.leaked()}


def beside_other(root: Path) -> Any:
    engine = Engine(root, local(root, "beside"))
    engine.run(LONG)
    engine.settle()
    engine.close()
    return {"page": PAGE}


def shared(root: Path) -> Any:
    """Canonical pages of two blocks, and of half a block."""
    result: dict[str, Any] = {}
    for page in (64, 16):
        engine = Engine(root, {**local(root, "shared"), "share": "engines", "share_page": page})
        cold = engine.run(LONG, SHORT)
        engine.settle()
        engine.forget_device()
        warm = engine.run(LONG, SHORT)
        engine.forget_device()
        engine.run(LONG[:96])  # the engine holds the first block of a page itself, the tier the whole page
        mixed = engine.run(LONG)
        result[str(page)] = {
            "cold": cold, "warm": warm, "mixed": mixed, "stored": engine.store.stats()["local"]["pages"],
            "tag": engine.worker.spaces[0].tag, "leaked": engine.leaked(), "counts": engine.worker.counts(),
        }  # fmt: skip
        engine.close()
    return result


def exchanged(root: Path) -> Any:
    """SGLang reads what vLLM stored, and vLLM what SGLang did: blocks of 32, pages of 16, shared ones of 64 tokens."""
    tiers = {name: {**local(root, name), "share": "engines"} for name in ("theirs", "ours")}
    engine = Engine(root, tiers["theirs"])
    engine.run(LONG)
    engine.settle()
    engine.close()
    given = root / "exchange.json"
    given.write_text(json.dumps({"tokens": LONG, **tiers}))
    script = [os.environ["SGLANG_PYTHON"], str(Path(__file__).parent / "exchange.py"), str(root), str(given)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "LD_", "OMP_"))}
    there = subprocess.run(
        script, capture_output=True, text=True, env={**inherited, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    )
    assert there.returncode == 0, there.stderr[-4000:]
    engine = Engine(root, tiers["ours"])
    outputs = engine.run(LONG)
    counts = engine.worker.counts()
    return {"there": json.loads(there.stdout.splitlines()[-1]), "outputs": outputs, "counts": counts}


def unshared(root: Path) -> Any:
    """Where pages cannot be shared one line says why, and the engine's own pages work."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hicache_ext").addHandler(handler)
    engine = Engine(root, {**local(root, "unshared"), "share": "engines", "share_page": 48})
    engine.run(LONG)
    engine.settle()
    engine.forget_device()
    said = [line for line in lines if "does not hold here" in line]
    return {"outputs": engine.run(LONG), "said": said, "tag": engine.worker.spaces[0].tag, "leaked": engine.leaked()}


def _published(engine: Engine) -> list[Any]:
    """vLLM's own event stream, as its publisher gets it."""
    stream: list[Any] = []
    engine.scheduler.kv_event_publisher.publish = lambda batch: stream.extend(batch.events)
    return stream


def _steps_until(engine: Engine, stream: list[Any], enough: Callable[[list[Any]], bool]) -> list[dict[str, Any]]:
    """Short prompts, since vLLM publishes with its steps, until the stream is as wanted; the tiers' part of it."""
    until = time.monotonic() + 60
    while not enough(stream) and time.monotonic() < until:
        engine.run(SHORT[:3], tokens=1)
        time.sleep(0.05)
    return [
        {"type": type(event).__name__, **{name: getattr(event, name) for name in event.__struct_fields__}}
        for event in stream
    ]


def _on_disk(stream: list[Any]) -> int:
    return sum(len(event.block_hashes) for event in stream if getattr(event, "medium", None) == "DISK")


def announced(root: Path) -> Any:
    """Events of the tier in vLLM's stream: after a save, after a flush, and in a fresh process."""
    from vllm.config import KVEventsConfig

    quiet = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = Engine(root, local(root, "announced"), kv_events_config=quiet)
    stream = _published(engine)
    engine.run(LONG)
    engine.run(SHORT, salt="tenant")
    result = {"stored": _steps_until(engine, stream, lambda events: _on_disk(events) >= 12)}
    stream.clear()
    engine.forget_device()
    result["flushed"] = _steps_until(engine, stream, lambda events: _on_disk(events) >= 12)
    engine.close()
    engine = Engine(root, local(root, "announced"), kv_events_config=quiet)
    stream = _published(engine)
    result["restarted"] = _steps_until(engine, stream, lambda events: _on_disk(events) >= 12)
    result["leaked"] = [engine.leaked()]
    return result


def scheduler_cost(root: Path) -> Any:
    """The benchmark plays whole requests through the scheduler's half, and checks what it is told."""
    from hicache_ext.bench import vllm_scheduler

    folder = root / "scheduler_cost"
    folder.mkdir()
    return vllm_scheduler.run(folder, pages=(1, 9), requests=1)


def identifiers(root: Path) -> Any:
    """Page keys of vLLM's own requests: the same tokens, with other images, adapters, salts and embeddings."""
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.request import Request

    from hicache_ext.page import split_keys
    from hicache_ext.vllm.chains import Adapters, RequestChain

    def image(identifier: str) -> dict[str, Any]:
        where = PlaceholderRange(offset=40, length=20)
        return {"mm_features": [MultiModalFeatureSpec(None, "image", identifier, where)]}

    def adapter(name: str, content: bytes, number: int) -> dict[str, Any]:
        folder = root / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(content)
        return {"lora_request": LoRARequest("same-name", number, str(folder))}

    ids = prompt(32) + [5] * 96  # one text page, then placeholders
    adapters, found = Adapters(), {}
    for name, more in {
        "text": {}, "cat": image("cat"), "cat_again": image("cat"), "dog": image("dog"),
        "salted": {"cache_salt": "tenant"}, "lora": adapter("lora", b"one", 1), "copy": adapter("copy", b"one", 2),
        "other": adapter("other", b"two", 3),
    }.items():  # fmt: skip
        request = Request(name, list(ids), SamplingParams(max_tokens=1), None, **more)
        chain = RequestChain.of(request, PAGE, adapters)
        assert chain is not None
        found[name] = [key.hex() for key in split_keys(chain.keys(4))]
    embedded = Request("e", None, SamplingParams(max_tokens=1), None, prompt_embeds=torch.zeros(64, 8))
    return {"keys": found, "embedded": RequestChain.of(embedded, PAGE, adapters) is not None}


def windows(root: Path) -> Any:
    """A model with sliding windows in every other layer: two groups of blocks, one of which needs its last ones."""
    folder = root / "windows"
    folder.mkdir()
    make_hybrid(folder / "model")
    alone = Engine(folder)
    result: dict[str, Any] = {"alone": alone.run(LONG, SHORT), "many_alone": alone.run(*MANY, tokens=40)}
    alone.close()
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 72, "long_prefill_token_threshold": 72}
    engine = Engine(folder, {**local(folder), "share": "engines"}, **chunks)
    result["groups"] = len(engine.scheduler.kv_cache_config.kv_cache_groups)
    result["cold"] = engine.run(LONG, SHORT)
    result["many"] = engine.run(*MANY, tokens=40)
    engine.settle()
    engine.forget_device()
    result["warm"] = engine.run(LONG, SHORT)
    result["counts"] = engine.worker.counts()
    result["many_warm"] = engine.run(*MANY, tokens=40)
    engine.forget_device()
    _some_fail(engine, 5)
    result["failing"] = engine.run(LONG, SHORT)
    engine.forget_device(connector=True)
    result["after_reset"] = engine.run(LONG)
    return result | {"tag": engine.worker.spaces[0].tag, "leaked": engine.leaked()}

"""One vLLM engine of examples/h100/vllm.sh: built, then told to go, then measured or checked, and a file of results.

    python vllm_engine.py models WORK     the models' folders: a small one with random weights, and one that is a shape
    python vllm_engine.py ROLE WORK       WORK/ready.ROLE when it is up; begins at WORK/go.ROLE; WORK/ROLE.json

Several wait side by side, so that starting them costs their time once; one at a time is told to go. small-plain is
built with the variables in WORK/try (JSON), the others when WORK/start is there: those with which that one came up.

The small model's weights are such that every token depends on all before it, and that one of sixteen tokens is clearly
the next one: so a wrong page changes the output, and the last bit of a right one does not. The large one is
Llama-3.1-8B's shape with vLLM's dummy weights, for times.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1", VLLM_USE_FLASHINFER_SAMPLER="0",
)  # fmt: skip

LENGTHS = {8192: 3, 32768: 2}
NEW_TOKENS = 8
SHARED_PAGE = 64
#: Tokens of the small model's prompts: whole shared pages and a little, so that every cache serves as many.
SMALL = {
    name: SHARED_PAGE * pages + 8
    for name, pages in {"a": 30, "b": 9, "q1": 12, "q2": 24, "q3": 6, "q4": 15, "p1": 13, "p2": 25, "p3": 7, "p4": 16}
    .items()
}  # fmt: skip
SMALL_TOKENS = 12
VOCABULARY = 32000
#: Until a process that is up knows what another one has stored in the same folder.
NEWS_SECONDS = 2.0


def models(work: Path) -> None:
    import torch
    from safetensors.torch import save_file

    common = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
        "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    large = {
        **common, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "vocab_size": 128256,
    }  # fmt: skip
    small = {
        **common, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192, "vocab_size": VOCABULARY,
    }  # fmt: skip
    for name, config in (("large", large), ("small", small)):
        (work / name).mkdir(parents=True, exist_ok=True)
        (work / name / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1234)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Any:
        values = torch.randn(rows, columns, generator=generator, device=device) * scale / columns**0.5
        return values.to(torch.bfloat16).cpu()

    hidden, inner, kv = small["hidden_size"], small["intermediate_size"], 4 * 64
    head = torch.zeros(VOCABULARY, hidden, dtype=torch.bfloat16)
    head[100:116] = matrix(16, hidden)
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, hidden, 0.3 * hidden**0.5),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": head,
    }
    for layer in range(small["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, rows, columns, scale in (
            ("self_attn.q_proj", hidden, hidden, 1.5), ("self_attn.k_proj", kv, hidden, 1.5),
            ("self_attn.v_proj", kv, hidden, 1.0), ("self_attn.o_proj", hidden, hidden, 1.0),
            ("mlp.gate_proj", inner, hidden, 1.0), ("mlp.up_proj", inner, hidden, 1.0),
            ("mlp.down_proj", hidden, inner, 1.0),
        ):  # fmt: skip
            weights[f"{at}{name}.weight"] = matrix(rows, columns, scale)
    save_file(weights, work / "small" / "model.safetensors", metadata={"format": "pt"})


def prompt(name: str, tokens: int, vocabulary: int = VOCABULARY) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(200, vocabulary - 300) for _ in range(tokens)]


def ours(tiers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "kv_connector": "HiCacheConnector", "kv_connector_module_path": "hicache_ext.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"config": {"tiers": tiers, **more}},
    }  # fmt: skip


def shm(name: str, capacity: str) -> dict[str, Any]:
    """A tier whose files lie in memory, in place of a fast array of disks."""
    return {"type": "local", "path": f"{os.environ.get('FAST', '/dev/shm')}/hicache-vllm/{name}", "capacity": capacity}


class Engine:
    def __init__(self, model: Path, connector: str, transfer: Any, large: bool) -> None:
        """connector: its name here; without one the device's own cache holds all prompts of the times."""
        from vllm import LLM

        self.connector_name = connector

        arguments: dict[str, Any] = {
            "dtype": os.environ.get("DTYPE", "bfloat16"), "skip_tokenizer_init": True, "seed": 0, "block_size": 16,
            "enable_prefix_caching": True, "kv_transfer_config": transfer, "max_num_batched_tokens": 8192,
        }  # fmt: skip
        if large:
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
            arguments |= {
                "load_format": "dummy", "max_model_len": 36864, "max_num_seqs": 16, "compilation_config": graphs,
                "kv_cache_memory_bytes": (25 if transfer is None else 10) << 29, "gpu_memory_utilization": 0.05,
            }  # fmt: skip
        else:
            arguments |= {
                "max_model_len": 4096, "max_num_seqs": 4, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30,
                "gpu_memory_utilization": 0.02,
            }  # fmt: skip
        if backend := os.environ.get("ATTENTION"):
            arguments["attention_config"] = {"backend": backend}
        arguments |= json.loads(os.environ.get("ARGUMENTS", "{}"))
        self.llm = LLM(model=str(model), **arguments)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.pool = self.core.scheduler.kv_cache_manager.block_pool
        self.asked = 0
        self.blocks = self.pool.get_num_free_blocks()

    def ask(self, *prompts: list[int], tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
        """Of each prompt: output ids, tokens from a cache, milliseconds to the first token and from it to the last."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        found: dict[str, dict[str, Any]] = {}
        since = time.perf_counter()
        for ids in prompts:
            self.asked += 1
            found[f"ask-{self.asked:06d}"] = {}
            self.engine.add_request(f"ask-{self.asked:06d}", {"prompt_token_ids": ids}, sampling)
        names = list(found)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                name = next(name for name in names if output.request_id.startswith(name))
                now, one = time.perf_counter(), found[name]
                if output.outputs[0].token_ids:
                    one.setdefault("first", now)
                if output.finished:
                    one.update(ids=list(output.outputs[0].token_ids), cached=output.num_cached_tokens, last=now)
        return [
            {
                "ids": one["ids"], "cached": one["cached"], "ttft_ms": round((one["first"] - since) * 1e3, 2),
                "rest_ms": round((one["last"] - one["first"]) * 1e3, 3),
            }
            for one in (found[name] for name in names)
        ]  # fmt: skip

    @property
    def connector(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    def settle(self, seconds: float = 60) -> float:
        """Until what was saved is stored; how long that took."""
        if self.connector_name != "ours":
            return 0.0
        since = time.monotonic()
        while self.connector._worker._saving:
            assert time.monotonic() - since < seconds, "saves go on"
            time.sleep(0.002)
        took = time.monotonic() - since
        assert self.connector._store.settled(seconds)
        return took

    def forget(self, seconds: float = 30) -> None:
        """The device's own prefix cache is empty after this; others' connectors may first want a few steps."""
        until = time.monotonic() + seconds
        for _ in range(3 if self.connector_name in ("offloading", "lmcache") else 0):
            self.ask(prompt(f"step {self.asked}", 20), tokens=2)
        while not self.llm.reset_prefix_cache():
            assert time.monotonic() < until, "the device's prefix cache cannot be emptied"
            self.ask(prompt(f"step {self.asked}", 20), tokens=2)
            time.sleep(0.05)

    def leaked(self) -> int:
        """Blocks that nobody has and that are not free."""
        return self.blocks - self.pool.get_num_free_blocks()

    def counts(self) -> dict[str, int]:
        return dict(self.connector._worker.counts()) if self.connector_name == "ours" else {}

    def close(self) -> None:
        self.engine.engine_core.shutdown()


# ---- right or wrong, with the small model


def small(engine: Engine, names: list[str]) -> dict[str, Any]:
    return {name: engine.ask(prompt(name, SMALL[name]), tokens=SMALL_TOKENS)[0] for name in names}


def small_plain(engine: Engine) -> dict[str, Any]:
    """Without a connector: computed, and again with what the device's own cache holds, which is what others must be
    compared with: as many tokens are computed then."""
    return {"computed": small(engine, list(SMALL)), "cached": small(engine, list(SMALL)), "leaked": engine.leaked()}


def small_first(engine: Engine) -> dict[str, Any]:
    names = ["a", "b", "q1", "q2"]
    found: dict[str, Any] = {"computed": small(engine, names)}
    engine.settle()
    engine.forget()
    found["loaded"] = small(engine, names)
    found["counts"], found["leaked"] = engine.counts(), engine.leaked()
    engine.forget()
    found["zeroed"] = zeroed(engine, names)
    return found


def zeroed(engine: Engine, names: list[str]) -> Any:
    """The negative control: the same, but every page that arrives is zeroes."""
    moves = engine.connector._worker._moves
    if not hasattr(moves, "_loads"):
        return None
    import torch

    ways = [side.copies for side in moves._sides[0].all]
    real = [copies.load for copies in ways]
    blocks = moves._loads._blocks[0]

    def load(part: Any) -> None:
        for plane in blocks.planes:
            flat = plane.buffer.view(torch.uint8)
            shape = (blocks.pages, plane.tokens, plane.heads, plane.run)
            there = flat.as_strided(shape, (plane.page, plane.token, plane.head, 1), flat.storage_offset())
            there[torch.from_numpy(part.pages).to(flat.device)] = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for copies in ways:
        copies.load = load
    try:
        return small(engine, names)
    finally:
        for copies, one in zip(ways, real, strict=True):
            copies.load = one
        engine.forget()


def small_second(engine: Engine) -> dict[str, Any]:
    time.sleep(NEWS_SECONDS)
    names = ["a", "b", "q1", "q2"]
    found = {"loaded": small(engine, names)}
    engine.settle()
    return {**found, "counts": engine.counts(), "leaked": engine.leaked()}


def small_share(engine: Engine) -> dict[str, Any]:
    """What SGLang stored, and something for SGLang to read."""
    time.sleep(NEWS_SECONDS)
    found: dict[str, Any] = {"loaded": small(engine, ["q1", "q2", "q3", "q4"])}
    found["computed"] = small(engine, ["p1", "p2", "p3", "p4"])
    engine.settle()
    engine.forget()
    found["zeroed"] = zeroed(engine, ["q1", "q2", "q3", "q4"])
    return {**found, "counts": engine.counts(), "leaked": engine.leaked()}


# ---- times, with the large one


def large(name: str, tokens: int) -> list[int]:
    return prompt(name, tokens, 128256)


def warm(engine: Engine) -> None:
    for tokens in (300, 8192, 1000, 64):
        engine.ask(large(f"warm {tokens}", tokens))
        engine.ask(large(f"warm {tokens}", tokens))
    engine.ask(*[large(f"warm {i}", 64) for i in range(16)])


def times(engine: Engine, kinds: list[str]) -> dict[str, Any]:
    """Rows, and what our connector counted, by kind.

    kinds: computed, device (the device's own cache), host or local (the connector, the device's cache emptied; it is
    called by where its pages lie).
    """
    rows: dict[tuple[int, int, str], dict[str, Any]] = {}
    counted: dict[str, dict[str, int]] = {}
    spans = watched(engine) if engine.connector_name == "ours" else {}
    for kind in kinds:
        if kind in ("host", "local"):
            engine.settle()
            engine.forget()
        before = engine.counts()
        for length, turns in LENGTHS.items():
            for turn in range(turns):
                (row,) = engine.ask(large(f"{length} {turn}", length))
                rows[length, turn, kind] = {"kind": kind, "tokens": length, "turn": turn, **row}
                if kind != "device":
                    rows[length, turn, kind]["settle_ms"] = round(engine.settle() * 1e3, 1)
        counted[kind] = {name: number - before.get(name, 0) for name, number in engine.counts().items()}
    return {"rows": list(rows.values()), "counted": counted, "spans": spans}


def watched(engine: Engine) -> dict[str, list[tuple[int, float]]]:
    """Bytes and seconds of each load from its start to its end, and of the saves of each step, from where the device
    has computed them to where the last of them is stored; filled as they happen."""
    worker = engine.connector._worker
    moves, page = worker._moves, worker._bytes(0)
    load, save, mark = moves.load, moves.save, getattr(moves, "_mark", None)
    spans: dict[str, list[tuple[int, float]]] = {"load": [], "save": []}
    current: list[list[float]] = [[]]  # when the device had computed what is being saved

    def marked() -> Any:
        event, times = mark(), current[0]

        def synchronize() -> None:
            event.synchronize()
            times.append(time.perf_counter())

        return SimpleNamespace(synchronize=synchronize)

    def loads(pages: Any, space: Any, deadline: float, loaded: Callable[..., None]) -> None:
        since = time.perf_counter()

        def ended(bad: Any, outcomes: bytes) -> None:
            spans["load"].append((page * outcomes.count(1), time.perf_counter() - since))
            loaded(bad, outcomes)

        current[0] = []
        load(pages, space, deadline, ended)

    def saves(pages: Any, spaces: Any, saved: Callable[..., None]) -> int:
        since, told, lock = time.perf_counter(), [0, 0], threading.Lock()
        times = current[0] = []

        def ended(group: int, outcomes: bytes, dropped: int) -> None:
            with lock:
                told[0] += len(outcomes) + dropped
                told[1] += outcomes.count(1)
                if told[0] == sum(one.count for one in pages):
                    spans["save"].append((page * told[1], time.perf_counter() - (times or [since])[0]))
            saved(group, outcomes, dropped)

        return int(save(pages, spaces, ended))

    if mark is not None:
        moves._mark = marked
    moves.load, moves.save = loads, saves
    return spans


def decode(engine: Engine, label: str) -> dict[str, list[float]]:
    """Milliseconds a token, nothing of the prompts in any cache, one sequence and sixteen."""
    found: dict[str, list[float]] = {"1": [], "16": []}
    for turn in range(4):
        (one,) = engine.ask(large(f"decode {label} {turn}", 1024), tokens=129)
        found["1"].append(round(one["rest_ms"] / 128, 4))
    for turn in range(3):
        many = engine.ask(*[large(f"decode {label} {turn} {i}", 256) for i in range(16)], tokens=129)
        found["16"].append(round(statistics.median(one["rest_ms"] for one in many) / 128, 4))
    return found


def timed(kinds: list[str], tokens_too: bool) -> Callable[[Engine], dict[str, Any]]:
    def run(engine: Engine) -> dict[str, Any]:
        warm(engine)
        found: dict[str, Any] = {}
        if tokens_too:
            found["decode_ms"] = decode(engine, "first")
        found |= times(engine, kinds)
        if engine.connector_name == "ours":
            found["copies"] = copies(engine)
        if tokens_too:
            found["decode_again_ms"] = decode(engine, "again")
        engine.forget()
        found["leaked"] = engine.leaked()
        return found

    return run


def copies(engine: Engine) -> dict[str, Any]:
    """GB/s of what moves a part of a load or a save, beside a plain copy of as many bytes; medians of 30."""
    import torch

    from hicache_ext.device.copies import Part
    from hicache_ext.vllm.pages import Pages

    moves = engine.connector._worker._moves
    if not hasattr(moves, "_loads"):  # blocks in host memory
        return {}
    blocks, (into, out) = moves._loads._blocks[0], moves._sides
    count = into.part("0")
    numbers = random.Random(3).sample(range(1, 2000), count * max(1, blocks.page // blocks.block))
    units = blocks.units(Pages("bench", bytes(32 * count), b"", tuple(numbers))).ravel()
    size = count * blocks.page_bytes
    host, device = (
        torch.empty(size, dtype=torch.uint8).pin_memory(),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )

    def rate(call: Callable[[], None]) -> list[float]:
        spent = []
        for _ in range(34):
            torch.cuda.synchronize()
            since = time.perf_counter()
            call()
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - since)
        ordered = sorted(size / one / 1e9 for one in spent[4:])
        return [round(ordered[i], 2) for i in (len(ordered) // 2, 2, -3)]

    found = {
        "bytes": size, "name": moves.copies,
        "plain to device": rate(lambda: device.copy_(host, non_blocking=True)),
        "plain from device": rate(lambda: host.copy_(device, non_blocking=True)),
    }  # fmt: skip
    for way in ("host", "device"):
        sides = getattr(into, way), getattr(out, way)
        if sides[0] is None:
            continue
        for side, name in zip(sides, ("load", "store"), strict=True):
            slots = side.staging["0"].take(count, 30)
            assert slots is not None
            part = Part("0", blocks.slots(side.staging["0"]).units(slots).ravel(), units)
            label = f"{'to' if name == 'load' else 'from'} blocks, slots on the {way}"
            found[label] = rate(lambda side=side, name=name, part=part: getattr(side.copies, name)(part))
            copiers = getattr(side.copies, "_copiers", {}).get("0", [])
            usual = [one.copier.multiprocessors for one in copiers]
            for some in (3, 6, 24, 48) if way == "device" and name == "load" else ():
                for one in copiers:
                    one.copier.multiprocessors = some
                found[f"{label}, {some} multiprocessors"] = rate(lambda side=side, part=part: side.copies.load(part))
            for one, number in zip(copiers, usual, strict=True):
                one.copier.multiprocessors = number
            side.staging["0"].give(slots)
    return found


MEMORY = {"type": "memory", "capacity": os.environ.get("HOST", "16GiB"), "threads": 8}
#: Whether what a token costs is measured as well.
DECODE = os.environ.get("DECODE", "1") == "1"
LMCACHE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
OFFLOADING = {
    "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 16 << 30},
}  # fmt: skip
SHARED = {"share": "engines", "share_page": SHARED_PAGE}
#: It shows whether vLLM starts here, and how.
FIRST = "small-plain"

#: By role: the model, the connector by name, its configuration, and what is done.
ROLES: dict[str, tuple[str, str, Any, Callable[[Engine], dict[str, Any]]]] = {
    "small-plain": ("small", "none", None, small_plain),
    "small-first": ("small", "ours", ours([shm("small", "4GiB")]), small_first),
    "small-second": ("small", "ours", ours([shm("small", "4GiB")]), small_second),
    "small-memory": ("small", "ours", ours([{**MEMORY, "capacity": "2GiB"}]), small_first),
    "small-share": ("small", "ours", ours([shm("shared", "4GiB")], **SHARED), small_share),
    "large-plain": ("large", "none", None, timed(["computed", "device"], DECODE)),
    "large-ours": ("large", "ours", ours([MEMORY]), timed(["computed", "host"], DECODE)),
    "large-local": ("large", "ours", ours([shm("large", "24GiB")]), timed(["computed", "local"], False)),
    "large-offloading": ("large", "offloading", OFFLOADING, timed(["computed", "host"], DECODE)),
    "large-lmcache": ("large", "lmcache", LMCACHE, timed(["computed", "host"], False)),
}


def main() -> None:
    role, work = sys.argv[1], Path(sys.argv[2])
    if role == "models":
        models(work)
        return
    model, connector, transfer, run = ROLES[role]
    if connector == "lmcache":
        os.environ.update(LMCACHE_LOCAL_CPU="True", LMCACHE_MAX_LOCAL_CPU_SIZE="16", LMCACHE_CHUNK_SIZE="256")
    import vllm  # the longer part of a start

    del vllm
    variables = work / ("try" if role == FIRST else "start")
    while not variables.exists():
        time.sleep(0.05)
    os.environ.update(json.loads(variables.read_text()))
    if connector == "lmcache":
        # LMCache 0.5.3 loads nothing, in silence, where it is called without attention metadata: as the new runner does
        # for a step that is one CUDA graph.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    since = time.monotonic()
    engine = Engine(work / model, connector, transfer, model == "large")
    started = round(time.monotonic() - since, 1)
    (work / f"ready.{role}").touch()
    while not (work / f"go.{role}").exists():
        time.sleep(0.05)
    try:
        result = {"role": role, "started_s": started, **run(engine)}
        code = 0
    except BaseException:
        traceback.print_exc()
        result, code = {"role": role, "started_s": started, "error": traceback.format_exc()[-2000:]}, 1
    (work / f"{role}.json").write_text(json.dumps(result))
    try:
        engine.close()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

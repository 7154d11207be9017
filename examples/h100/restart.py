"""SGLang on a GPU with the local tier: cold, device hit, local hit, and local hit after a restart; times and outputs.

    python restart.py first  RESULT.json      # an empty tier; stops the engine
    python restart.py second RESULT.json      # a new process: everything comes from the disk

The model is Llama-3.1-8B's shape with dummy weights (SGLang fills them from a constant, so that greedy token ids can be
compared between processes). Needs SGLang with a GPU and hicache-ext in one environment. Drop the page cache between the
two (`sync; echo 3 > /proc/sys/vm/drop_caches`); the tier reads with O_DIRECT all the same.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

TIER = "/tmp/hicache-tier"
MODEL = Path("/tmp/dummy-llama-8b")
PAGE = 64
LENGTHS = (8192, 32768)
NEW_TOKENS = 8


def write_config() -> int:
    """The model's folder; returns the size of the vocabulary."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "max_position_embeddings": 131072, "mlp_bias": False, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "vocab_size": 128256,
    }  # fmt: skip
    MODEL.mkdir(exist_ok=True)
    (MODEL / "config.json").write_text(json.dumps(config))
    return 128256


def start() -> Any:
    import sglang

    return sglang.Engine(
        model_path=str(MODEL), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", attention_backend="fa3",
        sampling_backend="pytorch", grammar_backend="none", page_size=PAGE, max_total_tokens=49152,
        context_length=40960, mem_fraction_static=0.6, chunked_prefill_size=8192, max_running_requests=8,
        enable_cache_report=True, random_seed=1, disable_prefill_cuda_graph=True, disable_decode_cuda_graph=True,
        enable_hierarchical_cache=True, hicache_ratio=2.0, hicache_io_backend="kernel",
        hicache_mem_layout="page_first", hicache_write_policy="write_through",
        hicache_storage_prefetch_policy="wait_complete", hicache_storage_backend="hicache_ext",
        hicache_storage_backend_extra_config=json.dumps(
            {"prefetch_threshold": PAGE, "tiers": [{"type": "local", "path": TIER, "capacity": "30GiB"}]}
        ),
    )  # fmt: skip


def prompt(name: str, tokens: int, vocabulary: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(10, vocabulary - 300) for _ in range(tokens)]


def ask(engine: Any, ids: list[int]) -> tuple[list[int], float, dict[str, int]]:
    """Output ids, milliseconds to the first token, cached tokens by tier."""
    begin, first, last = time.perf_counter(), None, {}
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    for chunk in engine.generate(input_ids=ids, stream=True, sampling_params=sampling):
        first, last = first or time.perf_counter(), chunk
    assert first is not None
    details = last["meta_info"].get("cached_tokens_details") or {}
    tokens = {tier: details.get(tier) or 0 for tier in ("device", "host", "storage")}
    return last["output_ids"], round((first - begin) * 1e3, 1), tokens


def flush(engine: Any) -> None:
    """Empty device and host memory; refused while pages are on their way to the tier."""
    for _ in range(60):
        time.sleep(1)
        if getattr(engine.flush_cache(), "success", False):
            return
    sys.exit("the cache could not be flushed")


def main(phase: str, result: Path) -> None:
    import sglang
    import torch

    vocabulary = write_config()
    engine = start()
    for warm in (300, LENGTHS[0]):
        ask(engine, prompt(f"warm{warm}", warm, vocabulary))
    rows = []
    for length in LENGTHS:
        ids = prompt(f"p{length}", length, vocabulary)
        steps = ["none", "device"] if phase == "first" else []
        outputs: dict[str, list[int]] = {}
        for tier in [*steps, "local", "device"]:
            if tier == "local" and steps:
                flush(engine)
            outputs[tier], ttft, tokens = ask(engine, ids)
            rows.append(
                {
                    "subject": "recompute" if tier == "none" else "ours",
                    "tier": tier,
                    "phase": phase,
                    "prompt_tokens": length,
                    "concurrency": 1,
                    "ttft_ms": ttft,
                    "tokens_from": tokens,
                    "output_ids": outputs[tier],
                }
            )
            print(rows[-1], flush=True)
        for row in rows:
            if row["prompt_tokens"] == length:
                row["identical"] = row["output_ids"] == outputs["device"]
        flush(engine)
    machine = {
        "gpu": torch.cuda.get_device_name(), "kernel": platform.release(), "python": platform.python_version(),
        "torch": torch.__version__, "sglang": sglang.__version__,
    }  # fmt: skip
    result.write_text(json.dumps({"machine": machine, "command": " ".join(sys.argv), "rows": rows}, indent=1))
    engine.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

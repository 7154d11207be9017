"""SGLang's half of examples/h100/vllm.sh: pages that both engines read.

    python share_sglang.py alone WORK       no storage: what SGLang says by itself
    python share_sglang.py first WORK       stores its prompts where vLLM finds them
    python share_sglang.py second WORK      reads what vLLM stored there, once WORK/go.sglang-second is there

The prompts and the model are vllm_engine.py's. Needs SGLang with a GPU and hicache-ext in one environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from vllm_engine import NEWS_SECONDS, SHARED, SHARED_PAGE, SMALL, SMALL_TOKENS, prompt, shm


def start(work: Path, shared: bool) -> Any:
    import sglang

    storage: dict[str, Any] = {}
    if shared:
        extra = {"prefetch_threshold": SHARED_PAGE, "tiers": [shm("shared", "4GiB")], **SHARED}
        storage = {
            "enable_hierarchical_cache": True, "hicache_ratio": 2.0, "hicache_io_backend": "kernel",
            "hicache_mem_layout": "page_first", "hicache_write_policy": "write_through",
            "hicache_storage_prefetch_policy": "wait_complete", "hicache_storage_backend": "hicache_ext",
            "hicache_storage_backend_extra_config": json.dumps(extra),
        }  # fmt: skip
    arguments = {
        "model_path": str(work / "small"), "skip_tokenizer_init": True, "dtype": "bfloat16", "page_size": SHARED_PAGE,
        "attention_backend": "fa3", "sampling_backend": "pytorch", "grammar_backend": "none", "context_length": 4096,
        "max_total_tokens": 16384, "mem_fraction_static": 0.9, "chunked_prefill_size": 8192, "random_seed": 1,
        "max_running_requests": 4, "enable_cache_report": True, "disable_prefill_cuda_graph": True,
        "disable_decode_cuda_graph": True, **storage,
    }  # fmt: skip
    return sglang.Engine(**{**arguments, **json.loads(os.environ.get("SGLANG_ARGUMENTS", "{}"))})


def ask(engine: Any, name: str) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": SMALL_TOKENS, "ignore_eos": True}
    done = engine.generate(input_ids=prompt(name, SMALL[name]), sampling_params=sampling)
    details = done["meta_info"].get("cached_tokens_details") or {}
    return {
        "ids": list(done["output_ids"]), "cached": done["meta_info"].get("cached_tokens"),
        "storage": details.get("storage") or 0,
    }  # fmt: skip


def flush(engine: Any) -> None:
    """Empty device and host memory; refused while pages are on their way to the tier."""
    for _ in range(60):
        time.sleep(0.5)
        if getattr(engine.flush_cache(), "success", False):
            return
    raise TimeoutError("the cache could not be flushed")


def run(phase: str, work: Path) -> dict[str, Any]:
    engine = start(work, phase != "alone")
    found: dict[str, Any] = {"phase": phase}
    theirs, mine = ["p1", "p2", "p3", "p4"], ["q1", "q2", "q3", "q4"]
    if phase == "second":
        while not (work / "go.sglang-second").exists():
            time.sleep(0.1)
        time.sleep(NEWS_SECONDS)
        found["loaded"] = {name: ask(engine, name) for name in theirs}
    else:
        names = theirs if phase == "alone" else mine
        found["computed"] = {name: ask(engine, name) for name in names}
        found["cached"] = {name: ask(engine, name) for name in names}
        if phase == "first":
            flush(engine)  # so what was written is in the tier
            found["loaded"] = {name: ask(engine, name) for name in names}
    (work / f"sglang-{phase}.json").write_text(json.dumps(found))
    engine.shutdown()
    return found


if __name__ == "__main__":
    where = Path(sys.argv[2])
    try:
        run(sys.argv[1], where)
    except BaseException:
        traceback.print_exc()
        (where / f"sglang-{sys.argv[1]}.json").write_text(json.dumps({"error": traceback.format_exc()[-2000:]}))
        os._exit(1)

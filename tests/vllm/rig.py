"""Real vLLM on this CPU, imported once: every scenario is a forked child with an engine of its own.

Runs inside the vLLM environment (`make vllm-env`), so it imports neither pytest nor anything of the tests.

    python rig.py FOLDER SCENARIO...     results go to FOLDER/SCENARIO.json; progress to standard output
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1", VLLM_CPU_KVCACHE_SPACE="1",
)  # fmt: skip

PAGE = 32
MODULE, CLASS = "hicache_ext.vllm", "HiCacheConnector"


def make_model(folder: Path) -> None:
    """A four-layer random Llama whose tokenizer knows words w3 ... w1023."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 1024)}}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(1234)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, initializer_range=0.15, dtype=torch.float32,
    )  # fmt: skip
    LlamaForCausalLM(config).float().eval().save_pretrained(folder)


def make_hybrid(folder: Path) -> None:
    """A four-layer random Gemma with a sliding window of 64 tokens in every other layer; the tokenizer as above."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    make_model(folder)
    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=32, initializer_range=0.15, dtype=torch.float32, tie_word_embeddings=False,
    )  # fmt: skip
    Gemma3ForCausalLM(config).float().eval().save_pretrained(folder)


def prompt(length: int, seed: int = 7) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 1024) for _ in range(length)]


class Engine:
    """One vLLM engine in this process. With `tiers` (a configuration) it has our connector, with None it has none."""

    def __init__(self, root: Path, tiers: Any = None, options: Any = None, transfer: Any = None, **arguments: Any):
        from vllm import LLM

        connector = None
        if tiers is not None:
            connector = {
                "kv_connector": CLASS,
                "kv_connector_module_path": MODULE,
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"config": tiers, **(options or {})},
                **(transfer or {}),
            }
        self.llm = LLM(
            model=str(root / "model"),
            **{
                "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True, "seed": 0,
                "kv_transfer_config": connector, "enable_prefix_caching": True, "block_size": PAGE,
                **arguments,
            },
        )  # fmt: skip
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.all_blocks = self.free_blocks()

    def run(self, *prompts: list[int], tokens: int = 16, salt: str | None = None) -> list[dict[str, Any]]:
        """Greedy tokens of each prompt, and how many tokens of it came from any cache."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        wanted = [TokensPrompt(prompt_token_ids=ids, **({"cache_salt": salt} if salt else {})) for ids in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        done = self.llm.generate(wanted, sampling, use_tqdm=False)
        return [{"cached": one.num_cached_tokens, "tokens": list(one.outputs[0].token_ids)} for one in done]

    @property
    def worker(self) -> Any:
        """The worker's half of the connector."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @property
    def scheduler_half(self) -> Any:
        return self.scheduler.connector._scheduler

    @property
    def store(self) -> Any:
        return self.scheduler.connector._store

    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def leaked(self) -> int:
        """Blocks that are neither free nor of a request, once the engine has nothing to do."""
        return self.all_blocks - self.free_blocks()

    def settle(self, seconds: float = 20) -> None:
        """Wait until every save is done."""
        until = time.monotonic() + seconds
        while self.worker._saving:
            assert time.monotonic() < until, "saves go on"
            time.sleep(0.01)
        assert self.store.settled(seconds)

    def forget_device(self, connector: bool = False) -> None:
        """Empty vLLM's own prefix cache, so that the next prompt must come from the tiers."""
        assert self.llm.reset_prefix_cache(reset_connector=connector)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def local(root: Path, name: str = "tier", **options: Any) -> dict[str, Any]:
    return {"tiers": [{"type": "local", "path": str(root / name), "capacity": "256MiB", **options}]}


def main() -> None:
    root, names = Path(sys.argv[1]), sys.argv[2:]
    since = time.monotonic()
    if not (root / "model").exists():
        make_model(root / "model")
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    print(f"vLLM imported in {time.monotonic() - since:.0f} s", flush=True)
    import scenarios

    for name in names:
        since = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                result = getattr(scenarios, name)(root)
                (root / f"{name}.json").write_text(json.dumps(result))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(f"SCENARIO {name}: status {status}, {time.monotonic() - since:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""The same prompt in two processes: the second one loads its prefix from the tier.

python offline.py MODEL [DIRECTORY]
"""

import random
import subprocess
import sys
import tempfile

TRANSFER = {
    "kv_connector": "HiCacheConnector",
    "kv_connector_module_path": "hicache_ext.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def generate(model: str, directory: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    tier = {"type": "local", "path": directory, "capacity": "1GiB"}
    llm = LLM(
        model=model,
        max_model_len=1024,
        enforce_eager=True,
        kv_transfer_config={**TRANSFER, "kv_connector_extra_config": {"config": {"tiers": [tier]}}},
    )
    rng = random.Random(1)
    prompt = TokensPrompt(prompt_token_ids=[rng.randrange(3, 1000) for _ in range(600)])
    (done,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False)
    print(f"{done.num_cached_tokens} of 600 prompt tokens from the tier; tokens {list(done.outputs[0].token_ids)}")


if __name__ == "__main__":
    if sys.argv[-1] == "--child":
        generate(sys.argv[1], sys.argv[2])
    else:
        directory = sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="hicache-")
        for _ in range(2):
            subprocess.run([sys.executable, __file__, sys.argv[1], directory, "--child"], check=True)

"""SGLang's half of the exchange: its real controller and host pool, over tiers that vLLM reads and wrote.

Runs inside SGLang's environment, called by the scenario `exchanged`. The KV is a third party's: transformers' own, of
the same model. What vLLM stored must be it; what is stored here is it, and vLLM must go on from it.

    python exchange.py FOLDER CONFIG.json     what was found, as JSON, is the last line of standard output
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "sglang"), str(HERE.parents[1])]

import rig  # noqa: E402
import torch  # noqa: E402


def true_kv(model: Path, tokens: list[int]) -> Any:
    """float32[token, layer, K and V, head, dim]."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = network(torch.tensor([tokens]), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # each [2, head, token, dim]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).contiguous()


def main() -> None:
    root, given = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    tokens = given["tokens"]
    kv = true_kv(root / "model", tokens)
    _, rig.LAYERS, _, rig.HEADS, rig.DIM = kv.shape
    rig.DTYPE = torch.float32
    rig.prepare(model_path=str(root / "model"))
    rig.load_plugin()
    result: dict[str, Any] = {}
    for name, layout in (("theirs", "page_head"), ("ours", "layer_first")):
        found = rig.Rig(layout)
        found.attach("hicache_ext", given[name])
        found.bytes_of = lambda indices, pool=found.host_pool: rig.by_token(pool, indices)  # type: ignore[method-assign]
        if name == "theirs":
            read = torch.frombuffer(bytearray(found.prefetch(found.key(tokens))), dtype=torch.float32)
            read = read.view(-1, *kv.shape[1:])
            result["read"] = len(read)
            result["difference"] = float((read - kv[: len(read)]).abs().max())
            result["scale"] = float(kv.abs().max())
        else:

            def put(indices: Any, seed: int, pool: Any = found.host_pool) -> None:
                for token, slot in enumerate(indices.tolist()):
                    for layer in range(rig.LAYERS):
                        for side, target in enumerate(rig.token_of(pool, layer, slot)):
                            target.copy_(kv[token, layer, side])

            found.fill = put  # type: ignore[method-assign]
            found.backup(found.key(tokens), 0)
            result["stored"] = found.adapter.store.stats()["local"]["pages"]
        found.close()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

"""A tiny random Llama on disk: real enough for a server, small enough for a CPU, the same on every machine.

What belongs here: the model's files. It is written without torch or transformers, so that making it takes a
second; both packages used here come with SGLang.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

VOCABULARY = 4096
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
# Wide, so that logits lie far apart: with a usual 0.02 the greedy choice of a random model hangs on the last bit.
SPREAD = 0.4


def make(folder: Path, vocabulary: int = VOCABULARY, seed: int = 0) -> Path:
    """Writes the model into `folder` unless this version of it is there already; returns the folder.

    vocabulary: size of it. seed: of the weights, to make models that differ in nothing else.
    """
    config = CONFIG | {"vocab_size": vocabulary}
    recipe = json.dumps({"config": config, "spread": SPREAD, "seed": seed, "recipe": 2}, sort_keys=True)
    stamp = folder / ".recipe.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder / "model.safetensors", vocabulary, seed)
    _write_tokenizer(folder, vocabulary)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    stamp.write_text(recipe, encoding="utf-8")  # last: an interrupted run must not look complete
    return folder


def _write_weights(path: Path, vocabulary: int, seed: int) -> None:
    from safetensors.numpy import save_file

    hidden, inner = 256, 512
    query, key_value = 4 * 64, 2 * 64
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * SPREAD).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "lm_head.weight": matrix(vocabulary, hidden)}
    for layer in range(4):
        name = f"model.layers.{layer}."
        weights |= {
            f"{name}self_attn.q_proj.weight": matrix(query, hidden),
            f"{name}self_attn.k_proj.weight": matrix(key_value, hidden),
            f"{name}self_attn.v_proj.weight": matrix(key_value, hidden),
            f"{name}self_attn.o_proj.weight": matrix(hidden, query),
            f"{name}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{name}mlp.up_proj.weight": matrix(inner, hidden),
            f"{name}mlp.down_proj.weight": matrix(hidden, inner),
            f"{name}input_layernorm.weight": np.ones(hidden, np.float32),
            f"{name}post_attention_layernorm.weight": np.ones(hidden, np.float32),
        }
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    save_file(weights, path, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, size: int) -> None:
    """Bytes, three specials, and a name for every other id: any token id can be printed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = ["<s>", "</s>", "<pad>"]
    for name in specials + [f"<{index}>" for index in range(256 + len(specials), size)]:
        vocabulary[name] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "model_max_length": CONFIG["max_position_embeddings"],
                "clean_up_tokenization_spaces": False,
            },
            indent=1,
        ),
        encoding="utf-8",
    )

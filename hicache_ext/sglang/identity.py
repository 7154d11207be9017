"""Who we are: the Namespace of each host pool, from SGLang's arguments, its storage config and the pool itself.

Belongs here: which facts of an SGLang process decide whether stored pages are its own. Does not belong here: how files
are fingerprinted (fingerprint), how a pool's pages are addressed (pools), or when weights change (weights).

The served name is never part of it: two models can share an alias, one model can have two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hicache_ext import fingerprint
from hicache_ext.config import Config, ConfigError
from hicache_ext.fingerprint import adapter_content, locate
from hicache_ext.page import Namespace, PageLayout, Shard

logger = logging.getLogger(__name__)

#: Format tag: pages laid out as SGLang's host pools have them. Raise the number if their meaning changes.
TAG = "sglang/1"

#: Server arguments that change what KV is computed, beside the model's own config. Those that are unset (None, False,
#: empty) are left out, so that an argument that a version does not have yet reads as unset.
_NUMERIC_ARGUMENTS = (
    "dtype",
    "quantization",
    "quantization_param_path",
    "kv_cache_dtype",
    "context_length",
    "json_model_override_args",
    "model_impl",
    "model_loader_extra_config",
    "torchao_config",
    "modelopt_quant",
    "speculative_algorithm",
    "speculative_draft_model_quantization",
    "speculative_num_steps",
)
_UNSET: tuple[Any, ...] = (None, False, "", "auto", "{}", {}, [])

#: Pools whose bytes are the same on every tp rank when the model's KV is (MLA and compressed MLA).
_REPLICATED_POOLS = ("kv", "indexer", "swa", "auxiliary_swa", "draft", "draft_indexer", "draft_swa")

_injected: Any = None


def use_server_args(server_args: Any) -> None:
    """Take these arguments instead of SGLang's global ones (tests, benchmarks, other processes). None: SGLang's."""
    global _injected
    _injected = server_args


def server_args() -> Any:
    """SGLang's arguments in this process, or None where none were published."""
    if _injected is not None:
        return _injected
    try:
        from sglang.srt.runtime_context import get_context

        context = get_context()
        # From 0.5.21 on the published object is what the user gave; what is in effect is beside it.
        resolved = getattr(context, "resolved_server_args_dict", None)
        return SimpleNamespace(**resolved()) if resolved is not None else context.server_args
    except Exception:  # not published, or this version keeps them elsewhere
        pass
    try:
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
    except Exception:
        return None


@dataclass(frozen=True)
class ModelIdentity:
    """model: sha256 of the resolved configuration. weights: fingerprint. quantisation: as resolved.

    path: the model's folder, "" where only the configuration file told us who we are.
    """

    model: str
    weights: str
    quantisation: str
    path: str = ""


def identify(config: Config, args: Any) -> ModelIdentity:
    """The identity of the model that `args` (SGLang's ServerArgs or None) and our configuration describe.

    Raises ConfigError, naming `model.path` and `model.revision`, when it cannot be told.
    """
    named = config.model.path or str(getattr(args, "model_path", "") or "")
    revision = config.model.revision
    path = locate(named, getattr(args, "revision", None), getattr(args, "download_dir", None)) if named else None
    if path is None and not revision:
        raise ConfigError(
            f"model.path = {config.model.path!r}: cannot tell which model this is "
            f"(SGLang's model path is {named!r}, no local folder and not in the Hugging Face cache). "
            "Fix: set `model.path` to the model's folder, or `model.revision` to a name for these weights"
        )
    facts: dict[str, Any] = {
        name: value for name in _NUMERIC_ARGUMENTS if (value := getattr(args, name, None)) not in _UNSET
    }
    try:
        # A configured revision replaces the fingerprint of the weight files; the config still comes from the folder.
        facts["model"] = fingerprint.model_config(path) if path is not None else {"revision": revision, "name": named}
    except (OSError, ValueError) as error:
        if not revision:
            raise ConfigError(
                f"model.path = {str(path)!r}: its config.json cannot be read: {error}. "
                "Fix: set `model.path` to the model's folder, or `model.revision` to a name for this model"
            ) from error
        facts["model"] = {"revision": revision, "name": named}
    draft = _draft_identity(args)
    if draft:
        facts["draft"] = draft
    weights = f"revision:{revision}" if revision else weights_of(path, args)
    quantisation = str(getattr(args, "quantization", None) or "") + "/" + str(getattr(args, "kv_cache_dtype", "") or "")
    return ModelIdentity(fingerprint.digest(facts), weights, quantisation, str(path or ""))


def weights_of(path: Path | None, args: Any, load_format: str | None = None) -> str:
    """The weights' fingerprint: snapshot commit, else the files; for dummy weights the load format and its seed."""
    chosen = load_format or str(getattr(args, "load_format", "auto") or "auto")
    if chosen == "dummy":
        # SGLang fills dummy weights from a constant of its own, whatever --random-seed says; the layout of the
        # parameters (and so the model's config) is part of the identity anyway.
        return f"dummy:{_dummy_seed()}"
    if path is None:
        raise ConfigError("model.revision: the model has no local files. Fix: set `model.revision`")
    return fingerprint.weights_of(path)


def _dummy_seed() -> int:
    try:
        import inspect

        from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

        return int(inspect.signature(initialize_dummy_weights).parameters["seed"].default)
    except Exception:
        return 0


def _draft_identity(args: Any) -> Any:
    """A draft model's layers may lie in the same host pool: its identity counts as well."""
    named = getattr(args, "speculative_draft_model_path", None)
    if not named:
        return None
    path = locate(str(named), getattr(args, "speculative_draft_model_revision", None))
    if path is None:
        return {"name": str(named)}
    return {
        "config": fingerprint.model_config(path),
        "weights": fingerprint.snapshot_commit(path) or fingerprint.weights(fingerprint.weight_files(path)),
    }


def startup_adapters(args: Any) -> str:
    """Digest of the LoRA adapters given at start, by content; "" where there are none.

    Their ids are made from name and path, so a changed adapter at the same path would keep its page keys: its content
    must count here. Adapters loaded later get ids of this run only.
    """
    refs = getattr(args, "lora_paths", None)
    if not refs:
        return ""
    values: Iterable[Any] = refs.values() if isinstance(refs, dict) else refs
    contents = []
    for ref in values:
        path = str(getattr(ref, "lora_path", None) or (ref.get("lora_path") if isinstance(ref, dict) else ref))
        name = str(getattr(ref, "lora_name", None) or path)
        contents.append([name, path, adapter_content(path)])
    return fingerprint.digest(sorted(contents))


def shard(storage_config: Any, replicated: bool) -> Shard:
    """This rank's part. DP ranks are equals: they hold the same shard of different requests."""
    tp = (0, 1) if replicated else (int(storage_config.tp_rank), int(storage_config.tp_size))
    return Shard(
        tp_rank=tp[0],
        tp_size=tp[1],
        pp_rank=int(storage_config.pp_rank),
        pp_size=int(storage_config.pp_size),
        cp_rank=int(getattr(storage_config, "attn_cp_rank", 0)),
        cp_size=int(getattr(storage_config, "attn_cp_size", 1)),
        dcp_rank=int(getattr(storage_config, "dcp_rank", 0)),
        dcp_size=int(getattr(storage_config, "dcp_size", 1)),
    )


def is_replicated(storage_config: Any, pool_name: str, host_pool: Any) -> bool:
    """Whether every tp rank holds the same bytes of this pool. In doubt no: that costs reuse, never truth."""
    if not getattr(storage_config, "is_mla_model", False):
        return False
    classes = {base.__name__ for base in type(host_pool).__mro__}
    # An MHA draft on an MLA target, and recurrent state, are split over tp even though the target's KV is not.
    if any("MHA" in name or "Mamba" in name for name in classes):
        return False
    return pool_name in _REPLICATED_POOLS or pool_name.startswith("deepseek_v4")


def namespace(
    config: Config, model: ModelIdentity, storage_config: Any, pool_name: str, host_pool: Any, layout: PageLayout,
    lora: str = "",
) -> Namespace:  # fmt: skip
    """The namespace of one pool of this process."""
    return Namespace(
        model=model.model,
        weights=model.weights,
        layout=layout,
        shard=shard(storage_config, is_replicated(storage_config, pool_name, host_pool)),
        quantisation=model.quantisation,
        salt=config.salt,
        lora=lora,
        pool=pool_name,
        tag=TAG,
    )

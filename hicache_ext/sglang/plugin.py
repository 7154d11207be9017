"""The plugin: what SGLang's entry point `sglang.srt.plugins` runs in every process, and the hooks it places.

Belongs here: which function of SGLang is hooked, why, and the check that each hook is really in place (SGLang logs a
plugin's errors and goes on). Does not belong here: what a hook's effect means (weights, tokens, seeds, backend).

Nothing is imported until `register` runs; after it SGLang applies the hooks.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hicache_ext.sglang import versions

logger = logging.getLogger(__name__)

NAME = "hicache_ext"
MODULE, CLASS = "hicache_ext.sglang.backend", "HiCacheExtStorage"

_CONTROLLER = "sglang.srt.managers.cache_controller.HiCacheController"
_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_UNIFIED = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_PUBLISHER = "sglang.srt.managers.scheduler_components.kv_events_publisher.SchedulerKvEventsPublisher"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_ALLOCATE = "sglang.srt.mem_cache.pool_host.common.HostTensorAllocator.allocate"
_DECODE_OFFLOAD = "sglang.srt.disaggregation.decode_kvcache_offload_manager.DecodeKVCacheOffloadManager"


@dataclass
class _Hook:
    target: str
    function: Callable[..., Any]
    kind: str  # a name of SGLang's HookType
    why: str


@dataclass
class _State:
    registered: bool = False
    hooks: list[_Hook] = field(default_factory=list)


_state = _State()


def register() -> None:
    """Place the hooks. Called by SGLang, once per process; what it raises SGLang would only log."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    try:
        versions.check(versions.installed())
    except versions.UnsupportedVersion as error:
        # One line, no hooks: the server runs as if we were not installed, and an attach refuses with the same line.
        logger.error("%s", error)
        return
    _state.registered = True
    _state.hooks = _wanted()
    for hook in _state.hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])


def verify(_adapter: Any = None) -> bool:
    """Whether the plugin is active. Raises RuntimeError, one line, when it is but a hook is missing."""
    if not _state.registered:
        return False
    missing = [hook for hook in _state.hooks if not _in_place(hook)]
    if missing:
        raise RuntimeError(
            f"hicache_ext: SGLang {versions.installed()} did not apply the plugin's hook on {missing[0].target} "
            f"({missing[0].why}){f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. "
            "Fix: look for 'Failed to apply hooks' in SGLang's log; another plugin may replace the same function"
        )
    return True


def maps_adapters() -> bool:
    """Whether page hashes name LoRA adapters by content, so that the namespace need not."""
    from hicache_ext.sglang import seeds

    return any(hook.target == seeds.LOAD_ADAPTER for hook in _state.hooks)


def _wanted() -> list[_Hook]:
    """Every hook that this version of SGLang needs."""
    from hicache_ext.sglang import host_memory, seeds, tokens, weights

    hooks = [
        _Hook(
            "sglang.srt.server_args.ServerArgs.add_cli_args", _widen_choices, "AFTER", "the name on the command line"
        ),
        _Hook(f"{_CONTROLLER}.attach_storage_backend", _attach, "AROUND", "the name of the storage backend"),
        _Hook(f"{_CONTROLLER}.write_storage", _note_tokens, "BEFORE", "token ids of stored pages"),
        _Hook(f"{_CONTROLLER}._storage_hit_query", _asks, "AROUND", "token ids of looked-up pages"),
        _Hook(f"{_HYBRID}._storage_hit_query", _asks, "AROUND", "token ids of looked-up pages"),
        _Hook(f"{_CONTROLLER}.reset", _flushed, "AFTER", "flushes after weight updates"),
        _Hook(f"{_HYBRID}.write_storage", _note_tokens, "BEFORE", "token ids of stored pages"),
        _Hook(f"{_HYBRID}.parse_storage_backend_extra_config", _pass_prefix_keys, "AFTER", "parents of pages"),
        _Hook(f"{_PUBLISHER}.init_kv_events", _publishes, "AFTER", "KV events"),
        _Hook(_ALLOCATE, host_memory.around_allocate, "AROUND", "huge pages for the host pool"),
        _Hook(f"{_MANAGER}.release_memory_occupation", _memory_released, "BEFORE", "weights that are given away"),
    ]
    if multiprocessing.parent_process() is None or _ENGINE.rsplit(".", 1)[0] in sys.modules:
        # A launcher. Its children are spared the import.
        hooks.append(_Hook(f"{_ENGINE}._launch_subprocesses", weights.new_run, "BEFORE", "the name of this run"))
    if _exists(f"{_UNIFIED}.write_backup_storage"):
        hooks.append(_Hook(f"{_UNIFIED}.write_backup_storage", tokens.around_backup, "AROUND", "salts of stored pages"))
    if _exists(f"{_HYBRID}.should_backup"):
        hooks.append(_Hook(f"{_HYBRID}.should_backup", _should_backup, "AFTER", "pools that are split over tp"))
    if _exists(f"{_MANAGER}.end_weight_update"):
        hooks.append(_Hook(f"{_MANAGER}.end_weight_update", _session_ended, "AFTER", "the end of weight updates"))
    for tree in ("hiradix_cache.HiRadixCache", "hi_mamba_radix_cache.HiMambaRadixCache"):
        target = f"sglang.srt.mem_cache.{tree}"
        if _exists(target):
            parse, attach = f"{target}._parse_storage_backend_extra_config", f"{target}.attach_storage_backend"
            hooks.append(_Hook(parse, _pass_prefix_keys, "AFTER", "parents of pages"))
            hooks.append(_Hook(attach, _fill_hashes, "BEFORE", "hashes of what is cached already"))
    if _exists(f"{_MANAGER}.check_weights"):
        hooks.append(_Hook(f"{_MANAGER}.check_weights", _weights_checked, "BEFORE", "weights that are reset"))
    updater = pkgutil.resolve_name(weights.UPDATER)
    for name, function in weights.hooks(updater).items():
        hooks.append(_Hook(f"{weights.UPDATER}.{name}", function, "AROUND", "weight updates"))
    if not _exists(seeds.SEED):
        # 0.5.17: page hashes of token ids alone. Salts and LoRA must be in them.
        hooks.append(_Hook(seeds.HASH, seeds.around_hash, "AROUND", "salts and LoRA in page hashes"))
        hooks.append(
            _Hook(f"{_DECODE_OFFLOAD}._trigger_backup", seeds.before_trigger_backup, "BEFORE", "salts and LoRA")
        )
        hooks.append(_Hook(seeds.LOAD_ADAPTER, seeds.after_load_adapter, "AFTER", "LoRA adapters by content"))
    return hooks


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def _in_place(hook: _Hook) -> bool:
    """Whether our function is in the chain of wrappers around the target."""
    try:
        function = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return False
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook.function for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


# --- the hooks


def _harmless(hook: Callable[..., Any]) -> Callable[..., Any]:
    """For hooks that only add something: what they raise is logged, and SGLang goes on as without them."""

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:
            logger.warning("hicache_ext: the hook %s failed", hook.__name__, exc_info=True)
            return None

    return guarded


@_harmless
def _widen_choices(_result: Any, parser: Any) -> None:
    for action in parser._actions:
        if action.dest == "hicache_storage_backend" and action.choices is not None and NAME not in action.choices:
            action.choices = [*action.choices, NAME]


def _attach(original: Callable[..., Any], controller: Any, *args: Any, **kwargs: Any) -> Any:
    """`hicache_ext` becomes `dynamic` with our module and class, on the zero-copy interface."""
    ours = (args[0] if args else kwargs.get("storage_backend")) == NAME
    if not ours:
        return original(controller, *args, **kwargs)
    names = ("storage_backend", "prefetch_threshold", "model_name", "storage_backend_extra_config")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    kwargs["storage_backend"] = "dynamic"
    kwargs["storage_backend_extra_config"] = {
        **(kwargs.get("storage_backend_extra_config") or {}),
        "backend_name": NAME,
        "module_path": MODULE,
        "class_name": CLASS,
        "interface_v1": 1,
    }
    result = original(controller, **kwargs)
    # So that attaching the same name again is understood as the same backend.
    controller.storage_backend_type = NAME
    return result


def _adapter_of(controller: Any) -> Any:
    """Our adapter behind a controller, also behind SGLang's own fault injector; None where there is none."""
    backend = getattr(controller, "storage_backend", None)
    backend = getattr(backend, "_backend", backend)
    return backend if type(backend).__name__ == CLASS else None


@_harmless
def _note_tokens(
    controller: Any, host_indices: Any, token_ids: Any, hash_value: Any = None, prefix_keys: Any = None, *_: Any,
    **__: Any,
) -> None:  # fmt: skip
    """Constant work per 128 pages: this is the scheduler thread."""
    from hicache_ext.sglang.tokens import space_of

    adapter = _adapter_of(controller)
    if adapter is not None and hash_value and not getattr(controller, "backup_skip", False):
        adapter.tokens.note(hash_value, token_ids, controller.page_size, prefix_keys, space_of(token_ids))


def _asks(original: Callable[..., Any], controller: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    """In the prefetch thread: a backend that shares pages with other engines must know what is looked up."""
    adapter = _adapter_of(controller)
    chains = None if adapter is None else adapter.chains
    if chains is None:
        return original(controller, operation, *args, **kwargs)
    with chains.asking(operation.token_ids, operation.last_hash):
        return original(controller, operation, *args, **kwargs)


@_harmless
def _publishes(_result: Any, publisher: Any, *_: Any, **__: Any) -> None:
    from hicache_ext.sglang.announcing import EVENTS

    EVENTS.publishes(publisher)


def _flushed(_result: Any, *_: Any, **__: Any) -> None:
    from hicache_ext.sglang import weights

    weights.STATE.flushed()


@_harmless
def _pass_prefix_keys(result: Any, *_: Any, **__: Any) -> Any:
    """The last of the parsed values says whether a call gets its pages' ancestors. Only for our own backend."""
    extra = result[0] if isinstance(result, tuple) and result else None
    if not isinstance(extra, dict) or not isinstance(result[-1], bool):
        return None
    if "tiers" in extra or extra.get("module_path") == MODULE:
        return (*result[:-1], True)
    return None


def _fill_hashes(tree: Any, *_: Any, **__: Any) -> None:
    """Before storage is attached to a tree that grew without: hash its nodes, parents first (see unplugged)."""
    from sglang.srt.mem_cache.utils import compute_node_hash_values

    waiting = list(tree.root_node.children.values())
    while waiting:
        node = waiting.pop()
        if node.hash_value is None:
            node.hash_value = compute_node_hash_values(node, tree.page_size)
        waiting.extend(node.children.values())


@_harmless
def _should_backup(result: Any, controller: Any, transfer: Any) -> Any:
    """Pools that are split over tp must be written by every rank, not by rank 0 alone as the model's KV is."""
    adapter = _adapter_of(controller)
    if adapter is None or result:
        return None
    return adapter.is_own_shard(str(transfer.name)) or None


def _session_ended(_result: Any, manager: Any, *_: Any, **__: Any) -> None:
    """The session of updates is over. With nothing in the tree no page of older weights can be left."""
    from hicache_ext.sglang import weights

    try:
        tree = manager.scheduler.tree_cache
        if manager.is_fully_idle() and not tree.root_node.children:
            weights.STATE.flushed()
    except Exception as error:
        logger.debug("cannot tell whether the cache is empty (%r): the next flush will do", error)


def _memory_released(manager: Any, request: Any, *_: Any, **__: Any) -> None:
    """Weights that are given away come back as whatever is loaded next, unless SGLang keeps a copy."""
    from hicache_ext.sglang import identity, weights

    tags = getattr(request, "tags", None)
    if (not tags or "weights" in tags) and not getattr(identity.server_args(), "enable_weights_cpu_backup", False):
        weights.STATE.invalidate("weights released")


def _weights_checked(_manager: Any, request: Any, *_: Any, **__: Any) -> None:
    """SGLang's weight checker can overwrite the weights, to see whether an update restores them."""
    from hicache_ext.sglang import weights

    if getattr(request, "action", "") == "reset_tensors":
        weights.STATE.invalidate("weights reset")

"""Attaching without the plugin, or while the server runs: what is refused, what is said, what is watched instead.

Belongs here: the checks that keep pages true where no hook of ours is in place. Does not belong here: hooks (plugin).
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from hicache_ext.config import Config, ConfigError
from hicache_ext.sglang import weights

logger = logging.getLogger(__name__)


def prepare(config: Config, args: Any) -> None:
    """The stock route: say once what it cannot do, watch the weights, refuse (ConfigError) where it would be a lie."""
    seeded = _has("sglang.srt.mem_cache.utils", "storage_namespace_seed")
    lora = bool(getattr(args, "enable_lora", False) or getattr(args, "lora_paths", None))
    if lora and not seeded:
        raise ConfigError(
            "hicache_ext: LoRA is on, and this SGLang's page hashes do not tell adapters apart. "
            "Fix: let SGLang load the hicache_ext plugin (check SGLANG_PLUGINS), or turn LoRA off"
        )
    missing = "KV events of the storage tiers, token ids in stored pages, parents of pages"
    if not seeded:
        missing += "; CACHE SALTS ARE NOT ISOLATED in stored pages (this SGLang hashes token ids only)"
    logger.warning(
        "hicache_ext runs without its plugin. Not available: %s. A weight update detaches the tiers", missing
    )
    if weights.STATE.frozen:
        raise ConfigError(
            "hicache_ext: the weights were updated while its plugin was not loaded, so the cache may hold pages of "
            "the old ones. Fix: restart SGLang, with the plugin"
        )
    weights.watch_without_plugin()
    if weights.STATE.override is None and not config.model.revision and not attached_at_start():
        # Nothing watched the weights until now. They may be others than the files say.
        weights.STATE.separate()
        logger.warning(
            "hicache_ext was attached at run time without its plugin: earlier weight updates cannot be excluded, "
            "so this run's pages are kept apart. Fix: load the plugin, or set `model.revision`"
        )


def check_chains(with_plugin: bool) -> None:
    """Refuse (ConfigError) where page hashes may begin in the middle of a sequence.

    A tree that grew without storage has no page hashes. SGLang fills them in when storage is attached, from some
    version on; before that, a page below such a node would be stored, and looked up, as if it began a sequence: under
    the name of another sequence's page. The plugin fills them in itself.
    """
    fills = "sglang.srt.mem_cache.unified_cache.unified_tree_core", "UnifiedTreeCore.backfill_missing_hash_values"
    if not with_plugin and not attached_at_start() and not _has(*fills):
        raise ConfigError(
            "hicache_ext: attached at run time, and this SGLang does not hash what its cache already holds: pages "
            "could be mistaken for others. Fix: let SGLang load the hicache_ext plugin, or attach at start"
        )


def attached_at_start() -> bool:
    """Whether a controller's constructor is attaching us, so before anything was cached or any weight was changed."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and any(
            base.__name__ == "HiCacheController" for base in type(frame.f_locals.get("self")).__mro__
        ):
            return True
        frame = frame.f_back
    return False


def _has(module: str, name: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True

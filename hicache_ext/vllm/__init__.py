"""vLLM's adapter: `--kv-transfer-config` with kv_connector HiCacheConnector, kv_connector_module_path hicache_ext.vllm.

The connector imports vLLM, so it is imported when it is asked for.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "HiCacheConnector":
        from hicache_ext.vllm.connector import HiCacheConnector

        return HiCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

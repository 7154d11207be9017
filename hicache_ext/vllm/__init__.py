"""vLLM's adapter: `--kv-transfer-config` with kv_connector HiCacheConnector, kv_connector_module_path hicache_ext.vllm.

Importing this package imports vLLM, for its base class.
"""

from hicache_ext.vllm.connector import HiCacheConnector

__all__ = ["HiCacheConnector"]

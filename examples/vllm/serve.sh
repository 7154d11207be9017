#!/bin/bash
# vllm serve with our tiers below its prefix cache:  serve.sh MODEL [options of vllm serve]
set -euo pipefail
config=${HICACHE_CONFIG:-$(dirname "$(realpath "$0")")/hicache.yaml}
exec vllm serve "$@" --kv-transfer-config '{
  "kv_connector": "HiCacheConnector",
  "kv_connector_module_path": "hicache_ext.vllm",
  "kv_role": "'"${KV_ROLE:-kv_both}"'",
  "kv_load_failure_policy": "recompute",
  "kv_connector_extra_config": {"config": "'"$config"'"}
}'

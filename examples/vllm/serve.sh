#!/bin/bash
# vllm serve with our tiers below its prefix cache:  serve.sh MODEL [options of vllm serve]
#   HICACHE_CONFIG           the tiers (hicache.yaml beside this script)
#   KV_ROLE                  kv_both (default), kv_producer stores only, kv_consumer loads only
#   KV_EVENTS, KV_REPLAY     ZMQ endpoints of KV events for a router, e.g. ipc:///run/kv-events and ipc:///run/kv-replay
set -euo pipefail
config=$(realpath "${HICACHE_CONFIG:-$(dirname "$(realpath "$0")")/hicache.yaml}")
events=()
if [ -n "${KV_EVENTS:-}" ]; then
  events=(--kv-events-config '{
    "enable_kv_cache_events": true, "publisher": "zmq",
    "endpoint": "'"$KV_EVENTS"'", "replay_endpoint": "'"${KV_REPLAY:?beside KV_EVENTS}"'"
  }')
fi
exec vllm serve "$@" "${events[@]}" --kv-transfer-config '{
  "kv_connector": "HiCacheConnector",
  "kv_connector_module_path": "hicache_ext.vllm",
  "kv_role": "'"${KV_ROLE:-kv_both}"'",
  "kv_load_failure_policy": "recompute",
  "kv_connector_extra_config": {"config": "'"$config"'"}
}'

#!/bin/bash
# A prefill engine and a decode engine over one store that both reach (here a Redis server):  disaggregated.sh MODEL
# Send a prompt with max_tokens=1 to port 8100, then the request itself to port 8200: its prefix comes from the store.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
config=$(mktemp --suffix .yaml)
echo "tiers: [{type: redis, url: '${REDIS:-redis://127.0.0.1:6379/0}'}]" > "$config"
trap 'kill $(jobs -p) 2>/dev/null; rm -f "$config"' EXIT
export HICACHE_CONFIG=$config
KV_ROLE=kv_producer "$here/serve.sh" "$@" --host 127.0.0.1 --port 8100 &
KV_ROLE=kv_consumer "$here/serve.sh" "$@" --host 127.0.0.1 --port 8200 &
wait

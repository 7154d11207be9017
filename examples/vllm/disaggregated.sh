#!/bin/bash
# A prefill engine and a decode engine over one store that both reach:  disaggregated.sh MODEL [options of vllm serve]
# Send a prompt with max_tokens=1 to the first, then the request itself to the second: its prefix comes from the store.
#   REDIS                        the store (redis://127.0.0.1:6379/0); or HICACHE_CONFIG, any tiers that both can reach
#   PREFILL_PORT, DECODE_PORT    8100 and 8200, on the loopback
#   KV_EVENTS, KV_REPLAY         of the prefill engine, as for serve.sh
set -euo pipefail
here=$(dirname "$(realpath "$0")")
own=$(mktemp --suffix .yaml)
echo "tiers: [{type: redis, url: '${REDIS:-redis://127.0.0.1:6379/0}'}]" > "$own"
export HICACHE_CONFIG=${HICACHE_CONFIG:-$own}
# Whichever ends first takes the other one with it.
trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait; rm -f "$own"' EXIT
trap 'exit 143' TERM INT
KV_ROLE=kv_producer "$here/serve.sh" "$@" --host 127.0.0.1 --port "${PREFILL_PORT:-8100}" &
KV_EVENTS='' KV_ROLE=kv_consumer "$here/serve.sh" "$@" --host 127.0.0.1 --port "${DECODE_PORT:-8200}" &
wait -n

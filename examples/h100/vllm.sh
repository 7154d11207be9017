#!/bin/bash
# vLLM on one GPU with our connector: right or wrong, times beside vLLM's OffloadingConnector and LMCache, and pages that
# SGLang and vLLM read of each other. About 4 minutes with 16 processors.
#
#     vllm.sh RESULTS            all that the environments below can run; a table at the end, files in RESULTS
#
# VLLM: the command that starts a python with vLLM 0.25 or later and hicache-ext. SGLANG: one with SGLang 0.5.17 and
# hicache-ext; empty: no exchange. WORK: a folder for models (a GB). FAST: a folder on a fast disk, or in memory as by
# default: /dev/shm, 30 GB. LMCACHE=0: without it. ATTENTION: vLLM's attention backend, its own choice by default.
# ARGUMENTS, SGLANG_ARGUMENTS: JSON of further arguments of the engines.
set -uo pipefail
results=$(realpath -m "$1") work=${WORK:-/tmp/bench-vllm} here=$(dirname "$(realpath "$0")")
vllm=${VLLM:-python3} sglang=${SGLANG:-}
export FAST=${FAST:-/dev/shm} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
rm -rf "$work" "$FAST/hicache-vllm"
mkdir -p "$results" "$work" "$FAST/hicache-vllm"
begun=$SECONDS
say() { echo "[$((SECONDS - begun)) s] $*"; }
limit=${LIMIT:-330}
left() { local rest=$((limit - (SECONDS - begun))); echo $((rest > $1 ? $1 : rest > 1 ? rest : 1)); }

declare -A pid
start() { # ROLE...: build these engines, side by side
  for role in "$@"; do
    timeout -k 5 "$(left 300)" $vllm "$here/vllm_engine.py" "$role" "$work" > "$results/$role.log" 2>&1 &
    pid[$role]=$!
  done
}
await() { # FILE ROLE SECONDS: until it is there, the role's process has ended, or so long
  local until=$((SECONDS + $(left "$3")))
  while [ ! -f "$1" ] && kill -0 "${pid[$2]}" 2> /dev/null && [ $SECONDS -lt $until ]; do sleep 0.1; done
  [ -f "$1" ] || { say "$2: NOT: $(tail -n 2 "$results/$2.log" | tr '\n' ' ')"; return 1; }
}
ready() { # SECONDS ROLE...: until these are up
  local seconds=$1 role; shift
  for role in "$@"; do await "$work/ready.$role" "$role" "$seconds" && say "$role is up"; done
}
go() { # ROLE SECONDS: its turn, and wait for its end
  touch "$work/go.$1"
  await "$work/$1.json" "$1" "$2" && say "$1 is done"
}
share() { # PHASE SECONDS: SGLang's half
  [ -n "$sglang" ] || return 0
  timeout -k 5 "$(left "$2")" $sglang "$here/share_sglang.py" "$1" "$work" > "$results/sglang-$1.log" 2>&1
  [ -f "$work/sglang-$1.json" ] && say "sglang $1 done" || say "sglang $1 NOT done: $(tail -n 2 "$results/sglang-$1.log" | tr '\n' ' ')"
}
tables() { python3 "$here/vllm_report.py" "$work" "$results/vllm.json" | tee "$results/vllm.txt"; }

timeout 60 $vllm "$here/vllm_engine.py" models "$work" || exit 1
say "models are there"
small=(small-plain small-first small-second small-share)
start "${small[@]}" large-plain large-ours large-offloading
share alone 120 & alone=$!
share first 120 & first=$!
ready 120 "${small[@]}"
wait $alone $first
for role in small-plain small-first small-second; do go $role 25; done
go small-share 25
share second 100 & second=$!
wait $second
ready 30 large-plain large-ours large-offloading
go large-plain 40
go large-ours 70
go large-offloading 45
start large-local
[ "${LMCACHE:-1}" = 1 ] && start large-lmcache
ready 75 large-local
go large-local 25
if [ "${LMCACHE:-1}" = 1 ]; then
  ready 30 large-lmcache
  go large-lmcache 45
fi
kill "${pid[@]}" 2> /dev/null
wait
rm -rf "$FAST/hicache-vllm"
tables
say "all done"

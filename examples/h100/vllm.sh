#!/bin/bash
# vLLM on one GPU with our connector: right or wrong, times beside vLLM's OffloadingConnector and LMCache, and pages that
# SGLang and vLLM read of each other. About 5 minutes with 16 processors.
#
#     vllm.sh RESULTS [all|own|exchange]      own: without SGLang. exchange: the pages that are shared, and no times.
#
# VLLM: the command that starts a python with vLLM 0.25 or later and hicache-ext. SGLANG: one with SGLang 0.5.17 and
# hicache-ext. WORK: a folder for models. FAST: a folder on a fast disk, or in memory as by default: /dev/shm, 24 GB.
# LMCACHE=0: without it. DECODE=0: without what a token costs. ATTENTION: vLLM's attention backend, its own choice by
# default (and TRITON_ATTN if that fails).
# ARGUMENTS, SGLANG_ARGUMENTS: JSON of further arguments of the engines.
set -uo pipefail
results=$(realpath -m "$1") part=${2:-all} work=${WORK:-/tmp/bench-vllm} here=$(dirname "$(realpath "$0")")
vllm=${VLLM:-python3} sglang=${SGLANG:-python3}
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
  [ -f "$1" ] || { say "$2: NOT: $(grep -E '^(\[rank0\]: )?[A-Za-z_.]*(Error|Exception)\b' "$results/$2.log" | tail -n 2)"; return 1; }
}
first() { # the first engine, with one set of variables after the other, until it is up; the others use what worked
  local variables
  for variables in "{}" '{"ATTENTION": "TRITON_ATTN"}' '{"VLLM_USE_V2_MODEL_RUNNER": "0"}' \
    '{"ATTENTION": "TRITON_ATTN", "VLLM_USE_V2_MODEL_RUNNER": "0"}'; do
    echo "$variables" > "$work/try"
    start small-plain
    if await "$work/ready.small-plain" small-plain 75; then
      say "small-plain is up with $variables"
      mv "$work/try" "$work/start"
      return 0
    fi
    kill "${pid[small-plain]}" 2> /dev/null
    grep -v "^\[W" "$results/small-plain.log" | tail -n 30
    mv "$results/small-plain.log" "$results/small-plain.failed-$((++failed)).log"
    [ "$(left 60)" -ge 40 ] || return 1
  done
  return 1
}
ready() { # SECONDS ROLE...: until these are up
  local seconds=$1 role; shift
  for role in "$@"; do
    if await "$work/ready.$role" "$role" "$seconds"; then say "$role is up"; up+=("$role"); fi
  done
}
go() { # ROLE SECONDS: its turn, and wait for its end
  [[ " ${up[*]} " == *" $1 "* ]] || return 1
  touch "$work/go.$1"
  await "$work/$1.json" "$1" "$2" && say "$1 is done"
}
share() { # PHASE SECONDS: SGLang's half
  timeout -k 5 "$(left "$2")" $sglang "$here/share_sglang.py" "$1" "$work" > "$results/sglang-$1.log" 2>&1
  [ -f "$work/sglang-$1.json" ] && say "sglang $1 done" || say "sglang $1 NOT done: $(tail -n 2 "$results/sglang-$1.log" | tr '\n' ' ')"
}
tables() { python3 "$here/vllm_report.py" "$work" "$results/vllm.json" | tee "$results/vllm.txt"; }

timeout 60 $vllm "$here/vllm_engine.py" models "$work" || exit 1
say "models are there"
case $part in
all) small=(small-first small-second small-memory small-share) ;;
own) small=(small-first small-second small-memory) ;;
exchange) small=(small-share) ;;
*) echo "no part is called $part: all, own, exchange" >&2; exit 2 ;;
esac
large=(large-plain large-ours large-local large-offloading)
[ "${LMCACHE:-1}" = 1 ] && large+=(large-lmcache)
[ "$part" = exchange ] && large=()
up=(small-plain) failed=0
start "${small[@]}" "${large[@]}"
if [ "$part" != own ]; then
  share alone 150 & alone=$!
  share first 150 & sglang_first=$!
  share second 300 & second=$!
fi
if ! first; then
  say "vLLM does not start"
  touch "$work/go.sglang-second"
  kill "${pid[@]}" 2> /dev/null
  exit 3
fi
ready 90 "${small[@]}"
[ "$part" = own ] || wait $alone $sglang_first
for role in small-plain "${small[@]}"; do go "$role" 25; done
if [ "$part" != own ]; then
  touch "$work/go.sglang-second"
  wait $second
fi
ready 60 "${large[@]}"
for role in "${large[@]}"; do go "$role" 60; done
tables
say "all done"
kill "${pid[@]}" 2> /dev/null
wait
rm -rf "$FAST/hicache-vllm"

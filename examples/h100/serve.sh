#!/bin/bash
# SGLang on one GPU over HTTP, the same prompts for each subject, one table (`hicache-ext bench serve`).
#
#     serve.sh RESULTS disk     our tier on the disk, SGLang's own `file`, and its `nixl` where that is installed: 8 minutes
#     serve.sh RESULTS ram      our tier under /dev/shm: 2 minutes
#     serve.sh RESULTS quick    two short prompts and our tier alone: does it run here
#
# SUBJECTS="stock-nixl" takes other subjects than the matrix', LENGTHS="8192" other prompts, NAME=... another name of the
# results than serve-MATRIX.
#
# Llama-3.1-8B's shape with dummy weights, pages of 64 tokens (8 MiB). Between filling and reading the server is
# restarted and the page cache dropped (as root). Needs SGLang with its HTTP server and hicache-ext in one environment,
# and 60 GB of disk under WORK. Memory under /dev/shm stands in for a fast array of disks: the result says so.
set -euo pipefail
results=$(realpath -m "$1") matrix=${2:-disk} work=${WORK:-/tmp/bench-serve} python=${PYTHON:-python3}
mkdir -p "$results" "$work/model"

cat > "$work/model/config.json" <<'J'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "bos_token_id": 128000,
 "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": false,
 "max_position_embeddings": 131072, "mlp_bias": false, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
 "torch_dtype": "bfloat16", "vocab_size": 128256}
J

# Device memory holds a little more than the longest prompt, so that pushing it out is cheap; the host all
# prompts and what pushes them out.
flags="--model-path $work/model --load-format dummy --skip-tokenizer-init --random-seed 1 --dtype bfloat16
 --attention-backend ${ATTENTION:-fa3} --sampling-backend pytorch --grammar-backend none --page-size 64
 --max-total-tokens 69632 --context-length 67584 --mem-fraction-static 0.6 --chunked-prefill-size 8192
 --max-running-requests 8 --enable-cache-report --disable-prefill-cuda-graph --disable-decode-cuda-graph
 --hicache-ratio 2.8 --hicache-io-backend kernel --hicache-mem-layout page_first
 --hicache-write-policy write_through --watchdog-timeout 900 ${FLAGS:-}"

# What is recomputed is each subject's own `none` row: prompts that nothing has cached.
lengths=(--length 8192 --length 32768 --length 65536)
case $matrix in
disk)
  subjects=(--subject ours --subject stock-file)
  if $python -c 'import nixl' 2>/dev/null; then subjects+=(--subject stock-nixl); fi ;;
ram) subjects=("--subject=ours-ram=$work/ram.yaml") lengths=(--length 32768 --length 65536) ;;
quick) subjects=(--subject ours) lengths=(--length 2048 --length 8192) ;;
*) echo "no matrix is called $matrix: disk, ram, quick" >&2; exit 2 ;;
esac
if [ -n "${SUBJECTS:-}" ]; then
  subjects=()
  for name in $SUBJECTS; do subjects+=(--subject "$name"); done
fi
if [ -n "${LENGTHS:-}" ]; then
  lengths=()
  for tokens in $LENGTHS; do lengths+=(--length "$tokens"); done
fi
cat > "$work/ram.yaml" <<Y
tiers:
  - {type: local, path: /dev/shm/hicache-bench-serve, capacity: 40GiB}
Y

plot=()
if $python -c 'import matplotlib' 2>/dev/null; then plot=(--plot "$results/${NAME:-serve-$matrix}.png"); fi

$python -m hicache_ext.cli.main bench serve --launch "$flags" "${subjects[@]}" "${lengths[@]}" \
  --tier none --tier device --tier host --tier local --requests "${REQUESTS:-1}" --new-tokens 8 --vocabulary 128000 \
  --dir "$work" --capacity 40GiB --disk "${DISK:-2GiB}" --kv-bytes 131072 --time-limit "${LIMIT:-470}" \
  --json "$results/${NAME:-serve-$matrix}.json" "${plot[@]}" | tee "$results/${NAME:-serve-$matrix}.txt"

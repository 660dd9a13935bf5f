#!/usr/bin/env bash
# PyTorch's times for the training steps that `all.sh bench` measures ours by: run both in one call, on the same card.
#   peers.sh [ROW]...     rows: 8b 8b-200 8b-1024 0.6b smollm2 8b-compile smollm2-compile; all of them by default
# Needs a Python with torch, transformers and peft, and pytorch_step.py beside this file or in tests/bench/peers. One JSON line for
# each mode: `strong` is batched PyTorch in bf16, `compile` the same under torch.compile, `reference` one sample after the other. A row that
# takes longer than its limit (compiling included) is cut off and said so. PEERS_LIMIT=SECONDS sets one limit for all rows.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
step=$here/pytorch_step.py
[ -f "$step" ] || step=$here/../../bench/peers/pytorch_step.py
case "${1:-}" in -*) sed -n '2,6s/^# //p' "$0"; exit 64 ;; esac
[ $# -gt 0 ] || set -- 8b 8b-200 8b-1024 0.6b smollm2 smollm2-compile 8b-compile
# Nothing is to be fetched; the models are random.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

python=$("$here/find-python" torch transformers peft) || exit 1

failed=0

# peer LIMIT ARGUMENT...: one run of pytorch_step.py.
peer() {
    local limit=${PEERS_LIMIT:-$1} status=0
    shift
    timeout -k 5 "$limit" "$python" "$step" --device cuda --hint 64 --rank 32 "$@" 2>peers.log || status=$?
    if [ $status != 0 ]; then
        failed=1
        printf '{"peer": "%s", "failed": "%s"}\n' "$*" "$([ $status = 124 ] && echo "longer than $limit s" || echo "exit status $status")"
        tail -n 3 peers.log >&2
    fi
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
for row in "$@"; do
    case $row in
    8b) peer 90 --model qwen3-8b --batch 4 --prompt 512 --response 512 --mode strong --iters 5 ;;
    8b-200) peer 90 --model qwen3-8b --batch 1 --prompt 200 --response 150 --mode strong --iters 5 ;;
    8b-1024) peer 120 --model qwen3-8b --batch 1 --prompt 512 --response 512 --mode strong,reference --iters 5 ;;
    0.6b) peer 60 --model qwen3-0.6b --batch 4 --prompt 512 --response 512 --mode strong --iters 5 ;;
    smollm2) peer 60 --model smollm2-135m --batch 4 --prompt 128 --response 128 --mode strong --iters 7 ;;
    smollm2-compile) peer 150 --model smollm2-135m --batch 4 --prompt 128 --response 128 --mode compile --iters 7 ;;
    8b-compile) peer 200 --model qwen3-8b --batch 4 --prompt 512 --response 512 --mode compile --iters 5 ;;
    *) printf 'peers.sh: no row "%s"\n' "$row" >&2; failed=1 ;;
    esac
done
exit $failed

#!/usr/bin/env bash
# Everything that a card must show, part by part, in a folder that tests/kernels/cuda/bundle made.
#   all.sh PART[:SECONDS]...     a part is cut off after so many seconds; without them its own limit holds
#     kernels    every kernel against its reference, with times (300)
#     errors     the error of each bfloat16 kernel beside PyTorch's in bfloat16 (120)
#     sm80       the kernels' tests with code for sm_80 alone, compiled by the driver (400); sm80-agree: whole steps (300)
#     steps      test_step* of the CPU's suite on the card (240)
#     agree      whole steps against the CPU back-end (300)
#     bench      the training steps, prefill, decode and cycles of the target table, one JSON line each (500)
#     bench-NAME one group of them: bench-step, bench-many, bench-decode, bench-prefill, bench-cycle (200), and bench-share: what
#                adapters leave of decoding's tokens, with and without by turns, in three pairs (one of 64 adapters)
#     profile    which kernels the time of those steps goes to (300)
#     peers      the same steps in PyTorch (500); peers-ROW: one row of peers.sh
#     sanitize   the kernel tests under memcheck, racecheck and initcheck, a line for each (580); sanitize-TOOL: one of the three;
#                sanitize-NAME: the tests whose names have that (280)
# Output also goes to $OUT/PART.txt if OUT is set; the last line of each part is `PART: passed|FAILED, SECONDS s`. The exit status is
# 0 only if every part passed.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || { sed -n '2,18s/^# //p' "$0"; exit 64; }

paths=$here/lib
for place in /usr/local/cuda/lib64 /usr/local/cuda/targets/*/lib /usr/local/lib/python3*/*-packages/nvidia/*/lib \
    /usr/lib/python3*/*-packages/nvidia/*/lib /opt/*/lib/python3*/site-packages/nvidia/*/lib \
    /opt/*/.venv/lib/python3*/site-packages/nvidia/*/lib /usr/local/nvidia/lib64; do
    if [ -d "$place" ]; then paths=$paths:$place; fi
done
export LD_LIBRARY_PATH=$paths${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

# bench LIMIT VERB ARGUMENT...: one run, which must print its lines; a failure is a line too, and the rest goes on.
bench_failed=0
bench() {
    local limit=$1 verb=$2 status=0 program=("$here/claas-bench")
    shift 2
    if [ "$verb" = cycle ]; then program=("$here/claas" bench); fi
    if [ ! -x "${program[0]}" ]; then
        printf '{"bench": "%s", "skipped": "no %s in this folder"}\n' "$verb" "${program[0]##*/}"
        return
    fi
    timeout -k 5 "$limit" "${program[@]}" "$verb" --device cuda --json "$@" || status=$?
    if [ $status != 0 ]; then
        bench_failed=1
        printf '{"bench": "%s %s", "failed": "exit status %d (124: longer than %d s)"}\n' "$verb" "$*" $status "$limit"
    fi
}

bench_step() {
    bench 60 step --model random:qwen3-8b --batch 4 --prompt 512 --response 512
    bench 60 step --model random:qwen3-8b --batch 1 --prompt 200 --response 150 --iters 15
    bench 60 step --model random:qwen3-8b --batch 1 --prompt 512 --response 512 --iters 15
    bench 40 step --model random:qwen3-0.6b --batch 4 --prompt 512 --response 512 --iters 15
    bench 40 step --model random:smollm2-135m --batch 4 --prompt 128 --response 128 --iters 31
}

# 64 adapters in one step, beside one adapter with the same rows.
bench_many() {
    local adapters
    for adapters in 1 64; do
        bench 100 step --model random:qwen3-1.7b --batch 64 --prompt 200 --response 150 --adapters $adapters --rank 32 --iters 3
        bench 100 step --model random:qwen3-8b --batch 64 --prompt 200 --response 150 --adapters $adapters --rank 8 --iters 3
    done
}

bench_prefill() {
    bench 60 prefill --model random:qwen3-8b --batch 4 --prompt 2048
    bench 60 prefill --model random:qwen3-8b --batch 4 --prompt 2048 --chunk 2048
}

# share ROWS ADAPTERS PAIRS: decoding with adapters and without, by turns, and a line with the median of the pairs' shares.
share() {
    local pair with without iterations=3 shares=() on=(--model random:qwen3-8b --batch "$1" --prompt 512 --tokens 96)
    if [ "$2" -gt 8 ]; then iterations=1; fi
    for ((pair = 0; pair < $3; pair++)); do
        without=$(bench 60 decode "${on[@]}" --iters 3 && exit $bench_failed) || bench_failed=1
        with=$(bench 90 decode "${on[@]}" --iters $iterations --adapters "$2" --rank 32 && exit $bench_failed) || bench_failed=1
        printf '%s\n' "$without" "$with"
        without=$(sed -n 's/.*"tok_s":\([0-9.]*\).*/\1/p' <<<"$without")
        with=$(sed -n 's/.*"tok_s":\([0-9.]*\).*/\1/p' <<<"$with")
        if [ -z "$with" ] || [ -z "$without" ]; then bench_failed=1; return; fi
        shares+=("$(awk -v a="$with" -v b="$without" 'BEGIN { print 100 * a / b }')")
    done
    printf '{"bench": "share", "batch": %d, "adapters": %d, "percent": [%s], "median": %s}\n' "$1" "$2" \
        "$(IFS=, && echo "${shares[*]}")" "$(printf '%s\n' "${shares[@]}" | sort -n | sed -n "$((($3 + 1) / 2))p")"
}

bench_share() {
    share 8 8 3
    share 64 1 3
    share 1 1 3
    share 64 64 1
}

bench_decode() {
    bench 90 decode --model random:qwen3-8b --batch 1,8,64 --prompt 512 --tokens 128
    bench 90 decode --model random:qwen3-8b --batch 8 --prompt 512 --tokens 128 --adapters 8 --rank 32
    bench 60 decode --model random:qwen3-8b --batch 64 --prompt 512 --tokens 128 --adapters 1 --rank 32
    bench 180 decode --model random:qwen3-8b --batch 64 --prompt 512 --tokens 128 --adapters 64 --rank 32
}

bench_cycle() {
    bench 120 cycle --model random:qwen3-8b --steps 8 --rows 16 --tokens 64
    bench 60 cycle --model random:smollm2-135m --steps 8 --rows 16 --tokens 64
}

part_bench() {
    local group
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader || true
    for group in "$@"; do "bench_$group"; done
    return $bench_failed
}

# kernel_times.c's tables, each before its step's line.
part_profile() {
    local library=$here/libkernel_times.so log status=0
    [ -f "$library" ] || { echo "no $library in this folder"; return 1; }
    log=$(mktemp)
    CUDA_INJECTION64_PATH=$library part_bench step 2>&1 | tee "$log" || status=$?
    grep -q '^a step: ' "$log" || { echo "no table: the driver did not load $library"; status=1; }
    rm -f "$log"
    return $status
}

# The arrays go to a folder of their own, which is too large to keep.
part_errors() {
    local python work status=0
    python=$("$here/find-python" torch) || return 1
    work=$(mktemp -d)
    CLAAS_CUDA_CHOICES="" "$here/dump_ops" "$work" || status=$?
    [ $status != 0 ] || "$python" "$here/pytorch_error.py" "$work" || status=$?
    rm -rf "$work"
    return $status
}

# What the driver compiles is kept: the tests hold the same kernels.
part_sm80() {
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-${TMPDIR:-/tmp}/claas-ptx} CLAAS_TEST_NO_TIMES=1
    "$here/run" "$here/sm80$1"
}

# part NAME: what it does.
part() {
    case $1 in
    kernels) "$here/run" "$here" ;;
    # Without timed choices: they differ from one opening to the next, and so do the bits.
    steps) CLAAS_TEST_BACKEND=cuda CLAAS_CUDA_TUNE=0 "$here/run" "$here/steps" "$here/golden" ;;
    agree) "$here/run" "$here/agree" ;;
    bench) part_bench step many prefill decode cycle ;;
    bench-step | bench-many | bench-prefill | bench-decode | bench-share | bench-cycle) part_bench "${1#bench-}" ;;
    profile) part_profile ;;
    peers) "$here/peers.sh" ;;
    peers-*) "$here/peers.sh" "${1#peers-}" ;;
    errors) part_errors ;;
    sm80) part_sm80 "" ;;
    sm80-agree) part_sm80 /agree ;;
    sanitize) "$here/run" --sanitize "$here" ;;
    sanitize-memcheck | sanitize-racecheck | sanitize-initcheck) "$here/run" --sanitize --tool "${1#sanitize-}" "$here" ;;
    sanitize-*) "$here/run" --sanitize --only "${1#sanitize-}" "$here" ;;
    *) printf 'all.sh: no part "%s"\n' "$1" >&2; return 64 ;;
    esac
}

limit_of() {
    case $1 in
    steps) echo 240 ;;
    errors) echo 120 ;;
    sm80) echo 400 ;;
    sanitize) echo 580 ;;
    bench | peers) echo 500 ;;
    bench-*) echo 200 ;;
    sanitize-*) echo 280 ;;
    *) echo 300 ;;
    esac
}

# `all.sh --part NAME` is one part without a limit: what `timeout` starts.
if [ "$1" = --part ]; then part "$2"; exit; fi

failed=0
for wanted in "$@"; do
    name=${wanted%%:*} limit=${wanted#*:} status=0 began=$SECONDS
    [ "$limit" != "$wanted" ] || limit=$(limit_of "$name")
    log=/dev/null
    [ -z "${OUT:-}" ] || log=$OUT/$name.txt
    printf '==== %s (at most %s s)\n' "$name" "$limit"
    timeout -k 10 "$limit" "$0" --part "$name" 2>&1 | tee "$log" || status=$?
    [ $status = 0 ] && verdict=passed || { verdict=FAILED; failed=1; }
    printf '%s: %s, %d s\n' "$name" "$verdict" $((SECONDS - began))
done
exit $failed

#!/usr/bin/env bash
# The whole server on this machine, from what server-bundle made: the loop, the learning checks, chat beside learning, feedback
# to served version, kill -9 (eight servers side by side), memory that ends in the middle, and reading a model's shards (7 GB are
# written, and removed). Each part ends within 2.5 minutes, or --limit seconds, and leaves its lines.
#   server.sh [--device cuda|cpu] [--kills N] [--share X] [--limit S] [PART]...
# PART: loop learn learn3 gap tenants kill9 memory load (all of them by default). --kills: at most so many, as the time
# allows; --share: see out_of_memory.py. Logs of failed parts are printed. The last line is `N passed, N failed`.
set -euo pipefail

device=cuda kills=200 share=0.1 limit_s=150
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 && shift ;;
    --kills) kills=$2 && shift ;;
    --share) share=$2 && shift ;;
    --limit) limit_s=$2 && shift ;;
    -*) sed -n '2,7s/^# //p' "$0"; exit 64 ;;
    *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || set -- loop learn learn3 gap tenants kill9 memory load
here=$(cd "$(dirname "$0")" && pwd)
work=${TMPDIR:-/tmp}/claas-server-$(id -u)
mkdir -p "$work"

# Unpacked and joined once; a bundle that changed replaces what is there.
sum=$(sha256sum <"$here/programs.tar.xz" | cut -d' ' -f1)
if [ ! -f "$work/unpacked" ] || [ "$(cat "$work/unpacked")" != "$sum" ]; then
    rm -rf "$work/programs"
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$here/programs.tar.xz" "$work/programs"
    echo "$sum" >"$work/unpacked"
fi
model=$work/$(cat "$here/model.name")
is_whole() { [ -f "$model" ] && [ "$(sha256sum <"$model" | cut -d' ' -f1)" = "$(cat "$here/model.sha256")" ]; }
if ! is_whole; then
    cat "$here"/../model-*/part-* >"$model"
    is_whole || { echo "server.sh: the model's parts are not all here" >&2; exit 1; }
fi

# Our libraries and then CUDA's, wherever this machine keeps them, for the program alone: Python has its own.
paths=$work/programs/lib
for place in /usr/local/cuda/lib64 /usr/local/cuda/targets/*/lib /usr/local/lib/python3*/*-packages/nvidia/*/lib \
    /usr/lib/python3*/*-packages/nvidia/*/lib /opt/*/lib/python3*/site-packages/nvidia/*/lib /usr/local/nvidia/lib64; do
    if [ -d "$place" ]; then paths=$paths:$place; fi
done
claas=$work/claas
cat >"$claas" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH='$paths'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec '$work/programs/claas.bin' "\$@"
WRAPPER
chmod +x "$claas"
"$claas" version

tests=$here/tests
on=(--claas "$claas" --model "$model" --set "device.name=$device")
# Kills, and ends of memory, are about the server, not about what is learnt: few short steps.
short=(--set cycle.steps=2 --set cycle.rows=4 --set cycle.max_tokens=8)

# A server's life is short, so eight at a time have an eighth of the kills each, and a part of the card.
run_kill9() {
    local seed pids=() status=0
    for seed in 1 2 3 4 5 6 7 8; do
        python3 "$tests/fault/kill9.py" "${on[@]}" "${short[@]}" --set device.kv_tokens=16384 --kills $((kills / 8)) --seconds 120 \
            --longest 2 --seed $seed &
        pids+=($!)
    done
    for seed in "${pids[@]}"; do wait "$seed" || status=1; done
    return $status
}

run_part() {
    case $1 in
    loop) "$here/tools/quickstart" --once --device "$device" --claas "$claas" --model "$model" ;;
    learn) python3 "$tests/e2e/learning.py" "${on[@]}" --seeds 1 ;;
    learn3) python3 "$tests/e2e/learning.py" "${on[@]}" --seeds 1,2,3 ;;
    gap) python3 "$tests/bench/chat_gap.py" "${on[@]}" --set log.level=debug --streams 8 --feedbacks 4 --worst-gap 100 --most-memory 0 \
        --json - ;;
    tenants) python3 "$tests/bench/tenants.py" "${on[@]}" --tenants 1,8 --rounds 2 ;;
    kill9) run_kill9 ;;
    memory) python3 "$tests/fault/out_of_memory.py" --claas "$claas" --model "$model" --device "$device" --share "$share" ;;
    load) python3 "$tests/bench/load_rate.py" --claas "$claas" --layers 12 --rounds 2 --set "device.name=$device" ;;
    *) echo "server.sh: no part $1" >&2; return 64 ;;
    esac
}
export -f run_part run_kill9
export here tests claas model device share kills

passed=0 failed=0
for part; do
    printf '\n== %s\n' "$part"
    started=$SECONDS status=0
    # timeout ends the whole group: scripts and the servers they started.
    timeout --kill-after=15 $limit_s bash -c "$(declare -p on short); run_part $part" || status=$?
    if [ $status = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%s: %s after %d s\n' "$part" "$([ $status = 0 ] && echo ok || echo "FAILED, exit status $status")" $((SECONDS - started))
done
printf '%d passed, %d failed\n' $passed $failed
[ $failed = 0 ]

#!/usr/bin/env bash
# Everything that is compared with the Python libraries: logits and adapters with transformers and PEFT, token ids with
# tokenizers. The last line is `N passed, N failed, N skipped`, one for each program; exits 1 if one failed, 77 if none ran.
#   tests/e2e/parity.sh
# Environment: CLAAS_BUILD (build folder; default build), CLAAS_TEST_MODEL (the embedded model; what needs it is skipped
# without it), CLAAS_PYTHON (interpreter with tests/e2e/requirements-long.txt; default python3), CLAAS_QWEN (qwen.tiktoken;
# default: the one in the package dashscope), CLAAS_PARITY_MEGABYTES (of text for the tokenizers; default 6).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=${CLAAS_BUILD:-$root/build}
python=${CLAAS_PYTHON:-python3}
model=${CLAAS_TEST_MODEL:-}
passed=0 failed=0 skipped=0
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

skip() {
    echo "SKIPPED $1: $2"
    skipped=$((skipped + 1))
}

# check NAME MODULES COMMAND...: skipped where a module cannot be imported; status 77 of the command is a skip too.
check() {
    local name=$1 modules=$2 module reason status=0
    shift 2
    echo "== $name"
    for module in $modules; do
        if ! reason=$("$python" -c "import $module" 2>&1); then
            skip "$name" "${reason##*$'\n'}"
            return
        fi
    done
    "$@" || status=$?
    case $status in
    0) passed=$((passed + 1)) ;;
    77) skip "$name" "see above" ;;
    *)
        echo "FAILED $name: exit status $status"
        failed=$((failed + 1))
        ;;
    esac
}

hf="torch transformers peft safetensors"
check "adapters against PEFT, files" "$hf" \
    "$python" "$here/peft_roundtrip.py" "$build/tests/unit/adapter_tool" "$root/tests/golden/tiny_models"
check "logits and adapters, tiny models" "$hf gguf numpy" \
    "$python" -W ignore "$here/logits_parity.py" --tool "$build/tests/kernels/dump_logits" --models "$root/tests/golden/tiny_models"
if [ -n "$model" ]; then
    check "logits and adapters, embedded model" "$hf gguf numpy" \
        "$python" -W ignore "$here/logits_parity.py" --tool "$build/tests/kernels/dump_logits" --gguf "$model"
    qwen=${CLAAS_QWEN:-$("$python" -c 'import importlib.util as u, pathlib
spec = u.find_spec("dashscope")
path = pathlib.Path(spec.origin).parent / "resources/qwen.tiktoken" if spec else None
print(path if path and path.exists() else "")' 2>/dev/null)}
    # Without Qwen's vocabulary the rest is compared all the same, and the gap counts as a skip.
    [ -n "$qwen" ] || skip "tokenizer of Qwen" "no qwen.tiktoken (package dashscope, or CLAAS_QWEN)"
    check "tokenizers" "tokenizers gguf" \
        "$python" "$here/tokenizer_parity.py" --tool "$build/tests/unit/tokenize_file" --gguf "$model" \
        ${qwen:+--qwen "$qwen"} --megabytes "${CLAAS_PARITY_MEGABYTES:-6}"
else
    skip "logits and adapters, embedded model" "CLAAS_TEST_MODEL is not set"
    skip "tokenizers" "CLAAS_TEST_MODEL is not set"
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] || exit 1
[ "$passed" != 0 ] || exit 77

#!/usr/bin/env bash
# Configures the kernels where the nvcc of PATH is a link, as installers of several CUDAs leave it: to one that does not work,
# which by itself ends nothing, and, where there is one, to one that does.
#   configure.sh SOURCE
set -euo pipefail
source=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/aside"
real=$(PATH=$PATH:/usr/local/cuda/bin:$source/.cache/cuda/nvidia/cu13/bin command -v nvcc || true)

# configure NAME CUDA: what meson says is in NAME.txt.
configure() {
    PATH=$work/bin:$PATH meson setup "$work/$1" "$source" -Dserver=disabled -Dtests=false -Dgpu_archs=sm_80 -Dcuda="$2" >"$work/$1.txt" 2>&1
}

# fail NAME SENTENCE
fail() {
    cat "$work/$1.txt"
    echo "$2"
    exit 1
}

printf '#!/bin/sh\necho "no licence for this" >&2\nexit 1\n' >"$work/aside/nvcc"
chmod +x "$work/aside/nvcc"
ln -s ../aside/nvcc "$work/bin/nvcc"
configure broken auto || fail broken "an nvcc that does not work ends the configuration"
grep -q 'WARNING: .*/aside/nvcc does not work: no licence for this' "$work/broken.txt" || fail broken "nothing says why"
grep -q 'built without CUDA' "$work/broken.txt" || fail broken "it counts as one that works"
if configure wanted enabled; then fail wanted "CUDA was insisted on"; fi

if [ -n "$real" ]; then
    rm "$work/bin/nvcc"
    PATH=$(dirname "$real"):$PATH configure direct auto || fail direct "it does not configure"
    ln -s "$real" "$work/bin/nvcc"
    configure linked auto || fail linked "a link to nvcc ends the configuration"
    said=$(grep 'built with' "$work/direct.txt")
    grep -qF "$said" "$work/linked.txt" || fail linked "without the link: $said"
fi

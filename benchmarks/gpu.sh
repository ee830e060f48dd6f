#!/usr/bin/env bash
# Builds the extension on a machine with a CUDA device (a bare checkout, CUDA's nvcc, torch 2.11 or later; nothing is
# downloaded), checks it, times it, and leaves JSON in OUTDIR: benchmarks/gpu.sh OUTDIR. About nine minutes at most.
set -euo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUTDIR}")
cd "$(dirname "$0")/.."
mkdir -p "$out"

echo "== build"
if ! python3 setup.py build_ext --inplace > "$out/build.log" 2>&1; then
    tail -30 "$out/build.log"
    exit 1
fi
python3 -c 'import deltatc; print(deltatc.build_info())'

echo "== check"
timeout 120 python3 benchmarks/gpu.py check "$out"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        echo "== $tool"
        # torch's caching allocator would hide an access behind a tensor's end
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 7 \
            python3 benchmarks/gpu.py check --small "$out/$tool" > "$out/$tool.log" 2>&1 || { tail -30 "$out/$tool.log"; exit 1; }
        tail -2 "$out/$tool.log"
    done
else
    echo "compute-sanitizer is not on the PATH: not run"
fi

echo "== time"
timeout 240 python3 benchmarks/gpu.py time "$out"

#!/usr/bin/env bash
# Runs the tests of the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer.
# The kernels are compiled once for each instruction set that this CPU has: tiles and pairs of bfloat16, AVX-512 with and
# without bfloat16, AVX2, SSE2. Prints a table. Exit code 0: all passed; 1: a sanitizer reported, or a test failed.
# It requires g++ with its sanitizers and the environment of launch/install.sh (.venv, or VENV).
# Arguments go to pytest, e.g. `bash launch/test_sanitized.sh -x`.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n 's/^# //p; /^set/q' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${VENV:-.venv}/bin/python"
compiler="${CXX:-g++}"
export PYTHONPATH="$PWD" OMP_NUM_THREADS=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
# With -O3 the compiler takes more than 10 minutes per instruction set.
export MOETRAIN_KERNEL_FLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
output="$(mktemp)"
trap 'rm -f "$output"' EXIT
# Python frees little at its end, so leaks are not reported.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# libstdc++ is loaded at once, because AddressSanitizer looks for its exceptions when the process starts.
libraries=""
for name in libasan.so libubsan.so libstdc++.so; do
    libraries+="$("$compiler" -print-file-name="$name") "
done
sanitized() { LD_PRELOAD="$libraries" "$python" "$@"; }

# Two planted faults: without reports of them, a run that reports nothing would mean nothing.
must_report() {
    local text=$1 code=$2
    sanitized -c "$code" >"$output" 2>&1 || true
    if ! grep -q "$text" "$output"; then
        tail -n 20 "$output" >&2
        echo "test_sanitized: a planted fault ($text) was not reported" >&2
        exit 1
    fi
}
start="import torch; from moetrain.kernels.build import load; x = torch.ones(64, dtype=torch.bfloat16)"
must_report heap-buffer-overflow "$start; load()('swiglu', x, x, torch.ones_like(x), 65)"
must_report "signed integer overflow" "$start; load()('linear', 0, x, x.float(), x, 1, 2**63 - 1, 1)"

tests=(tests/kernels/test_packed.py tests/kernels/test_tiles.py tests/ops/test_native.py tests/ops/test_native_router.py
    tests/inference/test_native_model.py tests/inference/test_deterministic.py)
failed=0
table=""
check() {
    local name=$1 chosen=$2 begun=$SECONDS result code=0
    shift 2
    echo "== $name"
    # --capture=sys: a report that the process writes to its file descriptor before it ends is not captured.
    sanitized -m pytest -q --capture=sys -p tests.sanitized -k "$chosen" "${tests[@]}" "$@" 2>&1 | tee "$output" || code=$?
    result="$(grep -E '(passed|failed|skipped|deselected|error).* in [0-9.]+s' "$output" | tail -n 1 || true)"
    if grep -qE 'ERROR: AddressSanitizer|runtime error:' "$output"; then
        result="reported by a sanitizer" failed=1
    elif [[ $code != 0 && $code != 5 ]]; then # 5: no tests for this CPU
        failed=1
    fi
    table+="$(printf '%-24s %4d s  %s' "$name" "$((SECONDS - begun))" "${result:-ended with exit code $code}")"$'\n'
}
check "AMX tiles" "tiles" "$@"
check "AVX-512, pairs of bf16" "paired" "$@"
check "AVX-512 with bf16" "widened and not (skylake or haswell or x86-64)" "$@"
check "AVX-512 without bf16" "skylake" "$@"
check "AVX2" "haswell" "$@"
check "SSE2" "x86-64" "$@"
check "as chosen for this CPU" "not (tiles or paired or widened)" "$@"
printf '\n%s' "$table"
printf 'test_sanitized: %d s in all\n' "$SECONDS"
exit "$failed"

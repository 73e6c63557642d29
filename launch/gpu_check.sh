#!/usr/bin/env bash
# Checks on one GPU, in less than 8 minutes and without downloads, what cannot be checked on a CPU.
# Arguments go to `moetrain verify gpu`, e.g. `bash launch/gpu_check.sh "parts=[int4_kernel,decode]"`.
# Prints a table and writes runs/default/verify_gpu/verify.json. Exit code 0: all passed; 3: not all; 2: no GPU.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n 's/^# //p; /^set/q' "${BASH_SOURCE[0]}"
    exit 0
fi
bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[[ -n "${VENV:-}" ]] && bin="$VENV/bin"
[[ -x "$bin/python" ]] && PATH="$bin:$PATH"
exec python -m moetrain.cli verify gpu "$@"

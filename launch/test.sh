#!/usr/bin/env bash
# Installs, then lint, types and tests. Arguments go to pytest, e.g. `bash launch/test.sh tests/quant`.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n 's/^# //p; /^set/q' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
bin="${VENV:-.venv}/bin"
# The GPU kernels run in Triton's interpreter. Triton gets a folder of its own, because DeepSpeed imports it in every
# process of an environment that has it. Without it (188 MB, on Linux only) their tests are skipped.
export TRITON_FOLDER="${VENV:-.venv}/triton"
if [[ ! -d "$TRITON_FOLDER/triton" ]]; then
    "$bin/python" -m pip install --disable-pip-version-check --quiet --no-compile --no-deps \
        --target "$TRITON_FOLDER" triton==3.6.0 || echo "test: Triton was not installed; its tests are skipped" >&2
fi
# Three test processes of one thread each, on two cores: tests of timeouts and of ranks wait for much of their time.
# Starting W&B takes a second; the tests that need it give run.wandb.mode.
export OMP_NUM_THREADS=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false

timed() {
    local start=$SECONDS name=$1
    shift
    "$@"
    printf '%-14s %4d s\n' "$name" "$((SECONDS - start))"
}
timed "ruff check" "$bin/ruff" check
timed "ruff format" "$bin/ruff" format --check
timed "mypy" "$bin/mypy"
timed "pytest" "$bin/python" -m pytest -x -q -n 3 --dist loadfile --no-loadscope-reorder --durations 15 "$@"
printf 'test: %d s in all\n' "$SECONDS"

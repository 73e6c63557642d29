#!/usr/bin/env bash
# From a fresh clone to an INT4 agent: installs, then runs every stage of recipes/k2_nano.
# Arguments go to `moetrain run`, e.g. `bash launch/quickstart.sh pretrain.train.steps=100`.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n 's/^# //p; /^set/q' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh
echo "installed after ${SECONDS} s"
# The recipe trains on two ranks, and each rank needs a GPU of its own where torch finds one.
gpus=$("${VENV:-.venv}/bin/python" -c "import torch; print(torch.cuda.device_count())")
ranks=()
if [[ "$gpus" == 1 ]]; then ranks=(num_processes=1); fi
"${VENV:-.venv}/bin/moetrain" run recipe=k2_nano ${ranks[@]+"${ranks[@]}"} "$@"
printf 'quickstart: %d min %d s in all\n' "$((SECONDS / 60))" "$((SECONDS % 60))"
folder=runs name=k2_nano
for word in "$@"; do
    case "$word" in name=*) name="${word#name=}" ;; folder=*) folder="${word#folder=}" ;; esac
done
echo "watch the agent solve a task of 16 calls: ${VENV:-.venv}/bin/moetrain chat" \
    "init_from=$folder/$name/rl_export task=database_notes task_index=0 num_calls=16"

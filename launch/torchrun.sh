#!/usr/bin/env bash
# bash launch/torchrun.sh 2 pretrain model=k2_nano parallel.expert=2
# Starts that many ranks on this machine. Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each.
set -euo pipefail
if [[ $# -lt 2 ]]; then
    echo "usage: bash launch/torchrun.sh RANKS COMMAND [OVERRIDE...]" >&2
    exit 2
fi
ranks=$1
shift
if [[ ! "$ranks" =~ ^[1-9][0-9]*$ ]]; then
    echo "torchrun.sh: RANKS is '$ranks': give a whole number from 1" >&2
    exit 2
fi
if [[ "$1" == run ]]; then
    echo "torchrun.sh: a recipe starts its ranks itself: moetrain run num_processes=$ranks ..." >&2
    exit 2
fi
bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[[ -n "${VENV:-}" ]] && bin="$VENV/bin"
[[ -x "$bin/python" ]] && PATH="$bin:$PATH"

# A mistake in the input is one line here, not one a rank.
WORLD_SIZE=$((ranks * ${NNODES:-1})) python -m moetrain.cli check "$@"
if [[ "${NNODES:-1}" == 1 ]]; then
    place=(--standalone)
else
    place=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}")
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Ranks have this long to save after SIGTERM; torchrun's own default is 30 s.
exec python -m torch.distributed.run "${place[@]}" --shutdown-timeout "${SAVE_SECONDS:-110}" --nproc-per-node "$ranks" -m moetrain.cli "$@"

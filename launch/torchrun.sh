#!/usr/bin/env bash
# bash launch/torchrun.sh 2 pretrain model=k2_nano parallel.expert=2
# Starts that many ranks on this machine. `--help` says how on several machines, and how to restart elastically.
set -euo pipefail
usage() {
    cat <<'END'
usage: bash launch/torchrun.sh RANKS COMMAND [OVERRIDE...]

RANKS ranks on this machine. On several machines start the same line on each, with:
  NNODES=2              number of machines, or a range such as 1:4 (elastic: machines may come and go)
  MASTER_ADDR=node-1    the machine where they meet (c10d rendezvous)
  MASTER_PORT=29500     its port
  RUN_ID=moetrain       the same on all machines of a run, another for another run
Where their names do not resolve, also NODE_RANK=0 on the machine MASTER_ADDR, and LOCAL_ADDR=<own address> on each.
Also:
  MAX_RESTARTS=0        times that all ranks start again, from the last checkpoint, when one dies
  SAVE_SECONDS=110      time to save after SIGTERM
  OMP_NUM_THREADS=1     threads per rank
  VENV=/path            environment, if not .venv beside the repository
END
}
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi
if [[ $# -lt 2 ]]; then
    usage >&2
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

# Check the input first, so that a mistake is reported once instead of once per rank.
nodes="${NNODES:-1}"
WORLD_SIZE=$((ranks * ${nodes%%:*})) python -m moetrain.cli check "$@"
if [[ "$nodes" == 1 ]]; then
    place=(--standalone)
else
    place=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${RUN_ID:-moetrain}")
    place+=(--rdzv-endpoint "${MASTER_ADDR:?the machine where all meet}:${MASTER_PORT:-29500}")
    # Where names do not resolve: who is the meeting point, and the address that others reach this machine by.
    [[ "${NODE_RANK:-}" == 0 ]] && place+=(--rdzv-conf is_host=true)
    [[ -n "${LOCAL_ADDR:-}" ]] && place+=(--local-addr "$LOCAL_ADDR")
    # A store for each start of the ranks. In one that they share they would find the addresses of dead ranks, and a
    # machine that comes later would not find the store.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m moetrain.run.torchrun "${place[@]}" --max-restarts "${MAX_RESTARTS:-0}" \
    --nproc-per-node "$ranks" -m moetrain.cli "$@"

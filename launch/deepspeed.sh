#!/usr/bin/env bash
# bash launch/deepspeed.sh launch/hostfile.example pretrain model=k2_nano parallel.expert=8
# bash launch/deepspeed.sh 2 pretrain model=k2_nano parallel.expert=2
# Starts one rank a slot of the host file, over ssh, or that many on this machine, with DeepSpeed's launcher.
set -euo pipefail
usage="usage: bash launch/deepspeed.sh HOSTFILE|RANKS COMMAND [OVERRIDE...]"
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    echo "$usage"
    exit 0
fi
if [[ $# -lt 2 ]]; then
    echo "$usage" >&2
    exit 2
fi
if [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
    place=(--num_accelerators "$1")
    num_ranks=$1
elif [[ -f "$1" ]]; then
    place=(--hostfile "$1")
    num_ranks=$(sed -n 's/^[^#]*slots=\([0-9]*\).*/\1/p' "$1" | awk '{n += $1} END {print n + 0}')
else
    echo "deepspeed.sh: there is no host file $1: give one like launch/hostfile.example, or a number of ranks" >&2
    exit 2
fi
shift
bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[[ -n "${VENV:-}" ]] && bin="$VENV/bin"
[[ -x "$bin/python" ]] && PATH="$bin:$PATH"

WORLD_SIZE=$num_ranks python -m moetrain.cli check "$@"
exec deepspeed "${place[@]}" --no_local_rank --module moetrain.cli "$@"

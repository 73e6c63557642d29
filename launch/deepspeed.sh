#!/usr/bin/env bash
# bash launch/deepspeed.sh launch/hostfile.example pretrain model=k2_nano parallel.expert=8
# Starts one rank a slot of the host file, over ssh, with DeepSpeed's launcher.
set -euo pipefail
if [[ $# -lt 2 ]]; then
    echo "usage: bash launch/deepspeed.sh HOSTFILE COMMAND [OVERRIDE...]" >&2
    exit 2
fi
hostfile=$1
shift
if [[ ! -f "$hostfile" ]]; then
    echo "deepspeed.sh: there is no host file $hostfile: give one like launch/hostfile.example" >&2
    exit 2
fi
bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[[ -n "${VENV:-}" ]] && bin="$VENV/bin"
[[ -x "$bin/python" ]] && PATH="$bin:$PATH"

python -m moetrain.cli check "$@"
exec deepspeed --hostfile "$hostfile" --module moetrain.cli "$@"

#!/usr/bin/env bash
# bash launch/deepspeed.sh launch/hostfile.example pretrain model=k2_nano parallel.expert=8
# bash launch/deepspeed.sh 2 pretrain model=k2_nano parallel.expert=2
# Starts ranks with DeepSpeed's launcher: one per slot of the host file over ssh, or RANKS ranks on this machine.
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
    # Without the name of a host file DeepSpeed would take /job/hostfile, if there is one.
    place=(--hostfile /dev/null --num_accelerators "$1")
    counts="1 $1"
elif [[ -f "$1" ]]; then
    place=(--hostfile "$1")
    counts=$(name=$1 awk '
        function refuse(why) { print "deepspeed.sh: " ENVIRON["name"] why >"/dev/stderr"; wrong = 2; exit wrong }
        { sub(/^[ \t]+/, "") }
        /^(#|\r?$)/ { next }
        !/^[^ \t]+[ \t]+slots=[1-9][0-9]*([ \t\r]|$)/ { refuse(":" NR " is not a line like: node-1 slots=8") }
        seen[$1]++ { refuse(":" NR " names " $1 " again: give each machine one line") }
        { hosts++; ranks += substr($2, length("slots=") + 1) }
        END { if (wrong) exit wrong; if (!hosts) refuse(" names no machine: give lines like: node-1 slots=8"); print hosts, ranks }
    ' <"$1")
else
    echo "deepspeed.sh: there is no host file $1: give one like launch/hostfile.example, or a number of ranks" >&2
    exit 2
fi
read -r num_hosts num_ranks <<<"$counts"
shift
if [[ "$1" == run ]]; then
    echo "deepspeed.sh: a recipe starts its ranks itself, on one machine: moetrain run num_processes=$num_ranks ..." >&2
    exit 2
fi
bin="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin"
[[ -n "${VENV:-}" ]] && bin="$VENV/bin"
[[ -x "$bin/python" ]] && PATH="$bin:$PATH"

WORLD_SIZE=$num_ranks python -m moetrain.cli check "$@"

# On several machines a shell reads the words again. DeepSpeed puts those with a space, and no others, in double quotes.
words=()
for word in "$@"; do
    if [[ "$num_hosts" -gt 1 && "$word" == *" "* ]]; then
        word=$(sed 's/[\\$`]/\\&/g' <<<"$word")
    elif [[ "$num_hosts" -gt 1 ]]; then
        word=$(printf '%q' "$word")
    fi
    words+=("$word")
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec deepspeed "${place[@]}" --master_port "${MASTER_PORT:-29500}" --no_local_rank --module moetrain.cli "${words[@]}"

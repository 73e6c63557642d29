#!/usr/bin/env bash
# Creates .venv in the repository and installs moetrain into it with the tested versions of its dependencies.
# Does nothing if pyproject.toml and the constraints have not changed since the last call.
# PYTHON=python3.12 chooses the interpreter, VENV=/path the folder.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n 's/^# //p; /^set/q' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${VENV:-.venv}"
stamp="$venv/.moetrain-installed"

took() { printf '%-44s %4d s\n' "$1" "$((SECONDS - since))"; since=$SECONDS; }
since=$SECONDS

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
if [[ ! -x "$venv/bin/python" ]]; then
    python=""
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if fits "$candidate"; then python="$candidate"; break; fi
    done
    if [[ -z "$python" ]]; then
        echo "install: Python 3.11 or newer not found (tried ${PYTHON:-python3 python3.11 python3.12 python3.13}); give one with PYTHON=" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
    took "environment ($("$venv/bin/python" --version))"
fi

wanted="$(cat pyproject.toml launch/constraints.txt launch/install.sh | sha256sum | cut -d' ' -f1) $PWD"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    echo "install: $venv is up to date"
    exit 0
fi

# Packages are installed without bytecode; the modules that moetrain imports are compiled at the end.
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# torch is installed first, so that a machine whose index offers a CPU build of this version keeps that build.
pip install --no-compile "$(grep '^torch==' launch/constraints.txt)"
took "torch"
pip install --no-compile -c launch/constraints.txt -e '.[dev]'
took "moetrain and its dependencies"

# Each stage is a process; with PYTHONDONTWRITEBYTECODE set, each would compile its imports again.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" launch/import_all.py 2>"$venv/import.log" || { cat "$venv/import.log" >&2; exit 1; }
took "bytecode of the imported modules"

# The kernels would be compiled at first use; here they are compiled during installation.
if command -v g++ >/dev/null; then
    log="$venv/kernels.log"
    if "$venv/bin/python" -c 'from moetrain.kernels.build import load; load()' >"$log" 2>&1; then
        took "native kernels"
    else
        tail -n 1 "$log" >&2
        echo "install: the native kernels were not built (log: $log); training on a CPU uses torch's kernels, which are slower" >&2
    fi
else
    echo "install: g++ not found: training on a CPU uses torch's kernels, which are slower than the native ones" >&2
fi

echo "$wanted" >"$stamp"

"""Runs the `moetrain` command as a user does, in its own process; or in this one, which has loaded torch already."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from moetrain.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def moetrain(*words: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `moetrain words...` in a folder and return what it printed and its exit code. variables: environment."""
    command = [sys.executable, "-m", "moetrain.cli", *words]
    return subprocess.run(
        command,
        cwd=folder or ROOT,
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def moetrain_here(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Return what `moetrain` returns, without a process for the command. What the processes of stages print is not in
    the result.

    For commands that load no plugins, which would stay loaded.
    """
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())

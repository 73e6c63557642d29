"""Runs the `moetrain` command as a user does: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

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

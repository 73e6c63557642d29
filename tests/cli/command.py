"""Runs the `moetrain` command as a user does: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def moetrain(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `moetrain words...` in a folder and return what it printed and its exit code."""
    command = [sys.executable, "-m", "moetrain.cli", *words]
    return subprocess.run(
        command, cwd=folder or ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=900
    )

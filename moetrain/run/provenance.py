"""Records which version made a stage, when, and on which machine, for the report."""

import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moetrain.runtime import num_ranks

_GIB = 2**30


def provenance(*, started: float) -> dict[str, object]:
    """Return versions, start time, hardware and peak memory of this process.

    started: start of the process in seconds since 1970. `peak_memory_gib` is the peak resident memory on the host;
    `peak_device_memory_gib` is the peak allocated memory on the GPU.
    """
    torch = sys.modules.get("torch")  # do not load torch for a stage that did not use it
    found: dict[str, object] = {
        "moetrain": _version("moetrain"),
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "torch": _version("torch") if torch is not None else None,
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started)),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "ranks": num_ranks(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB, 2),
        "device": None,
    }
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["device"] = torch.cuda.get_device_name()
        found["peak_device_memory_gib"] = round(torch.cuda.max_memory_allocated() / _GIB, 2)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    """Return the git commit of a checkout, with `+` if files were changed; None for an installed package."""
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.machine()

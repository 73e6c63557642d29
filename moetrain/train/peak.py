"""The speed that this machine reaches in a plain matrix product: the denominator of MFU. Measured, not looked up."""

import json
import time
from pathlib import Path

import torch

_SIZE = 1024  # large enough to reach the ceiling on a CPU, small enough to stay short
_SECONDS = 0.3


def measured_peak(path: Path, *, dtype: torch.dtype, device: torch.device) -> float:
    """Return this process's matmul peak in FLOP/s, measured once and kept in the JSON file `path`."""
    key = f"{dtype}".removeprefix("torch.") + f" {device.type} {torch.get_num_threads()} threads"
    known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    if key not in known:
        known[key] = measure_peak(dtype=dtype, device=device)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.tmp")
        partial.write_text(json.dumps(known, indent=1) + "\n")
        partial.replace(path)
    return known[key]


def measure_peak(*, dtype: torch.dtype, device: torch.device, seconds: float = _SECONDS) -> float:
    """Return the best FLOP/s of square products seen in `seconds`."""
    a_MM = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    b_MM = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    fastest = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or fastest == float("inf"):
        start = time.perf_counter()
        torch.mm(a_MM, b_MM)
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * _SIZE**3 / fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

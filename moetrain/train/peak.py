"""The speed that this machine reaches in a plain matrix product: the denominator of MFU. Measured, not looked up."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moetrain.files import read_json_or_empty, write_json
from moetrain.kernels.build import Library
from moetrain.kernels.choice import taking
from moetrain.ops.native import linear
from moetrain.parallel.topology import Topology

_SIZE = 1024  # large enough to reach the ceiling on a CPU, small enough to stay short
_SECONDS = 0.3


def total_peak(path: Path, *, dtype: torch.dtype, topology: Topology, library: Library | None) -> float:
    """Return the matmul peak of all ranks together in FLOP/s, measured at the same time, kept in the JSON file `path`.

    A collective.
    """
    kernels = ", native kernels" if library else ""
    key = f"{topology.world_size} x {topology.device.type}, {torch.get_num_threads()} threads, {dtype}{kernels}"
    peak = topology.broadcast_object(kept(path, key) if topology.is_main else None)
    if peak is None:
        own = torch.tensor(measure_peak(dtype=dtype, device=topology.device, library=library), dtype=torch.float64)
        peak = float(topology.all_reduce_sum(own))
        if topology.is_main:
            keep(path, key, measured=peak)
    return peak


def kept(path: Path, key: str) -> float | None:
    """Return what `keep` wrote under `key`, None if nothing."""
    return read_json_or_empty(path).get(key)


def keep(path: Path, key: str, *, measured: float) -> None:
    """Add what was measured to the JSON file `path`, whole or not at all."""
    write_json(path, read_json_or_empty(path) | {key: measured})


def measure_peak(
    *, dtype: torch.dtype, device: torch.device, library: Library | None, seconds: float = _SECONDS
) -> float:
    """Return the best FLOP/s of square products seen in `seconds`: torch's, or by turns those of `library`."""
    a_MM = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    b_MM = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    products: list[Callable[[], object]] = [partial(torch.mm, a_MM, b_MM)]
    if found := taking(library, a_MM):
        products.append(partial(linear, a_MM, b_MM.float(), library=found))
    fastest = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or fastest == float("inf"):
        for product in products:
            start = time.perf_counter()
            product()
            _wait_for(device)
            fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * _SIZE**3 / fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

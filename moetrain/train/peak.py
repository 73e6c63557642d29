"""The measured speed of a large matrix product on this machine: the denominator of MFU."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moetrain.files import read_json_or_empty, write_json
from moetrain.kernels.build import Library
from moetrain.kernels.choice import usable
from moetrain.ops.native import linear
from moetrain.parallel.topology import Topology

_SIZE, _SIZE_ON_GPU = 1024, 8192  # large enough to reach the peak, small enough to run quickly
_SECONDS = 0.3


def total_peak(path: Path, *, dtype: torch.dtype, topology: Topology, library: Library | None) -> float:
    """Return the matmul peak of all ranks together in FLOP/s, measured on all at once and cached in the JSON file
    `path`.

    Collective.
    """
    kernels = ", native kernels" if library else ""
    key = f"{topology.world_size} x {topology.device.type}, {torch.get_num_threads()} threads, {dtype}{kernels}"
    peak = topology.broadcast_object(read_measurement(path, key) if topology.is_main else None)
    if peak is None:
        own_peak = torch.tensor(measure_peak(dtype=dtype, device=topology.device, library=library), dtype=torch.float64)
        peak = float(topology.all_reduce_sum(own_peak))
        if topology.is_main:
            store_measurement(path, key, measured=peak)
    return peak


def read_measurement(path: Path, key: str) -> float | None:
    """Return the value that `store_measurement` stored under `key`, or None."""
    return read_json_or_empty(path).get(key)


def store_measurement(path: Path, key: str, *, measured: float) -> None:
    """Store a measured value under `key` in the JSON file `path`, which is replaced atomically."""
    write_json(path, read_json_or_empty(path) | {key: measured})


def measure_peak(
    *, dtype: torch.dtype, device: torch.device, library: Library | None, seconds: float = _SECONDS
) -> float:
    """Return the best FLOP/s of square products within `seconds`, of torch and (if supported) of `library`."""
    size = _SIZE if device.type == "cpu" else _SIZE_ON_GPU
    a_MM = torch.ones(size, size, dtype=dtype, device=device)
    b_MM = torch.ones(size, size, dtype=dtype, device=device)
    products: list[Callable[[], object]] = [partial(torch.mm, a_MM, b_MM)]
    if native := usable(library, a_MM):
        products.append(partial(linear, a_MM, b_MM.float(), library=native))
    fastest = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or fastest == float("inf"):
        for product in products:
            start = time.perf_counter()
            product()
            _wait_for(device)
            fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What a run's products are made with: dtype and kernels, as the config names them or as the machine has them."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from moetrain.kernels.build import Library
from moetrain.kernels.choice import find, use
from moetrain.kernels.config import Kernels
from moetrain.parallel.topology import Topology
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.peak import keep, kept

_log = logging.getLogger(__name__)

DTYPES = {ComputeDtype.bfloat16: torch.bfloat16, ComputeDtype.float32: torch.float32}
MACHINE = "machine.json"
"""What was measured of the machine, in a stage's folder."""
_GAIN = "speed of float32 products over bfloat16 ones"
_MARGIN = 1.25
"""Gain from which on float32 is taken: its operands are twice as large."""
_SIZE = 512
_SECONDS = 0.5


def settle_products(train: TrainConfig, *, folder: Path, topology: Topology) -> TrainConfig:
    """Return `train` with a dtype in place of `fastest` and kernels in place of `auto`, and use those from now on.

    A collective: native where all ranks have it. The main rank measures dtypes, and keeps what it found in the stage's
    folder: a run that goes on there goes on with the dtype it began with. An accelerator is not measured: bfloat16.
    Raises ConfigError where `native` is asked for and cannot be had.
    """

    def kept_gain() -> float:
        gain: float = topology.broadcast_object(found_gain(folder) if topology.is_main else 0.0)
        if topology.is_main:
            keep(folder / MACHINE, _GAIN, measured=gain)
            _log.info("products in %s: %s %.3g times", faster(gain), _GAIN, gain)
        return gain

    library, why = kernels_of(train, device=topology.device)
    everywhere = topology.all_reduce_max(torch.tensor(float(library is None))) == 0
    if topology.is_main:
        missing = library is not None and not everywhere
        _log.info("kernels: %s (%s)", "native" if everywhere else "torch", "not on all ranks" if missing else why)
    use(library if everywhere else None)
    kernels = Kernels.native if everywhere else Kernels.torch
    dtype = dtype_of(replace(train, kernels=kernels), device=topology.device, gain=kept_gain)
    return replace(train, compute_dtype=dtype, kernels=kernels)


def kernels_of(train: TrainConfig, *, device: torch.device) -> tuple[Library | None, str]:
    """Return the native kernels that `train` comes to here, None for torch's, and why. Raises ConfigError."""
    if device.type != "cpu":
        return None, f"this is {device.type}"
    if train.compute_dtype is ComputeDtype.float32:
        return None, "products are in float32"
    return find(train.kernels)


def dtype_of(train: TrainConfig, *, device: torch.device, gain: Callable[[], float] | None = None) -> ComputeDtype:
    """Return what the dtype of `train` comes to on a device, its kernels not `auto`.

    `gain` says of a CPU what `float32_gain`, the default, measures.
    """
    if train.compute_dtype is not ComputeDtype.fastest:
        return train.compute_dtype
    if device.type != "cpu" or train.kernels is Kernels.native:
        return ComputeDtype.bfloat16
    return faster((gain or float32_gain)())


def settled_dtype(train: TrainConfig, *, device: torch.device, gain: Callable[[], float] | None = None) -> ComputeDtype:
    """Return the dtype that `settle_products` comes to in one process."""
    library, _ = kernels_of(train, device=device)
    return dtype_of(replace(train, kernels=Kernels.native if library else Kernels.torch), device=device, gain=gain)


def faster(gain: float) -> ComputeDtype:
    """Return the dtype to take on a CPU whose products are `gain` times as fast in float32 as in bfloat16."""
    return ComputeDtype.float32 if gain > _MARGIN else ComputeDtype.bfloat16


def found_gain(folder: Path) -> float:
    """Return the gain that a stage's folder keeps, or measure it where there is none; nothing is written."""
    gain = kept(folder / MACHINE, _GAIN)
    return float32_gain() if gain is None else gain


def float32_gain() -> float:
    """Return how many times as fast this CPU multiplies square matrices in float32 as in bfloat16.

    By turns, on one thread, the best of each: a busy neighbour that takes a core changes little.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    operands = {dtype: torch.ones(_SIZE, _SIZE, dtype=dtype) for dtype in DTYPES.values()}
    fastest = dict.fromkeys(operands, float("inf"))
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or float("inf") in fastest.values():
        for dtype, a_MM in operands.items():
            start = time.perf_counter()
            torch.mm(a_MM, a_MM)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return fastest[torch.bfloat16] / fastest[torch.float32]

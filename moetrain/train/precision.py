"""The dtype of a run's matrix products: the one that the config names, or the faster one on the machine at hand."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

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


def settle_dtype(train: TrainConfig, *, folder: Path, topology: Topology) -> TrainConfig:
    """Return `train` with a dtype in place of `fastest`. A collective.

    The main rank measures, and keeps what it found in the stage's folder: a run that goes on there goes on with the
    dtype it began with. An accelerator is not measured: bfloat16.
    """

    def kept_gain() -> float:
        gain: float = topology.broadcast_object(found_gain(folder) if topology.is_main else 0.0)
        if topology.is_main:
            keep(folder / MACHINE, _GAIN, measured=gain)
            _log.info("products in %s: %s %.3g times", faster(gain), _GAIN, gain)
        return gain

    return replace(train, compute_dtype=dtype_of(train.compute_dtype, device=topology.device, gain=kept_gain))


def dtype_of(wanted: ComputeDtype, *, device: torch.device, gain: Callable[[], float] | None = None) -> ComputeDtype:
    """Return what `wanted` comes to on a device; `gain` says of a CPU what `float32_gain`, the default, measures."""
    if wanted is not ComputeDtype.fastest:
        return wanted
    return ComputeDtype.bfloat16 if device.type != "cpu" else faster((gain or float32_gain)())


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

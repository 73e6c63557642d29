"""The dtype of a run's matrix products: the one that the config names, or the faster one on the machine at hand."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from moetrain.parallel.topology import Topology
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.peak import total_peak

_log = logging.getLogger(__name__)

DTYPES = {ComputeDtype.bfloat16: torch.bfloat16, ComputeDtype.float32: torch.float32}
MACHINE = "machine.json"
"""What was measured of the machine, in a stage's folder."""
_MARGIN = 1.25
"""How many times as fast float32 products must be to be taken: their operands are twice as large."""


def settle_dtype(train: TrainConfig, *, folder: Path, topology: Topology) -> TrainConfig:
    """Return `train` with a dtype in place of `fastest`. A collective.

    Both are measured on all ranks at the same time, and kept in the stage's folder: a run that goes on there goes on
    with the dtype it began with. An accelerator is not measured: bfloat16.
    """
    names = candidates(train.compute_dtype, device=topology.device)
    if len(names) == 1:
        return replace(train, compute_dtype=names[0])
    peaks = {name: total_peak(folder / MACHINE, dtype=DTYPES[name], topology=topology) for name in names}
    dtype = faster(peaks)
    speeds = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in peaks.items())
    if topology.is_main:
        _log.info("products in %s (GFLOP/s here: %s)", dtype, speeds)
    return replace(train, compute_dtype=dtype)


def candidates(wanted: ComputeDtype, *, device: torch.device) -> list[ComputeDtype]:
    """Return what `wanted` may come to on a device."""
    if wanted is not ComputeDtype.fastest:
        return [wanted]
    return list(DTYPES) if device.type == "cpu" else [ComputeDtype.bfloat16]


def faster(peaks: Mapping[ComputeDtype, float]) -> ComputeDtype:
    """Return which of the candidates to take, given the FLOP/s of products in each."""
    gains = peaks.get(ComputeDtype.float32, 0.0) > _MARGIN * peaks.get(ComputeDtype.bfloat16, 0.0)
    return ComputeDtype.float32 if gains else ComputeDtype.bfloat16

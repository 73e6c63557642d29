"""Resolves the dtype and the kernels of a run's matrix products from the config and the machine."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch

from moetrain.errors import ConfigError
from moetrain.kernels.build import Library
from moetrain.kernels.choice import CURE, find
from moetrain.kernels.config import Kernels
from moetrain.parallel.topology import Topology
from moetrain.stage_files import MACHINE
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.peak import read_measurement, store_measurement

_log = logging.getLogger(__name__)
_Config = TypeVar("_Config", bound=TrainConfig)

DTYPES = {ComputeDtype.bfloat16: torch.bfloat16, ComputeDtype.float32: torch.float32}
_GAIN_KEY = "speed of float32 products over bfloat16 ones"
_NATIVE_KEY = "native kernels"
"""1 if the stage computes with native kernels, else 0."""
_RESUME_CURE = "This stage started with native kernels; set train.kernels=torch to continue without them"
_MARGIN = 1.25
"""Speedup above which float32 is selected; a lower one is not worth operands of twice the size."""
_SIZE = 512
_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ResolvedPrecision(Generic[_Config]):
    """The dtype and kernels of a run.

    train: the config, with `fastest` and `auto` replaced by the chosen values. library: the native kernels; None for
    torch's.
    """

    train: _Config
    library: Library | None


def resolve_precision(
    train: _Config, *, folder: Path, topology: Topology, cure: str | None = None
) -> ResolvedPrecision[_Config]:
    """Return the dtype and the kernels that a run uses, and store the choice in the stage's folder.

    Collective: native kernels are used only if all ranks have them. A resumed run uses the dtype and the kernels with
    which it started. On a CPU the main rank measures the dtypes; accelerators always use bfloat16. Raises ConfigError
    if native kernels are required but unavailable. cure: its advice; the default is that of `train.kernels`.
    """

    def shared_gain() -> float:
        gain: float = topology.broadcast_object(stored_or_measured_gain(folder) if topology.is_main else 0.0)
        if topology.is_main:
            store_measurement(folder / MACHINE, _GAIN_KEY, measured=gain)
            _log.info("matrix products in %s: float32 is %.3g times as fast as bfloat16", faster_dtype(gain), gain)
        return gain

    if train.kernels is Kernels.torch and read_measurement(folder / MACHINE, _NATIVE_KEY) and topology.is_main:
        _log.warning("this stage started with native kernels and continues with torch's: results differ by rounding")
    cure = cure or _cure(train)
    train = replace(train, kernels=topology.broadcast_object(starting_kernels(train, folder=folder)))
    library, reason, refusal = None, "", ""
    try:
        library, reason = resolve_kernels(train, device=topology.device, cure=cure)
    except ConfigError as error:  # raised below, after all ranks have met in the collective
        refusal = str(error)
    all_ranks_native = topology.all_reduce_max(torch.tensor(float(library is None))) == 0
    if not all_ranks_native and train.kernels is Kernels.native and topology.device.type == "cpu":
        raise ConfigError(refusal or f"kernels=native is unavailable on another rank. {cure}")
    kernels = Kernels.native if all_ranks_native else Kernels.torch
    if topology.is_main:
        _log.info("kernels: %s (%s)", kernels, reason if all_ranks_native or library is None else "not on all ranks")
        if topology.device.type == "cpu":
            store_measurement(folder / MACHINE, _NATIVE_KEY, measured=float(all_ranks_native))
    dtype = resolve_dtype(replace(train, kernels=kernels), device=topology.device, gain=shared_gain)
    resolved_train = replace(train, compute_dtype=dtype, kernels=kernels)
    return ResolvedPrecision(train=resolved_train, library=library if all_ranks_native else None)


def starting_kernels(train: TrainConfig, *, folder: Path) -> Kernels:
    """Return the kernels in `train`, with `auto` replaced by the kernels that the run in `folder` started with."""
    native = read_measurement(folder / MACHINE, _NATIVE_KEY)
    if train.kernels is not Kernels.auto or train.compute_dtype is ComputeDtype.float32:
        return train.kernels
    if native is None:  # a folder with only a dtype measurement is from a version without native kernels
        return Kernels.auto if read_measurement(folder / MACHINE, _GAIN_KEY) is None else Kernels.torch
    return Kernels.native if native else Kernels.torch


def resolve_kernels(train: TrainConfig, *, device: torch.device, cure: str = CURE) -> tuple[Library | None, str]:
    """Return the native kernels to use on `device`, or None for torch's, and the reason.

    Raises ConfigError if native kernels are required but unavailable; `cure`: see `find`.
    """
    if device.type != "cpu":
        return None, f"this is {device.type}"
    if train.compute_dtype is ComputeDtype.float32:
        return None, "products are in float32"
    return find(train.kernels, cure=cure)


def resolve_dtype(train: TrainConfig, *, device: torch.device, gain: Callable[[], float] | None = None) -> ComputeDtype:
    """Return the dtype to use on `device`; the kernels in `train` must not be `auto`.

    `gain`: returns the speed of float32 relative to bfloat16 on a CPU; the default measures it.
    """
    if train.compute_dtype is not ComputeDtype.fastest:
        return train.compute_dtype
    if device.type != "cpu" or train.kernels is Kernels.native:
        return ComputeDtype.bfloat16
    return faster_dtype((gain or float32_speedup)())


def expected_precision(
    train: TrainConfig, *, device: torch.device, folder: Path
) -> tuple[ComputeDtype, Library | None]:
    """Return the dtype and kernels that `resolve_precision` would choose in one process, without storing the choice."""
    starting = replace(train, kernels=starting_kernels(train, folder=folder))
    library, _ = resolve_kernels(starting, device=device, cure=_cure(train))
    kernels = Kernels.native if library else Kernels.torch
    return resolve_dtype(
        replace(train, kernels=kernels), device=device, gain=partial(stored_or_measured_gain, folder)
    ), library


def _cure(train: TrainConfig) -> str:
    """Return the advice for an error about unavailable native kernels.

    With `auto` such an error occurs only if the stage started with native kernels.
    """
    return _RESUME_CURE if train.kernels is Kernels.auto else CURE


def faster_dtype(gain: float) -> ComputeDtype:
    """Return the dtype for a CPU on which float32 products are `gain` times as fast as bfloat16 products."""
    return ComputeDtype.float32 if gain > _MARGIN else ComputeDtype.bfloat16


def stored_or_measured_gain(folder: Path) -> float:
    """Return the gain stored in a stage's folder, or measure it without storing it."""
    gain = read_measurement(folder / MACHINE, _GAIN_KEY)
    return float32_speedup() if gain is None else gain


def float32_speedup() -> float:
    """Return how many times faster this CPU multiplies square matrices in float32 than in bfloat16.

    Both alternate on one thread and the best time of each counts, so a busy neighbouring core has little effect.
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

"""What a run's products are made with: dtype and kernels, as the config names them or as the machine has them."""

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
from moetrain.train.config import ComputeDtype, TrainConfig
from moetrain.train.peak import keep, kept

_log = logging.getLogger(__name__)
_Config = TypeVar("_Config", bound=TrainConfig)

DTYPES = {ComputeDtype.bfloat16: torch.bfloat16, ComputeDtype.float32: torch.float32}
MACHINE = "machine.json"
"""What was measured of the machine, in a stage's folder."""
_GAIN = "speed of float32 products over bfloat16 ones"
_NATIVE = "native kernels"
"""1 where a stage computes with them, else 0."""
_GO_ON = "The stage began with them; train.kernels=torch goes on with others"
_MARGIN = 1.25
"""Gain from which on float32 is taken: its operands are twice as large."""
_SIZE = 512
_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Products(Generic[_Config]):
    """What a run multiplies with. train: the config with a dtype and kernels in place of `fastest` and `auto`.

    library: the native kernels, None for torch's.
    """

    train: _Config
    library: Library | None


def settle_products(train: _Config, *, folder: Path, topology: Topology) -> Products[_Config]:
    """Return what a run multiplies with.

    A collective: native where all ranks have it. What they come to is kept in the stage's folder: a run that goes on
    there goes on with the kernels and the dtype it began with. The main rank measures dtypes; an accelerator is not
    measured: bfloat16. Raises ConfigError where native kernels must be had and are not.
    """

    def kept_gain() -> float:
        gain: float = topology.broadcast_object(found_gain(folder) if topology.is_main else 0.0)
        if topology.is_main:
            keep(folder / MACHINE, _GAIN, measured=gain)
            _log.info("products in %s: %s %.3g times", faster(gain), _GAIN, gain)
        return gain

    if train.kernels is Kernels.torch and kept(folder / MACHINE, _NATIVE) and topology.is_main:
        _log.warning("this stage began with native kernels and goes on with torch's: numbers differ by rounding")
    cure = _cure(train)
    train = replace(train, kernels=topology.broadcast_object(begun_with(train, folder=folder)))
    library, why, refusal = None, "", ""
    try:
        library, why = kernels_of(train, device=topology.device, cure=cure)
    except ConfigError as error:  # on this rank: all of them hear of it first
        refusal = str(error)
    everywhere = topology.all_reduce_max(torch.tensor(float(library is None))) == 0
    if not everywhere and train.kernels is Kernels.native and topology.device.type == "cpu":
        raise ConfigError(refusal or "kernels=native cannot be had on another rank. Give kernels=auto or torch")
    kernels = Kernels.native if everywhere else Kernels.torch
    if topology.is_main:
        _log.info("kernels: %s (%s)", kernels, why if everywhere or library is None else "not on all ranks")
        if topology.device.type == "cpu":
            keep(folder / MACHINE, _NATIVE, measured=float(everywhere))
    dtype = dtype_of(replace(train, kernels=kernels), device=topology.device, gain=kept_gain)
    settled_train = replace(train, compute_dtype=dtype, kernels=kernels)
    return Products(train=settled_train, library=library if everywhere else None)


def begun_with(train: TrainConfig, *, folder: Path) -> Kernels:
    """Return the kernels of `train`, and in place of `auto` those that the run in a stage's folder began with."""
    native = kept(folder / MACHINE, _NATIVE)
    if train.kernels is not Kernels.auto or train.compute_dtype is ComputeDtype.float32:
        return train.kernels
    if native is None:  # a folder that knows dtypes alone is older than the kernels
        return Kernels.auto if kept(folder / MACHINE, _GAIN) is None else Kernels.torch
    return Kernels.native if native else Kernels.torch


def kernels_of(train: TrainConfig, *, device: torch.device, cure: str = CURE) -> tuple[Library | None, str]:
    """Return the native kernels that `train` comes to here, None for torch's, and why.

    Raises ConfigError where they must be had and are not; `cure`: see `find`.
    """
    if device.type != "cpu":
        return None, f"this is {device.type}"
    if train.compute_dtype is ComputeDtype.float32:
        return None, "products are in float32"
    return find(train.kernels, cure=cure)


def dtype_of(train: TrainConfig, *, device: torch.device, gain: Callable[[], float] | None = None) -> ComputeDtype:
    """Return what the dtype of `train` comes to on a device, its kernels not `auto`.

    `gain` says of a CPU what `float32_gain`, the default, measures.
    """
    if train.compute_dtype is not ComputeDtype.fastest:
        return train.compute_dtype
    if device.type != "cpu" or train.kernels is Kernels.native:
        return ComputeDtype.bfloat16
    return faster((gain or float32_gain)())


def settled(train: TrainConfig, *, device: torch.device, folder: Path) -> tuple[ComputeDtype, Library | None]:
    """Return the dtype and the kernels that `settle_products` comes to in one process; nothing is written or used."""
    begun = replace(train, kernels=begun_with(train, folder=folder))
    library, _ = kernels_of(begun, device=device, cure=_cure(train))
    kernels = Kernels.native if library else Kernels.torch
    return dtype_of(replace(train, kernels=kernels), device=device, gain=partial(found_gain, folder)), library


def _cure(train: TrainConfig) -> str:
    """Return what helps where native kernels cannot be had: with `auto` they must because the stage began with them."""
    return _GO_ON if train.kernels is Kernels.auto else CURE


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

"""Which kernels a process uses for its computations: the project's own, or torch's.

The choice is made once per run and passed to the modules that compute; this module stores nothing.
"""

import functools
import logging

import torch

from moetrain.errors import ConfigError
from moetrain.kernels.build import Library, UnavailableError, Units, load
from moetrain.kernels.config import Kernels

_log = logging.getLogger(__name__)

CURE = "Give kernels=auto or torch"
_WIDE = ("AVX2", "AVX512")


def usable(library: Library | None, x: torch.Tensor) -> Library | None:
    """Return `library` if it supports activations like `x` (bfloat16 on a CPU), else None."""
    return usable_for(library, x.device, dtype=x.dtype)


def usable_for(library: Library | None, device: torch.device, *, dtype: torch.dtype) -> Library | None:
    """Return `library` if it supports activations of this dtype on this device, else None."""
    return library if dtype == torch.bfloat16 and device.type == "cpu" else None


def find_for_generation(wanted: Kernels) -> Library | None:
    """Resolve `wanted` for generation, whose products have few rows: native kernels wherever they can be compiled.

    Raises ConfigError if native kernels were requested but are unavailable.
    """
    if wanted is Kernels.torch:
        _log_once("generation on a CPU uses torch's kernels, as configured")
        return None
    try:
        library = load()
    except UnavailableError as error:
        if wanted is Kernels.native:
            raise ConfigError(f"kernels=native is unavailable here: {error}. {CURE}") from None
        _log_once(f"generation on a CPU uses torch's kernels: {error}")
        return None
    _log_once("generation on a CPU uses the native kernels")
    return library


@functools.cache
def _log_once(message: str) -> None:
    _log.info("%s", message)


def find(wanted: Kernels, *, cure: str = CURE) -> tuple[Library | None, str]:
    """Resolve `wanted`: return the library, None for torch's kernels, and the reason.

    Raises ConfigError if native kernels were requested but are unavailable; its message ends with `cure`.
    """
    if wanted is Kernels.torch:
        return None, "as configured"
    if wanted is Kernels.auto and torch.backends.cpu.get_cpu_capability() not in _WIDE:
        return None, "this CPU has no AVX2"
    try:
        library = load()
    except UnavailableError as error:
        if wanted is Kernels.native:
            raise ConfigError(f"kernels=native is unavailable here: {error}. {cure}") from None
        return None, str(error)
    if library.units is Units.tiles:
        return library, "products by tiles (AMX)"
    if wanted is Kernels.auto and torch.cpu._is_amx_tile_supported():
        return None, "this CPU multiplies bfloat16 in tiles (AMX), which only torch may use here"
    kind = "pairs of bfloat16" if library.units is Units.paired else "widened bfloat16"
    return library, f"products of {kind}; on this CPU pairs are {library.gain_of_pairs:.2g} times as fast"

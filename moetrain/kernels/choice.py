"""Whether this process computes with the project's own kernels. A switch of the process, as torch's thread count is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moetrain.errors import ConfigError
from moetrain.kernels.build import Library, UnavailableError, load
from moetrain.kernels.config import Kernels

CURE = "Give kernels=auto or torch"
_WIDE = ("AVX2", "AVX512")
_in_use: list[Library] = []


def use(library: Library | None) -> None:
    """Compute with `library` from now on, or with torch alone."""
    _in_use[:] = [] if library is None else [library]


@contextmanager
def using(library: Library | None) -> Iterator[None]:
    """Compute with `library`, or with torch alone, for as long as this lasts."""
    before = list(_in_use)
    use(library)
    try:
        yield
    finally:
        _in_use[:] = before


def in_use() -> Library | None:
    """Return the library that is computed with; None is torch alone."""
    return _in_use[0] if _in_use else None


def native_on(device: torch.device, dtype: torch.dtype) -> Library | None:
    """Return the library if it is in use and takes activations of this kind: bfloat16 on a CPU."""
    return in_use() if dtype == torch.bfloat16 and device.type == "cpu" else None


def native_for(x: torch.Tensor) -> Library | None:
    """Return the library if it is in use and takes activations like `x`."""
    return native_on(x.device, x.dtype)


def find(wanted: Kernels, *, cure: str = CURE) -> tuple[Library | None, str]:
    """Return the library that `wanted` comes to on this machine, and why. Raises ConfigError where it must be.

    `cure`: what its message ends with.
    """
    if wanted is Kernels.torch:
        return None, "asked for"
    if wanted is Kernels.auto and torch.cpu._is_amx_tile_supported():
        return None, "this CPU multiplies bfloat16 in tiles (AMX), which torch makes use of"
    if wanted is Kernels.auto and torch.backends.cpu.get_cpu_capability() not in _WIDE:
        return None, "this CPU has no AVX2"
    try:
        library = load()
    except UnavailableError as error:
        if wanted is Kernels.native:
            raise ConfigError(f"kernels=native cannot be had here: {error}. {cure}") from None
        return None, str(error)
    kind = "pairs of bfloat16" if library.paired else "widened bfloat16"
    return library, f"products of {kind}; pairs are {library.gain_of_pairs:.2g} times as fast here"

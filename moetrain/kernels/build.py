"""Compiles the C++ sources beside this file for the current CPU, once, and loads the library.

The library is cached in the user's cache folder. Its name depends on the sources, the compiler and the CPU, so machines
of several kinds can share a home directory. The functions are plain C, with pointers and sizes; torch's headers are not
used.

The environment variable MOETRAIN_KERNEL_FLAGS adds compiler flags, separated by spaces; `launch/test_sanitized.sh` adds
those of the sanitizers.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

import torch

from moetrain.files import cache_folder, sync

SOURCES = Path(__file__).parent / "cpu"
_MAIN = "kernels.cpp"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
_FOR_THIS_CPU = ("-march=native",)
_ADDED_FLAGS = "MOETRAIN_KERNEL_FLAGS"
_GAIN_OF_PAIRS = 1.25
"""Minimum speedup at which products use pairs of bfloat16; a CPU's pair instruction is about half or twice as fast as
this."""


class Units(IntEnum):
    """Instructions of a matrix product; the values are those of the enum in the C++ kernels."""

    widened = 0
    """A bfloat16 number widened to float32."""
    paired = 1
    """A pair of bfloat16 numbers."""
    tiles = 2
    """A tile register of AMX."""


_SIGNATURES = {
    "linear": "ippplll",
    "linear_grad_x": "ippplll",
    "linear_grad_w": "ipppllli",
    "swiglu": "pppl",
    "swiglu_backward": "pppppl",
    "expert_rows": "iippppppl" + "ll",
    "expert_rows_backward": "iipppppppppl" + "ll",
    "pack_int4": "ippplll",
    "pack_dense": "pplll",
    "packed_linear": "ippplll",
    "packed_expert_rows": "ipppppl" + "ll",
    "decode_rows": "i" + "pppp" + "ppppp" + "ppp" + "lll",
    "latent_attention": "ippppppppp" + "lllllllf",
    "latent_attention_backward": "ipppppppp" + "ppp" + "lllllllf",
    "rms_norm_rows": "ppppllf",
    "rms_norm_rows_backward": "ppppppll",
    "logprob_rows": "ppppppll",
    "logprob_rows_backward": "ppppppll",
    "router_rows": "pppppp" + "lllllll",
    "spread_rows": "ppplll",
    "sum_rows": "pppplll",
    "sum_rows_backward": "pppppp" + "lll",
    "adamw_step": "ppppl" + "fffffff",
    "sum_of_squares": "plp",
}
"""Argument types per function: p pointer, l int64, i int, f float."""
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


class UnavailableError(Exception):
    """The kernels are unavailable on this machine; the message gives the reason."""


class Library:
    """The compiled functions, callable with tensors and numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        library.gain_of_pairs.restype = ctypes.c_double
        library.packed_bytes.argtypes, library.packed_bytes.restype = (
            [ctypes.c_int, ctypes.c_int64, ctypes.c_int64],
            ctypes.c_int64,
        )
        self.packed_bytes: Callable[[int, int, int], int] = library.packed_bytes
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
            self._functions[name] = function
        self.gain_of_pairs = float(library.gain_of_pairs())
        self.units = Units.tiles if library.tiles_available() else Units(self.gain_of_pairs > _GAIN_OF_PAIRS)

    def __call__(self, name: str, *args: torch.Tensor | float | None) -> None:
        """Call a function. For a tensor, its address is passed; it must be contiguous unless the function takes
        strides.
        """
        self._functions[name](*(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args))


def compiler() -> str | None:
    """Return the path of the C++ compiler: the environment variable CXX if set, else g++; None if not found."""
    return shutil.which(os.environ.get("CXX") or "g++")


@functools.cache
def load(target: Sequence[str] = _FOR_THIS_CPU) -> Library:
    """Return the library for `target`, compiled on first use. Raises UnavailableError."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise UnavailableError(f"they require Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    found = compiler()
    if found is None:
        raise UnavailableError(
            f"no C++ compiler found ({os.environ.get('CXX') or 'g++'}); install g++ or set CXX to a compiler"
        )
    try:
        path = cache_folder() / f"kernels-{_key(found, target)}.so"
    except (OSError, RuntimeError) as error:  # no home directory, or the compiler does not run
        raise UnavailableError(str(error)) from error
    if not path.exists():
        _compile(found, target, path)
    try:
        return Library(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be loaded: {error}") from error


def _flags(target: Sequence[str]) -> list[str]:
    return [*_FLAGS, *target, *os.environ.get(_ADDED_FLAGS, "").split()]


def _key(found: str, target: Sequence[str]) -> str:
    """Return the cache key: it changes with the sources, the compiler, its flags and the CPU."""
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    if "clang" in version:
        raise RuntimeError(f"{found} is clang, whose OpenMP starts threads beside torch's; set CXX to g++")
    parts = [version, " ".join(_flags(target)), _cpu()]
    parts += [path.read_text() for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Return the CPU's instruction sets."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


@contextmanager
def _in_turn(lock: Path) -> Iterator[None]:
    """Let one process of this machine through at a time; all of them on a file system without locks."""
    with lock.open("w") as file:
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            lock.unlink(missing_ok=True)


def _compile(found: str, target: Sequence[str], path: Path) -> None:
    """Write the library atomically, unless another process has meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _in_turn(path.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            if path.exists():
                return
            made = Path(folder) / path.name
            command = [found, *_flags(target), "-o", str(made), str(SOURCES / _MAIN)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                said = result.stderr.strip()[-2000:] or f"exit code {result.returncode}"
                raise UnavailableError(f"{found} cannot compile {SOURCES / _MAIN}: {said}")
            sync(made)  # a library truncated by a power cut would crash the process that loads it
            try:
                os.link(made, path)  # does not replace a file that another rank wrote first and has mapped
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                made.replace(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written: {error}") from error

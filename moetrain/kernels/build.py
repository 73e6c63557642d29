"""Compiles the C++ beside this file for the CPU at hand, once, and loads it.

The library is kept in the user's cache under a name made of the sources, the compiler and the CPU, so that a shared
home serves machines of several kinds. Plain C functions of pointers and sizes: nothing of torch is compiled.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpu"
_MAIN = "kernels.cpp"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden")
_FOR_THIS_CPU = ("-march=native",)
_GAIN_OF_PAIRS = 1.25
"""Gain from which on products take pairs of bfloat16; CPUs have either half of it or twice as much."""

_SIGNATURES = {
    "linear": "ippplll",
    "linear_grad_x": "ippplll",
    "linear_grad_w": "ipppllli",
    "swiglu": "pppl",
    "swiglu_backward": "pppppl",
    "expert_rows": "iippppppl" + "ll",
    "expert_rows_backward": "iipppppppppl" + "ll",
    "latent_attention": "ippppppppp" + "lllllllf",
    "latent_attention_backward": "ipppppppp" + "ppp" + "lllllllf",
    "rms_norm_rows": "ppppllf",
    "rms_norm_rows_backward": "ppppppll",
    "logprob_rows": "ppppppll",
    "logprob_rows_backward": "ppppppll",
    "spread_rows": "ppplll",
    "sum_rows": "pppplll",
    "sum_rows_backward": "pppppp" + "lll",
    "adamw_step": "ppppl" + "fffffff",
    "sum_of_squares": "plp",
}
"""Arguments of each function: p pointer, l int64, i int, f float."""
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


class UnavailableError(Exception):
    """The kernels cannot be had here; the message says why."""


class Library:
    """The compiled functions, called with tensors and numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        library.gain_of_pairs.restype = ctypes.c_double
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [_TYPES[letter] for letter in signature], None
            self._functions[name] = function
        self.gain_of_pairs = float(library.gain_of_pairs())
        self.paired = int(self.gain_of_pairs > _GAIN_OF_PAIRS)

    def __call__(self, name: str, *args: torch.Tensor | float | None) -> None:
        """Call a function; of a tensor, which must be contiguous where the function says nothing else, the address."""
        self._functions[name](*(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args))


def compiler() -> str | None:
    """Return the C++ compiler: CXX of the environment where that is set, else g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


@functools.cache
def load(target: Sequence[str] = _FOR_THIS_CPU) -> Library:
    """Return the library for `target`, compiled now if it never was. Raises UnavailableError."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise UnavailableError(f"they are made for Linux on x86-64, not {platform.system()} on {platform.machine()}")
    found = compiler()
    if found is None:
        raise UnavailableError(
            f"no C++ compiler is here ({os.environ.get('CXX') or 'g++'}); install g++ or name one with CXX"
        )
    try:
        path = _cache() / f"kernels-{_key(found, target)}.so"
    except (OSError, RuntimeError) as error:  # no home, no compiler that runs
        raise UnavailableError(str(error)) from error
    if not path.exists():
        _compile(found, target, path)
    try:
        return Library(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be loaded: {error}") from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetrain"


def _key(found: str, target: Sequence[str]) -> str:
    """Return a name for what is compiled: a change of sources, compiler or CPU makes another library."""
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    if "clang" in version:
        raise RuntimeError(f"{found} is clang, whose OpenMP has threads beside torch's; name g++ with CXX")
    parts = [version, " ".join([*_FLAGS, *target]), _cpu()]
    parts += [path.read_text() for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Return the instruction sets of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


def _compile(found: str, target: Sequence[str], path: Path) -> None:
    """Write the library in one go: ranks that compile at the same time write the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [found, *_FLAGS, *target, "-o", str(made), str(SOURCES / _MAIN)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                said = result.stderr.strip()[-2000:] or f"exit code {result.returncode}"
                raise UnavailableError(f"{found} cannot compile {SOURCES / _MAIN}: {said}")
            with made.open("rb") as file:
                os.fsync(file.fileno())  # a library that a power cut tears would crash whoever loads it
            try:
                os.link(made, path)  # what others have mapped stays: another rank may have been first
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                made.replace(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written: {error}") from error

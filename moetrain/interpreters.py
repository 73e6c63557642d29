"""Finds the interpreters of llama.cpp and vLLM, which have environments of their own. Imports no torch.

Their packages need other versions of shared packages than moetrain, so they run in processes of their own.
`launch/peers.sh` makes the environments.
"""

import os
import subprocess
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from moetrain.errors import ConfigError

_TIMEOUT_S = 60
_LOOKS_FOR = "import sys, importlib.util as found; sys.exit(found.find_spec(sys.argv[1]) is None)"


class ForeignProgram(StrEnum):
    """A program with an environment of its own: its name in `launch/peers.sh` and in config fields."""

    llama = "llama"
    vllm = "vllm"

    @property
    def module(self) -> str:
        """Module whose presence tells that the program is installed."""
        return {ForeignProgram.llama: "llama_cpp", ForeignProgram.vllm: "vllm"}[self]

    @property
    def field(self) -> str:
        """Config field that gives the interpreter."""
        return f"{self.value}_python"

    @property
    def variable(self) -> str:
        """Environment variable that gives the interpreter where the config does not."""
        return f"MOETRAIN_{self.field.upper()}"

    @property
    def cure(self) -> str:
        """What a user does to install the program and to name its interpreter."""
        return f"run launch/peers.sh {self.value} and give {self.field}= or set {self.variable}"


def find_interpreter(program: ForeignProgram, given: str | None) -> str | None:
    """Return the interpreter of `program`; None when it is not installed.

    given: value of the config field; None takes the environment variable, or this interpreter if it has the program.
    Raises ConfigError when an interpreter that was given cannot run or does not have the program.
    """
    source, python = program.field, given
    if python is None:
        source, python = program.variable, os.environ.get(program.variable) or None
    if python is None:
        return sys.executable if find_spec(program.module) is not None else None
    try:
        # -I: a folder of this name in the current folder does not count.
        found = subprocess.run(
            [python, "-I", "-c", _LOOKS_FOR, program.module], capture_output=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{source} is {python}: it does not run ({error}); {program.cure}") from error
    if found.returncode:
        raise ConfigError(f"{source} is {python}: its environment has no {program.module}; {program.cure}")
    return python


def vllm_variables(python: str, *, threads: int, cache_gib: int) -> dict[str, str]:
    """Return the environment of vLLM in one process on a CPU: threads bound to cores, and OpenMP loaded first.

    Beside the present environment it has the variables that vLLM sets for processes which it starts itself. threads: at
    most the cores available to this process. cache_gib: size of its KV cache in GiB.
    """
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:threads]]
    env = os.environ | {
        "OMP_NUM_THREADS": str(len(cores)),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_MLA_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(cores),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    folder = Path(python).parent.parent / "lib"
    if intel := sorted(folder.glob("libiomp5.so")):
        binding = f"granularity=fine,explicit,proclist=[{','.join(cores)}]"
        return env | {
            "LD_PRELOAD": str(intel[0]),
            "KMP_AFFINITY": binding,
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
        }
    if gnu := sorted(folder.glob("python*/site-packages/torch*/lib*/libgomp*.so*")):
        return env | {"LD_PRELOAD": str(gnu[0]), "GOMP_CPU_AFFINITY": " ".join(cores)}
    return env

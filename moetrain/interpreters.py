"""Finds the interpreters of llama.cpp and vLLM, which have environments of their own. Imports no torch.

Their packages need other versions of shared packages than moetrain, so they run in processes of their own.
`launch/peers.sh` makes the environments.
"""

import os
import subprocess
import sys
from enum import StrEnum
from importlib.util import find_spec

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

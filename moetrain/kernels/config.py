"""The config value that selects the kernels. Imports no torch."""

from enum import StrEnum


class Kernels(StrEnum):
    """`native`: the project's own kernels. `auto`: those if they suit this CPU and a compiler is installed, else
    torch's.
    """

    auto = "auto"
    torch = "torch"
    native = "native"

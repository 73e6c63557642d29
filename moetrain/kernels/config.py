"""Which kernels a run takes. Torch-free."""

from enum import StrEnum


class Kernels(StrEnum):
    """`auto`: the project's own where they are made for the CPU at hand and a compiler is there, else torch's."""

    auto = "auto"
    torch = "torch"
    native = "native"

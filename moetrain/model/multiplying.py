"""Modules that multiply, and the kernels that they multiply with."""

from torch import nn

from moetrain.kernels.build import Library


class Multiplying(nn.Module):
    """A module that multiplies. `library`: the native kernels that it uses, None for torch's."""

    library: Library | None = None


def set_kernels(model: nn.Module, library: Library | None) -> None:
    """Hand the kernels to all modules of `model` that multiply."""
    for module in model.modules():
        if isinstance(module, Multiplying):
            module.library = library

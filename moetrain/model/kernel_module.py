"""Base class of the modules that can compute with native kernels, and the function that sets their kernels."""

from torch import nn

from moetrain.kernels.build import Library


class KernelModule(nn.Module):
    """A module that computes with native kernels or with torch. `library`: the native kernels; None selects torch's."""

    library: Library | None = None


def set_kernels(model: nn.Module, library: Library | None) -> None:
    """Set the kernel library of all `KernelModule` modules in `model`; None selects torch's kernels."""
    for module in model.modules():
        if isinstance(module, KernelModule):
            module.library = library

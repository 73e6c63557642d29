"""Base class of modules that compute matrix products or other kernel operations, and the choice of their kernels."""

from torch import nn

from moetrain.kernels.build import Library


class Multiplying(nn.Module):
    """A module that computes with native kernels or with torch. `library`: the native kernels; None selects torch's."""

    library: Library | None = None


def set_kernels(model: nn.Module, library: Library | None) -> None:
    """Set the kernel library of all `Multiplying` modules in `model`; None selects torch's kernels."""
    for module in model.modules():
        if isinstance(module, Multiplying):
            module.library = library

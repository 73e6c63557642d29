"""The weights that an export is compared with: plain tensors, and codes of experts that are stored as codes."""

from collections.abc import Mapping

from torch import Tensor

from moetrain.quant.grids import Quantized

Masters = Mapping[str, Tensor | Quantized]
"""Weights under their names in memory."""


def plain(masters: Masters, name: str) -> Tensor:
    """Return a weight that is no routed expert, and so a plain tensor."""
    weight = masters[name]
    assert isinstance(weight, Tensor)
    return weight

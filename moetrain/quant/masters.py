"""Float32 masters for codes and scales that are trained further: inside the cell of each code, so that none changes.

Masters at the centres must move half a step before a code changes. Masters that are spread over their cells change
codes after small steps, as the masters that were quantised would have.

Shape letters as in `grids`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from moetrain.quant.config import GridName
from moetrain.quant.grids import Quantized, dequantize, quantize

_WIDTHS = (0.5, 0.25)
"""Largest distances from the centre in steps, tried in order. A group that keeps its codes with none stays there."""


class CodeReader(Protocol):
    """Tensors of experts that are stored as codes and scales, by name in memory."""

    def packed_experts(self) -> Mapping[str, int]:
        """Return name and number of experts of each tensor; all experts of it are stored so."""

    def codes(self, name: str, *, first: int, last: int) -> Quantized:
        """Return codes and scales of the experts [first, last) of a tensor, as stored.

        Raises CheckpointError if they cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class Masters:
    """Masters of codes and scales. num_changed: groups whose codes or scale the grid does not give again."""

    weights_XOI: Tensor
    num_groups: int
    num_changed: int


def masters_of(quantized: Quantized, *, grid: GridName, stream: torch.Generator | None = None) -> Masters:
    """Return float32 masters for codes and scales, at the centres of the codes, or spread over their cells.

    stream: random numbers that spread them; None leaves them at the centres. Spread masters give the same codes and
    scales on `grid` as the centres do. The largest weights of a group, which set its scale, stay at the centres.
    """
    centres_XOI = dequantize(quantized).float()
    again = quantize(centres_XOI, grid=grid, group_size=quantized.group_size)
    is_kept_XOG = _same_groups(again, quantized)
    weights_XOI = centres_XOI
    if stream is not None:
        weights_XOI = _spread(again, centres_XOI, grid=grid, stream=stream)
    return Masters(weights_XOI=weights_XOI, num_groups=is_kept_XOG.numel(), num_changed=int((~is_kept_XOG).sum()))


def num_changed_groups(quantized: Quantized, *, grid: GridName) -> int:
    """Return the number of groups whose codes or scale change when the weights are quantised again on `grid`."""
    return masters_of(quantized, grid=grid).num_changed


def _spread(quantized: Quantized, centres_XOI: Tensor, *, grid: GridName, stream: torch.Generator) -> Tensor:
    """Return masters spread over the cells of the codes that `grid` gives to the centres."""
    size = quantized.group_size
    codes_XOGS = rearrange(quantized.codes_XOI.abs(), "... (G S) -> ... G S", S=size)
    is_free_XOI = (codes_XOGS < codes_XOGS.amax(dim=-1, keepdim=True)).flatten(-2)
    steps_XOI = quantized.scales_XOG.float().repeat_interleave(size, dim=-1)
    offsets_XOI = (2 * torch.rand(centres_XOI.shape, generator=stream) - 1) * steps_XOI * is_free_XOI
    weights_XOI = centres_XOI
    for width in reversed(_WIDTHS):
        spread_XOI = centres_XOI + width * offsets_XOI
        is_same_XOG = _same_groups(quantize(spread_XOI, grid=grid, group_size=size), quantized)
        weights_XOI = torch.where(is_same_XOG.repeat_interleave(size, dim=-1), spread_XOI, weights_XOI)
    return weights_XOI


def _same_groups(left: Quantized, right: Quantized) -> Tensor:
    """Return which groups have the same codes and the same scale, bool [X, O, G]."""
    is_same_XOGS = rearrange(left.codes_XOI == right.codes_XOI, "... (G S) -> ... G S", S=right.group_size)
    is_same_XOG: Tensor = is_same_XOGS.all(dim=-1) & (left.scales_XOG == right.scales_XOG)
    return is_same_XOG

"""Quantised weights in the forward pass, the gradient straight through to the fp32 masters.

The gradient of the rounding is taken as one everywhere (arXiv 1308.3432), the term through the scale is dropped.
"""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from moetrain.quant.config import GridName
from moetrain.quant.grids import dequantize, quantize


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_XOI: Tensor, rounded_XOI: Tensor) -> Tensor:
        """Return the rounded weight; autograd sees the master as its source."""
        ctx.master_dtype = weight_XOI.dtype
        return rounded_XOI.view_as(rounded_XOI)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on unchanged, in the master's dtype."""
        return grad_outputs[0].to(ctx.master_dtype), None


class Keep(StrEnum):
    """How long the quantised weights stay in memory: until the masters change, or for one product."""

    step = "step"
    call = "call"


class FakeQuantizer:
    """Makes the weights that the exported codes stand for; with `Keep.step` once a matrix until `invalidate` is called.

    One object serves the matrices of one experts module: what it made is kept beside the tensor it was made from. An
    optimizer that writes through `.data` leaves no trace on a tensor, so whoever changes the masters must call
    `invalidate`; a change that torch does record is noticed without it.
    """

    def __init__(self, *, grid: GridName, group_size: int, keep: Keep = Keep.step) -> None:
        """Quantise on `grid` in groups of `group_size` inputs."""
        self.keep = keep
        self.grid = grid
        self.group_size = group_size
        self._rounded: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    def __call__(self, weight_XOI: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight [..., out, in] in `compute_dtype`: bf16 numbers, also when that is float32.

        Its gradient reaches `weight_XOI`, the fp32 master, unchanged.
        """
        key = (id(weight_XOI), compute_dtype)
        kept = self._rounded.get(key)
        if kept is None or kept[0] is not weight_XOI or kept[1] != weight_XOI._version:
            with torch.no_grad():
                quantized = quantize(weight_XOI, grid=self.grid, group_size=self.group_size)
                rounded_XOI = dequantize(quantized).to(compute_dtype)
            kept = (weight_XOI, weight_XOI._version, rounded_XOI)
            if self.keep is Keep.step:
                self._rounded[key] = kept
        result: Tensor = _StraightThrough.apply(weight_XOI, kept[2])  # type: ignore[no-untyped-call]
        return result

    def invalidate(self) -> None:
        """Forget what was made; call after every change of the masters."""
        self._rounded.clear()

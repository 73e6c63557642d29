"""Fake quantisation: quantised weights in the forward pass, straight-through gradients to the fp32 masters.

The gradient of the rounding is 1 everywhere (arXiv 1308.3432); the gradient through the scale is ignored.
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
        """Return the rounded weight; autograd treats it as a function of the master."""
        ctx.master_dtype = weight_XOI.dtype
        return rounded_XOI.view_as(rounded_XOI)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged, in the master's dtype."""
        return grad_outputs[0].to(ctx.master_dtype), None


class Keep(StrEnum):
    """How long the quantised weights stay in memory: until the masters change (`step`), or for one product (`call`)."""

    step = "step"
    call = "call"


class FakeQuantizer:
    """Returns the weights that the exported codes represent; with `Keep.step` they are cached until `invalidate` is
    called.

    One object serves all matrices of one experts module and caches each result with its source tensor. A change that
    torch records in the tensor's version is detected. An optimizer that writes through `.data` is not, so code that
    changes the masters must call `invalidate`.
    """

    def __init__(self, *, grid: GridName, group_size: int, keep: Keep = Keep.step) -> None:
        """Quantise on `grid` in groups of `group_size` inputs."""
        self.keep = keep
        self.grid = grid
        self.group_size = group_size
        self._rounded: dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    def __call__(self, weight_XOI: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Return the dequantised weight [..., out, in] in `compute_dtype`; its values are bf16 numbers even in float32.

        Its gradient passes unchanged to `weight_XOI`, the fp32 master.
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
        """Clear the cache; call this after every change of the masters."""
        self._rounded.clear()

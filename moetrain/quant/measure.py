"""How far quantised weights are from their masters and from those of another step, as numbers for the log."""

import torch
from torch import Tensor

from moetrain.quant.grids import Quantized, dequantize


def code_flip_rate(before: Quantized, *, after: Quantized) -> float:
    """Return the share of codes, 0 to 1, that differ between two quantised versions of one weight."""
    return float((before.codes_XOI != after.codes_XOI).double().mean())


def scale_change_rate(before: Quantized, *, after: Quantized) -> float:
    """Return the share of scales, 0 to 1, that differ between two quantised versions of one weight."""
    return float((before.scales_XOG != after.scales_XOG).double().mean())


def relative_rmse(weight_XOI: Tensor, *, quantized: Quantized) -> float:
    """Return the root mean square of the quantisation error over that of the fp32 weight; 0 for a weight of zeros."""
    error_XOI = dequantize(quantized).double() - weight_XOI.detach().double()
    norm = torch.linalg.vector_norm(weight_XOI.detach().double())
    return float(torch.linalg.vector_norm(error_XOI) / norm) if norm > 0 else 0.0

"""The numerics of quantisation: how a weight matrix becomes codes and scales, and back.

Training, rollout, export and evaluation all use these functions; no other code in the package rounds a weight to a
grid. `formats` packs codes and scales into files, `fake_quant` has the straight-through gradient. The order of
roundings is part of the contract; docs/numerics.md specifies it.

Shape letters: X any leading axes (experts), O outputs, I inputs, G groups of consecutive inputs, S inputs per group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.quant.config import GridName

SMALLEST_SCALE = 2.0**-17
"""A group whose scale is below this becomes zero. Every bf16 scale of at least this power of two is also an fp16
number, so no reader flushes a group to zero that another reader keeps."""

ZERO_GROUP_SCALE = 1.0
"""The scale stored for a zero group. Any value would do; 1 is exact in every format."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A row of `GRIDS`: how to compute the scale of a group, and the code of a weight divided by its scale."""

    scales_of: Callable[[Tensor], Tensor]
    """Maps bf16 groups [X, O, G, S] to bf16 scales [X, O, G], before groups near zero are handled."""
    codes_of: Callable[[Tensor], Tensor]
    """Maps bf16 quotients (weight / scale) of any shape to the nearest codes, in the same shape and dtype."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix, or a stack of matrices, as codes and scales; code * scale, rounded to bf16, is the weight."""

    codes_XOI: Tensor
    """int8, each within the range of the grid."""
    scales_XOG: Tensor
    """bf16; group g covers inputs g * group_size to (g + 1) * group_size - 1."""

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale."""
        return self.codes_XOI.shape[-1] // self.scales_XOG.shape[-1]

    def __getitem__(self, expert: int) -> "Quantized":
        """Return the slice at index `expert` of the first axis."""
        return Quantized(codes_XOI=self.codes_XOI[expert], scales_XOG=self.scales_XOG[expert])


def _grouped(x_XOI: Tensor, *, group_size: int) -> Tensor:
    return rearrange(x_XOI, "... (G S) -> ... G S", S=group_size)


def _ungrouped(x_XOGS: Tensor) -> Tensor:
    return rearrange(x_XOGS, "... G S -> ... (G S)")


def _kimi7_scales(weight_XOGS: Tensor) -> Tensor:
    amax_XOG = weight_XOGS.abs().float().amax(dim=-1)
    return (amax_XOG / 7).to(torch.bfloat16)


def _kimi7_codes(quotients: Tensor) -> Tensor:
    return quotients.round().clamp(-7, 7)


E2M1_HALVES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Magnitudes of e2m1, the 4-bit float of OCP Microscaling Formats 1.0 (0 to 6), counted in halves."""
_E2M1_LARGEST_EXPONENT = 2
_ROUNDS_UP = 0.875  # relative to the next power of two: 7 / 8 is halfway between the largest number, 6, and 8


def _mx_scales(weight_XOGS: Tensor) -> Tensor:
    """Return half of the scale 2^e that the format stores, because codes count halves.

    e is the exponent of the largest weight minus that of the largest e2m1 number. If the largest weight is at least 7
    times the scale, and so closer to 8 than to 6 times, e is one higher, as in compressed-tensors.
    """
    amax_XOG = weight_XOGS.abs().float().amax(dim=-1)
    mantissas_XOG, exponents_XOG = torch.frexp(amax_XOG)  # mantissas from 0.5 to 1
    exponents_XOG = exponents_XOG - 1 + (mantissas_XOG >= _ROUNDS_UP).int() - _E2M1_LARGEST_EXPONENT
    halves_XOG = torch.ldexp(torch.ones_like(amax_XOG), exponents_XOG - 1)
    return halves_XOG.masked_fill(amax_XOG == 0, 0.0).to(torch.bfloat16)


def _mx_codes(quotients: Tensor) -> Tensor:
    """Return the nearest e2m1 numbers in halves, ties to even mantissa: in steps of 1 up to 4, of 2 up to 8, of 4 up to
    12.
    """
    magnitudes = quotients.abs()
    steps = torch.where(magnitudes <= 4, 1.0, torch.where(magnitudes <= 8, 2.0, 4.0))
    return ((quotients / steps).round() * steps).clamp(-E2M1_HALVES[-1], E2M1_HALVES[-1])


_FITTED_DIVISORS = (7, 8, 6, 5, 4)
"""Codes that the largest weight of a group may have, the most usual first."""
_FITTED_AT_ONCE = 1 << 16
"""Weights that a CPU computes at once, so that the five tries stay in its cache."""
_FITTED_AT_ONCE_ON_GPU = 1 << 26
"""Weights that a GPU computes at once, so that it is not waited for often."""
_ON_GRID = 0.1
"""Distance to the codes, in steps, below which weights are codes times one scale. The rounding to bf16 causes at most
1 / 16; if the largest code is taken for its neighbour, a weight of code 1 or -1 is at least 1 / 8 away."""


def _fitted_scales(weight_XOGS: Tensor) -> Tensor:
    """Return the scales that leave the smallest largest error, out of those that give the largest weight a whole code.

    If all weights of a group are codes times one scale, this is the scale: least squares gives it but for the last bit,
    and the bf16 number that gives every weight again is taken. Maxima, and sums that float64 holds exactly, do not
    depend on the order of the weights.
    """
    groups_NS = weight_XOGS.flatten(0, -2)
    at_once = _FITTED_AT_ONCE if weight_XOGS.device.type == "cpu" else _FITTED_AT_ONCE_ON_GPU
    size = max(at_once // groups_NS.shape[-1], 1)
    return torch.cat([_fitted_scales_of(part) for part in torch.split(groups_NS, size)]).view(weight_XOGS.shape[:-1])


def _fitted_scales_of(groups_NS: Tensor) -> Tensor:
    weights_NS = groups_NS.float()
    amax_N1 = weights_NS.abs().amax(dim=-1, keepdim=True)
    inverse_N1 = amax_N1.masked_fill(amax_N1 == 0, torch.inf).reciprocal()
    divisors_N1 = torch.full_like(amax_N1, _FITTED_DIVISORS[0])
    errors_N1 = torch.full_like(amax_N1, torch.inf)
    for divisor in _FITTED_DIVISORS:
        quotients_NS = weights_NS * (divisor * inverse_N1)
        distances_N1 = quotients_NS.sub_(_fitted_codes(quotients_NS)).abs_().amax(dim=-1, keepdim=True)
        error_N1 = (distances_N1 / divisor).masked_fill_(distances_N1 < _ON_GRID, 0.0)
        divisors_N1.masked_fill_(error_N1 < errors_N1, divisor)
        errors_N1 = torch.minimum(errors_N1, error_N1)
    scales_N = (amax_N1 / divisors_N1).squeeze(-1)
    is_on_grid_N = (errors_N1 == 0).squeeze(-1)
    exact_N = _exact_scales(scales_N[is_on_grid_N], weights_NS[is_on_grid_N])
    return scales_N.to(torch.bfloat16).masked_scatter(is_on_grid_N, exact_N)


def _exact_scales(steps_N: Tensor, weights_NS: Tensor) -> Tensor:
    """Return the scales, in bf16, of groups that are codes times a scale; steps_N: close to them."""
    codes_NS = _fitted_codes(weights_NS / steps_N.masked_fill(steps_N == 0, torch.inf).unsqueeze(-1))
    products_N, squares_N = (weights_NS.double() * codes_NS).sum(-1), codes_NS.double().square().sum(-1)
    nearest_N = (products_N / squares_N.clamp(min=1)).to(torch.bfloat16)
    weights_NS, exact_N = weights_NS.to(torch.bfloat16), nearest_N
    for step in (-1, 1, 0):
        near_N = (nearest_N.view(torch.int16) + step).view(torch.bfloat16)
        gives_all_N = (codes_NS.to(torch.bfloat16) * near_N.unsqueeze(-1) == weights_NS).all(dim=-1)
        exact_N = torch.where(gives_all_N, near_N, exact_N)
    return exact_N


def _fitted_codes(quotients: Tensor) -> Tensor:
    return quotients.round().clamp(-8, 7)


GRIDS: Mapping[GridName, Grid] = MappingProxyType(
    {
        # The rule of the released Kimi K2 Thinking family: 15 of the 16 codes; requantisation changes nothing.
        GridName.kimi7: Grid(scales_of=_kimi7_scales, codes_of=_kimi7_codes),
        # For codes and scales of other rules: code -8, and groups whose largest code is not 7.
        GridName.fitted: Grid(scales_of=_fitted_scales, codes_of=_fitted_codes),
        # MXFP4: e2m1 codes, scales that are powers of two; requantisation changes nothing.
        GridName.mx: Grid(scales_of=_mx_scales, codes_of=_mx_codes),
    }
)
"""All grids that a config can select."""


def quantize(weight_XOI: Tensor, *, grid: GridName, group_size: int) -> Quantized:
    """Return the codes and scales of `weight_XOI` [..., out, in], fp32 or bf16, on the grid.

    The weight is cast to bf16 before quantisation, so that the fp32 master and the dequantised weight give the same
    codes. Raises ConfigError if `group_size` does not divide the inputs.
    """
    rule = GRIDS[grid]
    check_group_size(weight_XOI.shape[-1], group_size=group_size)
    weight_XOGS = _grouped(weight_XOI.detach().to(torch.bfloat16), group_size=group_size)
    raw_scales_XOG = rule.scales_of(weight_XOGS)
    is_zero_XOG = raw_scales_XOG.abs() < SMALLEST_SCALE
    divisors_XOG1 = raw_scales_XOG.masked_fill(is_zero_XOG, torch.inf).unsqueeze(-1)  # makes all codes 0
    codes_XOGS = rule.codes_of(weight_XOGS / divisors_XOG1)
    scales_XOG = raw_scales_XOG.masked_fill(is_zero_XOG, ZERO_GROUP_SCALE)
    return Quantized(codes_XOI=_ungrouped(codes_XOGS.to(torch.int8)), scales_XOG=scales_XOG)


def codes_of(weight_XOI: Tensor | Quantized, *, grid: GridName, group_size: int) -> Quantized:
    """Return weights that are codes and scales as they are, and others quantised."""
    if isinstance(weight_XOI, Quantized):
        return weight_XOI
    return quantize(weight_XOI, grid=grid, group_size=group_size)


def dequantize(quantized: Quantized) -> Tensor:
    """Return the bf16 weight [..., out, in]: code times scale, rounded once."""
    codes_XOGS = _grouped(quantized.codes_XOI, group_size=quantized.group_size).to(torch.bfloat16)
    return _ungrouped(codes_XOGS * quantized.scales_XOG.unsqueeze(-1))


def num_zero_groups(quantized: Quantized) -> int:
    """Return the number of groups in which all codes are zero: all-zero weights, or a scale below `SMALLEST_SCALE`."""
    codes_XOGS = _grouped(quantized.codes_XOI, group_size=quantized.group_size)
    return int((codes_XOGS == 0).all(dim=-1).sum())


def check_group_size(num_inputs: int, *, group_size: int) -> None:
    """Raise ConfigError if `group_size` does not divide `num_inputs`, the row length of a matrix."""
    if num_inputs % group_size:
        raise ConfigError(
            f"quant.group_size is {group_size}: it must divide the {num_inputs} inputs of an expert matrix "
            "(model.hidden_size and model.moe_intermediate_size)"
        )

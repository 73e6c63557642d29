"""Masters of codes and scales: on their grid they give the same codes and scales again, spread over the cells too."""

import pytest
import torch
from torch import Tensor

from moetrain.quant.config import GridName
from moetrain.quant.grids import Quantized, dequantize, quantize
from moetrain.quant.masters import masters_of

GROUP = 32


def _codes(divisor: float, *, seed: int = 0, num_rows: int = 512) -> Quantized:
    """Return what a rule gives that divides the largest weight by `divisor` and clips to all 16 codes."""
    weight = 0.02 * torch.randn(num_rows, 8, GROUP, generator=torch.Generator().manual_seed(seed))
    scales = (weight.bfloat16().float().abs().amax(-1) / divisor).bfloat16()
    codes = (weight / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    return Quantized(codes_XOI=codes.to(torch.int8).flatten(1), scales_XOG=scales)


def _offsets(masters: Tensor, quantized: Quantized) -> Tensor:
    """Return the distances of masters from the centres of their codes, in steps."""
    steps = quantized.scales_XOG.float().repeat_interleave(GROUP, -1)
    return (masters - dequantize(quantized).float()) / steps


def _is_same(left: Quantized, right: Quantized) -> bool:
    return torch.equal(left.codes_XOI, right.codes_XOI) and torch.equal(left.scales_XOG, right.scales_XOG)


@pytest.mark.parametrize("divisor", [5.4, 6.3, 7.0, 7.5, 9.0])
@pytest.mark.parametrize("is_spread", [False, True])
def test_the_fitted_grid_gives_the_codes_and_scales_of_every_rule_again(divisor: float, is_spread: bool) -> None:
    quantized = _codes(divisor)
    assert int(quantized.codes_XOI.min()) == (-8 if divisor > 7 else -round(divisor))
    stream = torch.Generator().manual_seed(1) if is_spread else None
    masters = masters_of(quantized, grid=GridName.fitted, stream=stream)
    assert masters.num_changed == 0 and masters.num_groups == 512 * 8
    assert _is_same(quantize(masters.weights_XOI, grid=GridName.fitted, group_size=GROUP), quantized)


def test_every_scale_and_sign_of_the_largest_weight_is_kept_by_the_fitted_grid() -> None:
    scales = (2.0**-9 * (1 + torch.arange(128) / 128)).bfloat16().repeat_interleave(8).view(-1, 1)
    largest = torch.tensor([4, 5, 6, 7, -5, -6, -7, -8]).repeat(128).view(-1, 1)
    others = torch.randint(-3, 4, (len(scales), GROUP - 3), generator=torch.Generator().manual_seed(2))
    codes = torch.cat([largest, torch.ones_like(largest), torch.full_like(largest, 3), others], -1).to(torch.int8)
    quantized = Quantized(codes_XOI=codes, scales_XOG=scales)
    assert masters_of(quantized, grid=GridName.fitted).num_changed == 0


@pytest.mark.parametrize("codes", [[0] * 32, [2, -4, 6] + [0] * 29, [7] + [0] * 31, [-4, 1] + [0] * 30])
def test_groups_that_another_scale_gives_as_well_are_counted_where_they_change(codes: list[int]) -> None:
    """The weights say nothing about the scale; the dequantised weights stay the same but for the group of one code."""
    quantized = Quantized(
        codes_XOI=torch.tensor([codes], dtype=torch.int8), scales_XOG=torch.tensor([[0.01]]).bfloat16()
    )
    masters = masters_of(quantized, grid=GridName.fitted)
    again = quantize(masters.weights_XOI, grid=GridName.fitted, group_size=GROUP)
    assert masters.num_changed == int(not _is_same(again, quantized))
    assert torch.equal(dequantize(again), dequantize(quantized))


def test_the_grid_of_the_released_models_changes_foreign_codes_and_counts_them() -> None:
    assert masters_of(_codes(7.0), grid=GridName.kimi7).num_changed == 0
    foreign = _codes(6.3)
    masters = masters_of(foreign, grid=GridName.kimi7)
    again = quantize(masters.weights_XOI, grid=GridName.kimi7, group_size=GROUP)
    is_changed = (again.codes_XOI != foreign.codes_XOI).view(512, 8, GROUP).any(-1)
    is_changed |= again.scales_XOG != foreign.scales_XOG
    assert masters.num_changed == int(is_changed.sum()) > 4000


@pytest.mark.parametrize(("grid", "divisor", "share"), [(GridName.kimi7, 7.0, 0.99), (GridName.fitted, 7.5, 0.9)])
def test_spread_masters_lie_anywhere_in_their_cells_and_small_steps_change_codes(
    grid: GridName, divisor: float, share: float
) -> None:
    quantized = _codes(divisor)
    spread, again = (
        masters_of(quantized, grid=grid, stream=torch.Generator().manual_seed(seed)).weights_XOI for seed in (1, 1)
    )
    assert torch.equal(spread, again)
    offsets = _offsets(spread, quantized)
    assert float(offsets.abs().max()) <= 0.5
    assert float((offsets.view(-1, GROUP).abs().amax(-1) > 0).float().mean()) > share
    assert 0.2 < float(offsets.std()) < 0.29  # of a uniform one 1 / sqrt(12)
    moved = spread + 0.02 * quantized.scales_XOG.float().repeat_interleave(GROUP, -1)
    centres = masters_of(quantized, grid=grid).weights_XOI + 0.02 * quantized.scales_XOG.repeat_interleave(GROUP, -1)
    flips = [
        float((quantize(weights, grid=grid, group_size=GROUP).codes_XOI != quantized.codes_XOI).float().mean())
        for weights in (moved, centres)
    ]
    assert flips[0] > 0.01 and flips[1] < flips[0] / 2


def test_masters_of_mxfp4_keep_their_codes() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    quantized = quantize(weight, grid=GridName.mx, group_size=GROUP)
    masters = masters_of(quantized, grid=GridName.mx, stream=torch.Generator().manual_seed(1))
    assert masters.num_changed == 0
    assert _is_same(quantize(masters.weights_XOI, grid=GridName.mx, group_size=GROUP), quantized)
    assert float(_offsets(masters.weights_XOI, quantized).abs().max()) > 0.2


def _reference(values: list[float]) -> tuple[list[int], float]:
    """Return codes and scale of one group off any grid: of five scales the one with the smallest largest error."""
    amax = max(map(abs, values))
    errors = {}
    for divisor in (7, 8, 6, 5, 4):
        step = amax / divisor
        errors[divisor] = max(abs(v - step * max(-8, min(7, round(v / step)))) for v in values)
    best = min(errors, key=lambda divisor: errors[divisor])
    scale = float(torch.tensor(amax / best).bfloat16())
    quotients = [float(torch.tensor(v).bfloat16() / torch.tensor(scale).bfloat16()) for v in values]
    return [max(-8, min(7, round(q))) for q in quotients], scale


def test_codes_and_scales_of_the_fitted_grid_equal_a_scalar_reference() -> None:
    weight = 0.02 * torch.randn(24, GROUP, generator=torch.Generator().manual_seed(6))
    quantized = quantize(weight, grid=GridName.fitted, group_size=GROUP)
    assert int(quantized.codes_XOI.min()) == -8 and int(quantized.codes_XOI.max()) == 7
    many = torch.randn(512, 1024, generator=torch.Generator().manual_seed(7))
    error = dequantize(quantize(many, grid=GridName.fitted, group_size=GROUP)) - many
    assert 0.0915 < float(error.norm() / many.norm()) < 0.0925
    for row in range(len(weight)):
        codes, scale = _reference(weight[row].bfloat16().tolist())
        assert quantized.codes_XOI[row].tolist() == codes
        assert float(quantized.scales_XOG[row, 0]) == scale

"""The kimi7 grid against a scalar reference, and the properties that the promises rest on."""

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.quant.config import GridName
from moetrain.quant.grids import SMALLEST_SCALE, Quantized, dequantize, num_zero_groups, quantize


def _weights(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(3, 40, 64, generator=generator)
    if kind == "gauss":
        return 0.02 * normal
    if kind == "heavy":
        return 0.02 * normal * normal.abs() ** 1.5
    return normal * torch.logspace(-12, 3, 64)  # magnitudes across the range of bf16


def _quantize(weight: torch.Tensor) -> Quantized:
    return quantize(weight, grid=GridName.kimi7, group_size=32)


def _bf16(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32).to(torch.bfloat16))


def _reference_group(values: list[float]) -> tuple[list[int], float]:
    """The rule of docs/numerics.md, one number at a time; float32 quotients, each rounded once more to bf16."""
    rounded = [_bf16(v) for v in values]
    amax = max(abs(v) for v in rounded)
    scale = _bf16(float(torch.tensor(amax, dtype=torch.float32) / torch.tensor(7.0)))
    if scale < 2.0**-17:
        return [0] * len(values), 1.0
    quotients = [_bf16(float(torch.tensor(v, dtype=torch.float32) / torch.tensor(scale))) for v in rounded]
    return [max(-7, min(7, round(q))) for q in quotients], scale  # Python rounds halves to even


@pytest.mark.parametrize("kind", ["gauss", "heavy", "wide"])
def test_codes_and_scales_equal_a_scalar_reference(kind: str) -> None:
    weight = _weights(kind)[0, :6]
    quantized = _quantize(weight)
    for row in range(6):
        for group in range(2):
            columns = slice(32 * group, 32 * group + 32)
            codes, scale = _reference_group(weight[row, columns].tolist())
            assert quantized.codes_XOI[row, columns].tolist() == codes
            assert float(quantized.scales_XOG[row, group]) == scale


@pytest.mark.parametrize("kind", ["gauss", "heavy", "wide"])
def test_quantising_the_dequantised_weight_gives_the_same_codes_and_scales(kind: str) -> None:
    once = _quantize(_weights(kind))
    again = _quantize(dequantize(once))
    assert torch.equal(once.codes_XOI, again.codes_XOI)
    assert torch.equal(once.scales_XOG, again.scales_XOG)


def test_every_bf16_mantissa_of_the_largest_weight_is_a_fixed_point() -> None:
    mantissas = (1 + torch.arange(128) / 128).repeat_interleave(4).reshape(128, 4)
    weight = torch.zeros(128, 4, 32)
    weight[..., 0] = mantissas * torch.tensor([1.0, 2.0**-9, 2.0**7, -(2.0**-3)])
    weight[..., 1:] = weight[..., :1] * torch.linspace(-1, 1, 31)
    once = _quantize(weight)
    again = _quantize(dequantize(once))
    assert torch.equal(once.codes_XOI, again.codes_XOI)
    assert torch.equal(once.scales_XOG, again.scales_XOG)


def test_the_largest_weight_of_a_group_has_code_seven_and_minus_eight_never_occurs() -> None:
    codes = _quantize(_weights("gauss")).codes_XOI.unflatten(-1, (-1, 32))
    assert torch.equal(codes.abs().amax(-1), torch.full_like(codes[..., 0], 7))
    assert int(codes.min()) == -7


def test_fp32_masters_and_their_bf16_cast_have_the_same_codes() -> None:
    weight = _weights("gauss")
    assert torch.equal(_quantize(weight).codes_XOI, _quantize(weight.bfloat16()).codes_XOI)


def test_groups_with_a_scale_below_the_smallest_become_zero_and_are_counted() -> None:
    weight = torch.zeros(4, 32)
    weight[1, 3] = 7 * SMALLEST_SCALE  # kept: its scale is the smallest itself
    weight[2, 3] = 6.5 * SMALLEST_SCALE
    weight[3, 3] = 1e-39  # a bf16 subnormal
    quantized = _quantize(weight)
    assert num_zero_groups(quantized) == 3
    assert quantized.scales_XOG.flatten().tolist() == [1.0, SMALLEST_SCALE, 1.0, 1.0]
    assert torch.equal(dequantize(quantized), torch.where(weight == weight[1, 3], weight, 0.0).bfloat16())


def test_every_stored_scale_is_also_an_fp16_number() -> None:
    scales = _quantize(_weights("wide")).scales_XOG
    assert torch.equal(scales.half().float(), scales.float())


def test_a_group_size_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant.group_size is 32: it must divide the 48 inputs"):
        quantize(torch.zeros(2, 48), grid=GridName.kimi7, group_size=32)


def test_the_rounding_error_of_gaussian_weights_is_that_of_the_grid() -> None:
    weight = 0.02 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    error = dequantize(_quantize(weight)).double() - weight.double()
    assert float(error.norm() / weight.double().norm()) == pytest.approx(0.0971, abs=0.002)

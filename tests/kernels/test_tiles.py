"""Products by the tiles of AMX have the bits of sums in the stated order, for any number of rows."""

import pytest
import torch

from moetrain.kernels.build import Library, Units, load
from moetrain.quant.config import GridName
from moetrain.quant.grids import Quantized, dequantize, quantize
from tests.ops.test_native import library_for
from tests.threads import num_threads

HAS_TILES = torch.cpu._is_amx_tile_supported() and load().units is Units.tiles
TILES = [("-march=native", Units.tiles)] if HAS_TILES else []
"""The library for tiles, where this CPU has them."""

pytestmark = pytest.mark.skipif(not TILES, reason="this CPU has no tiles")
_PART = 32
"""Inputs whose products are added before the sum."""


@pytest.fixture
def library() -> Library:
    return library_for(*TILES[0])


def _product(x_RK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """Return the product by float32 sums in the order of tiles, rounded to bfloat16; products of bfloat16 are exact."""
    x_KR1, weight_K1N = x_RK.float().T[:, :, None], weight_NK.float().T[:, None]
    total_RN = torch.zeros(len(x_RK), len(weight_NK))
    for start in range(0, len(x_KR1), _PART):
        even_RN, odd_RN = torch.zeros_like(total_RN), torch.zeros_like(total_RN)
        for i in range(start, start + _PART, 2):
            even_RN += x_KR1[i] * weight_K1N[i]
            odd_RN += x_KR1[i + 1] * weight_K1N[i + 1]
        total_RN += even_RN + odd_RN
    return total_RN.bfloat16()


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_dense_product_has_the_stated_order_for_any_number_of_rows(library: Library) -> None:
    x_RK, weight_NK = _draw(70, 1088, seed=0).bfloat16(), _draw(83, 1088, seed=1).bfloat16()
    packed = torch.empty(library.packed_bytes(0, 83, 1088), dtype=torch.uint8)
    library("pack_dense", weight_NK, packed, 1, 83, 1088)
    expected_RN = _product(x_RK, weight_NK)
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 70):
        found_RN = torch.empty(rows, 83, dtype=torch.bfloat16)
        library("packed_linear", Units.tiles, x_RK[:rows].contiguous(), packed, found_RN, rows, 83, 1088)
        assert torch.equal(found_RN, expected_RN[:rows])


def _expert_rows(
    library: Library, x_SD: torch.Tensor, counts: list[int], gate_up: Quantized, down: Quantized
) -> torch.Tensor:
    num, hidden, width = down.codes_XOI.shape
    packed_in = torch.empty(2 * num * library.packed_bytes(1, width, hidden), dtype=torch.uint8)
    packed_out = torch.empty(num * library.packed_bytes(1, hidden, width), dtype=torch.uint8)
    library("pack_int4", Units.tiles, gate_up.codes_XOI, gate_up.scales_XOG, packed_in, 2 * num, width, hidden)
    library("pack_int4", Units.tiles, down.codes_XOI, down.scales_XOG, packed_out, num, hidden, width)
    y_SD = torch.empty_like(x_SD)
    ends = torch.tensor(counts).cumsum(0)
    library("packed_expert_rows", Units.tiles, x_SD, ends, packed_in, packed_out, y_SD, num, hidden, width)
    return y_SD


def _expected_rows(
    library: Library, x_SD: torch.Tensor, counts: list[int], gate_up: Quantized, down: Quantized
) -> torch.Tensor:
    found = []
    for expert, x_RD in enumerate(x_SD.split(counts)):  # type: ignore[no-untyped-call]
        gate_RF, up_RF = _product(x_RD, dequantize(gate_up[expert]).bfloat16()).chunk(2, -1)
        gate_RF, up_RF = gate_RF.contiguous(), up_RF.contiguous()
        inner_RF = torch.empty_like(gate_RF)
        library("swiglu", gate_RF, up_RF, inner_RF, inner_RF.numel())
        found.append(_product(inner_RF, dequantize(down[expert]).bfloat16()))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("counts", "hidden", "width"),
    [([1, 0, 3, 9], 1024, 64), ([40, 1, 8, 5], 96, 32), ([2, 7, 17, 33], 544, 96), ([0, 0, 0, 1], 32, 32)],
)
def test_packed_experts_multiply_the_weights_of_training(
    counts: list[int], hidden: int, width: int, library: Library
) -> None:
    num = len(counts)
    weights = [_draw(num, 2 * width, hidden, seed=2) * 0.05, _draw(num, hidden, width, seed=3) * 0.05]
    for weight in weights:
        weight[0, 0, :32] = 0  # a group without a scale
    gate_up, down = (quantize(weight, grid=GridName.kimi7, group_size=32) for weight in weights)
    down.scales_XOG[0, 1] *= -1
    x_SD = _draw(sum(counts), hidden, seed=4).bfloat16()
    found_SD = _expert_rows(library, x_SD, counts, gate_up, down)
    expected_SD = _expected_rows(library, x_SD, counts, gate_up, down)
    # An inner number that SwiGLU rounds another way moves few outputs by one rounding.
    assert float((found_SD != expected_SD).float().mean()) < 0.05
    assert torch.allclose(
        found_SD.float(), expected_SD.float(), rtol=2.0**-7, atol=2.0**-9 * float(expected_SD.abs().max())
    )
    with num_threads(1):
        assert torch.equal(_expert_rows(library, x_SD, counts, gate_up, down), found_SD)


def test_columns_that_fill_no_panel_and_groups_with_scale_zero_are_packed(library: Library) -> None:
    codes_OI = (torch.arange(48 * 64) % 16 - 8).to(torch.int8).reshape(48, 64)
    scales_OG = torch.ones(48, 2, dtype=torch.bfloat16)
    scales_OG[1::3] = 0
    panel_bytes = library.packed_bytes(1, 32, 64)
    packed = torch.full((2 * panel_bytes + 64,), 7, dtype=torch.uint8)
    library("pack_int4", Units.tiles, codes_OI, scales_OG, packed, 1, 48, 64)
    assert library.packed_bytes(1, 48, 64) == 2 * panel_bytes and packed[2 * panel_bytes :].eq(7).all()

    gate_up = quantize(_draw(1, 64, 32, seed=6), grid=GridName.kimi7, group_size=32)
    down = Quantized(codes_XOI=codes_OI[None, :32, :32].contiguous(), scales_XOG=scales_OG[None, :32, :1].contiguous())
    found_RD = _expert_rows(library, _draw(3, 32, seed=7).bfloat16(), [3], gate_up, down)
    assert found_RD[:, 1::3].eq(0).all() and not found_RD[:, ::3].eq(0).all()


def test_every_code_is_multiplied_with_every_mantissa_as_training_rounds_it(library: Library) -> None:
    """128 columns of `down` have scales of all bf16 mantissas, of both signs, and each has all codes, twice."""
    gate_up = quantize(_draw(1, 64, 128, seed=5), grid=GridName.kimi7, group_size=32)
    scales_D = (torch.arange(128) / 128 + 1) * 2.0 ** (torch.arange(128) % 40 - 30) * (-1.0) ** torch.arange(128)
    codes_DF = torch.arange(-8, 8, dtype=torch.int8).repeat(2).expand(128, 32)
    down = Quantized(codes_XOI=codes_DF.contiguous()[None], scales_XOG=scales_D.bfloat16()[None, :, None].contiguous())
    exact = down.codes_XOI[0].float() * down.scales_XOG[0].float()
    assert not torch.equal(dequantize(down)[0].float(), exact), "some products are rounded"
    for rows in (1, 20):
        x_RD = _draw(rows, 128, seed=rows).bfloat16()
        found_RD = _expert_rows(library, x_RD, [rows], gate_up, down)
        assert torch.equal(found_RD, _expected_rows(library, x_RD, [rows], gate_up, down))

"""Packed experts give the bits of the kernel that training uses, on the dequantised weights."""

import pytest
import torch

from moetrain.kernels.build import Library, Units
from moetrain.ops import native
from moetrain.quant.config import GridName
from moetrain.quant.grids import Quantized, dequantize, quantize
from tests.ops.test_native import LIBRARIES, library_for
from tests.threads import num_threads


@pytest.fixture(params=LIBRARIES, ids=lambda param: f"{param[0]} {Units(param[1]).name}")
def library(request: pytest.FixtureRequest) -> Library:
    return library_for(*request.param)


def _experts(num: int, hidden: int, width: int) -> tuple[Quantized, Quantized]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((num, 2 * width, hidden), (num, hidden, width)):
        weight = torch.randn(shape, generator=generator) * 0.05
        weight[0, 0, :32] = 0  # a group without a scale
        made.append(quantize(weight, grid=GridName.kimi7, group_size=32))
    return made[0], made[1]


def _packed_rows(
    library: Library, x_SD: torch.Tensor, counts: list[int], experts: tuple[Quantized, Quantized]
) -> torch.Tensor:
    gate_up, down = experts
    num, hidden, width = down.codes_XOI.shape
    packed_in = torch.empty(2 * num * library.packed_bytes(1, width, hidden), dtype=torch.uint8)
    packed_out = torch.empty(num * library.packed_bytes(1, hidden, width), dtype=torch.uint8)
    library("pack_int4", library.units, gate_up.codes_XOI, gate_up.scales_XOG, packed_in, 2 * num, width, hidden)
    library("pack_int4", library.units, down.codes_XOI, down.scales_XOG, packed_out, num, hidden, width)
    y_SD = torch.empty_like(x_SD)
    ends = torch.tensor(counts).cumsum(0)
    library("packed_expert_rows", library.units, x_SD, ends, packed_in, packed_out, y_SD, num, hidden, width)
    return y_SD


@pytest.mark.parametrize(
    ("counts", "hidden", "width"),
    [([1, 0, 3, 9], 1024, 64), ([40, 1, 8, 5], 96, 32), ([2, 7, 17, 33], 2080, 96), ([0, 0, 0, 1], 32, 32)],
)
def test_packed_experts_have_the_bits_of_training(counts: list[int], hidden: int, width: int, library: Library) -> None:
    experts = _experts(len(counts), hidden, width)
    x_SD = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = _packed_rows(library, x_SD, counts, experts)
    gate_up, down = (dequantize(weight).bfloat16() for weight in experts)
    expected = native.expert_rows(x_SD, torch.tensor(counts), gate_up_LGD=gate_up, down_LDF=down, library=library)
    assert torch.equal(found, expected)
    with num_threads(1):
        assert torch.equal(_packed_rows(library, x_SD, counts, experts), found)


def test_packed_experts_take_less_than_three_tenths_of_bfloat16(library: Library) -> None:
    for rows, inputs in ((512, 1024), (1024, 512), (64, 128)):
        assert library.packed_bytes(1, rows, inputs) <= 0.30 * 2 * rows * inputs


def test_every_code_is_multiplied_with_every_mantissa_as_training_rounds_it(library: Library) -> None:
    """128 outputs have scales of all bf16 mantissas, and each has all 16 codes, twice in a group."""
    gate_up, _ = _experts(1, 128, 32)
    scales = (torch.arange(128, dtype=torch.float32) / 128 + 1).bfloat16()
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2).expand(128, 32)
    down = Quantized(codes_XOI=codes.contiguous()[None], scales_XOG=scales[:, None][None].contiguous())
    exact = down.codes_XOI[0].float() * scales.float()[:, None]
    assert not torch.equal(dequantize(down)[0].float(), exact), "some products are rounded"
    for rows in (1, 20):  # from codes in registers, and from unpacked panels
        x_SD = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()
        found = _packed_rows(library, x_SD, [rows], (gate_up, down))
        weights = {"gate_up_LGD": dequantize(gate_up).bfloat16(), "down_LDF": dequantize(down).bfloat16()}
        assert torch.equal(found, native.expert_rows(x_SD, torch.tensor([rows]), **weights, library=library))


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 70])
def test_a_packed_matrix_has_the_bits_of_the_linear_kernel(rows: int, library: Library) -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = (
        torch.randn(rows, 1088, generator=generator).bfloat16(),
        torch.randn(83, 1088, generator=generator).bfloat16(),
    )
    packed = torch.empty(library.packed_bytes(0, 83, 1088), dtype=torch.uint8)
    library("pack_dense", w, packed, 1, 83, 1088)
    y = torch.empty(rows, 83, dtype=torch.bfloat16)
    library("packed_linear", library.units, x, packed, y, rows, 83, 1088)
    assert torch.equal(y, native.linear(x, w.float(), library=library))

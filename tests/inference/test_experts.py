"""The ways in which generation computes experts and attention give the same numbers."""

import pytest
import torch

from moetrain.inference.experts import sums_by_loop, sums_grouped
from moetrain.inference.forward import attend_latents, attend_latents_fused
from moetrain.inference.weights import ExpertWeight, PackedInt4, build_layers, multiplied, packed
from moetrain.kernels.gpu.int4 import tiles_of
from moetrain.model.config import ModelConfig
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.config import GridName, QuantConfig
from moetrain.quant.grids import Quantized, dequantize, quantize

Weights = tuple[Quantized, Quantized]


def experts(num: int, hidden: int, width: int, *, grid: GridName = GridName.kimi7) -> Weights:
    """Return gate_up and down of some experts; one group has no scale."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((num, 2 * width, hidden), (num, hidden, width)):
        weight = torch.randn(shape, generator=generator) * 0.05
        weight[0, 0, :32] = 0
        made.append(quantize(weight, grid=grid, group_size=32))
    return made[0], made[1]


def rows(num_tokens: int, hidden: int, *, num_experts: int, num_chosen: int) -> tuple[torch.Tensor, ...]:
    """Return random rows, their chosen experts and weights."""
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    ids_NK = torch.rand(num_tokens, num_experts, generator=generator).topk(num_chosen).indices
    return x_ND, ids_NK, torch.rand(num_tokens, num_chosen, generator=generator)


def by_formula(
    x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, *, weights_NK: torch.Tensor, gate_up: Quantized, down: Quantized
) -> torch.Tensor:
    """Return the sums in float64, one token and expert after the other."""
    out_ND = torch.zeros(x_ND.shape, dtype=torch.float64)
    for token, chosen in enumerate(expert_ids_NK.tolist()):
        for place, expert in enumerate(chosen):
            gate, up = (dequantize(gate_up[expert]).double() @ x_ND[token].double()).chunk(2)
            y_D = dequantize(down[expert]).double() @ (gate * gate.sigmoid() * up)
            out_ND[token] += weights_NK[token, place].double() * y_D
    return out_ND


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_loop_and_the_grouped_products_equal_the_formula_within_bfloat16(num_tokens: int) -> None:
    gate_up, down = experts(6, 96, 32)
    x_ND, ids_NK, weights_NK = rows(num_tokens, 96, num_experts=6, num_chosen=2)
    expected = by_formula(x_ND, ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)
    loop = sums_by_loop(x_ND, ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)
    wide = {"gate_up_EGD": dequantize(gate_up), "down_EDF": dequantize(down)}
    grouped = sums_grouped(x_ND, ids_NK, weights_NK=weights_NK, **wide)
    assert error(loop, expected) < 1e-2 and error(grouped, expected) < 1e-2
    exact = sums_by_loop(x_ND.float(), ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)
    assert error(exact, expected) < 1e-6


def test_packed_codes_take_four_and_a_half_bits_and_are_multiplied_as_before() -> None:
    gate_up, down = experts(6, 96, 32)
    x_ND, ids_NK, weights_NK = rows(9, 96, num_experts=6, num_chosen=2)
    small = [packed(weight) for weight in (gate_up, down)]
    for weight, whole in zip(small, (gate_up, down), strict=True):
        assert isinstance(weight, PackedInt4)
        assert weight.words_XOW.nbytes + weight.scales_XOG.nbytes == whole.codes_XOI.numel() * 4.5 / 8
        assert torch.equal(multiplied(weight, 3, dtype=torch.bfloat16), dequantize(whole[3]))
    loop = sums_by_loop(x_ND, ids_NK, weights_NK=weights_NK, gate_up=gate_up, down=down)
    of_packed = sums_by_loop(x_ND, ids_NK, weights_NK=weights_NK, gate_up=small[0], down=small[1])
    assert torch.equal(of_packed, loop)


def test_codes_that_four_bits_do_not_hold_stay_as_they_are() -> None:
    weight, _ = experts(2, 96, 32, grid=GridName.mx)
    assert int(weight.codes_XOI.max()) == 12 and packed(weight) is weight


def test_on_a_gpu_the_experts_of_a_layer_are_packed_and_no_tensor_holds_them_in_bfloat16() -> None:
    """The device `meta` stands for any that is not the CPU."""
    config = ModelConfig(num_layers=2)
    source = Transformer(config)
    initialize(source, 0)
    quant = QuantConfig(enabled=True)
    *_, layer = build_layers(source.state_dict(), config=config, quant=quant, dtype=torch.bfloat16)
    moved = layer.to(torch.device("meta"))
    assert moved.experts is not None
    size = sum(_size(weight) for weight in moved.experts)
    count = config.num_experts * config.moe_intermediate_size * config.hidden_size * 3
    assert size == count * 4.5 / 8
    other = layer.to(torch.device("cpu")).experts
    assert other is not None and isinstance(other[0], Quantized)


def _size(weight: ExpertWeight) -> int:
    assert isinstance(weight, PackedInt4)
    assert weight.words_XOW.device.type == weight.scales_XOG.device.type == "meta"
    return weight.words_XOW.nbytes + weight.scales_XOG.nbytes


def test_every_tensor_of_the_paths_of_gpus_names_its_device() -> None:
    """With another default device, whatever is made without naming one cannot meet the rows."""
    gate_up, down = experts(6, 96, 32)
    x_ND, ids_NK, weights_NK = rows(9, 96, num_experts=6, num_chosen=2)
    wide = {"weights_NK": weights_NK, "gate_up_EGD": dequantize(gate_up), "down_EDF": dequantize(down)}
    grouped, tiles = sums_grouped(x_ND, ids_NK, **wide), tiles_of(ids_NK, num_experts=6, rows_per_tile=16)
    with torch.device("meta"):
        assert torch.equal(sums_grouped(x_ND, ids_NK, **wide), grouped)
        elsewhere = tiles_of(ids_NK, num_experts=6, rows_per_tile=16)
    for name, tensor in vars(tiles).items():
        assert torch.equal(vars(elsewhere)[name], tensor)


@pytest.mark.parametrize("rows_per_tile", [2, 16])
def test_tiles_hold_every_row_once_with_its_expert(rows_per_tile: int) -> None:
    _, ids_NK, _ = rows(13, 96, num_experts=6, num_chosen=2)
    ids_NK = torch.cat([ids_NK, torch.tensor([[4, 5]] * 7)])
    tiles = tiles_of(ids_NK, num_experts=6, rows_per_tile=rows_per_tile)
    found = []
    for expert, first, end in zip(
        *(part.tolist() for part in (tiles.experts_T, tiles.firsts_T, tiles.ends_T)), strict=True
    ):
        places = tiles.order_S[first : min(first + rows_per_tile, end)].tolist()
        assert all(int(ids_NK.flatten()[place]) == expert for place in places)
        found += places
    assert sorted(found) == list(range(ids_NK.numel()))


@pytest.mark.parametrize("num_new", [1, 5, 20])
def test_fused_attention_over_latents_equals_the_plain_one(num_new: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query_STHC = torch.randn(3, num_new, 4, 24, generator=generator)
    cached_SPC = torch.randn(3, 64, 24, generator=generator)
    last_S1 = torch.tensor([30, 63, 25])[:, None]
    is_later = torch.arange(64) > (last_S1 - num_new + 1 + torch.arange(num_new))[..., None]
    bias_STP = torch.zeros(3, num_new, 64).masked_fill_(is_later, float("-inf"))
    same = {"bias_STP": bias_STP, "rank": 16, "scale": 0.3}
    found = attend_latents_fused(query_STHC, cached_SPC, **same)
    torch.testing.assert_close(found, attend_latents(query_STHC, cached_SPC, **same))
    weights = ((query_STHC[0, 0] @ cached_SPC[0].T) * 0.3 + bias_STP[0, 0]).softmax(-1)
    torch.testing.assert_close(found[0, 0], weights @ cached_SPC[0, :, :16])

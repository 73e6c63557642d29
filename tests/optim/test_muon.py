"""Muon's arithmetic against its paper, on matrices small enough to decompose."""

import pytest
import torch

from moetrain.optim.config import NewtonSchulz, OptimizerName
from moetrain.optim.muon import (
    RMS_OF_ADAMW,
    apply_update,
    logical_matrices,
    nesterov,
    newton_schulz,
    orthogonal_update,
    parameter_rule,
)
from moetrain.runtime import torch_stream


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_stream(0, "test"))


SHAPES = [(64, 128), (128, 64), (96, 256), (64, 64), (192, 512)]


@pytest.mark.parametrize(("rows", "columns"), [shape for shape in SHAPES if shape[0] != shape[1]])
def test_five_steps_bring_singular_values_into_a_band_around_one(rows: int, columns: int) -> None:
    x_BMN = _normal(3, rows, columns)
    values = torch.linalg.svdvals(newton_schulz(x_BMN, schedule=NewtonSchulz.five, dtype=torch.float32))
    assert values.min() > 0.65
    assert values.max() < 1.2


def test_five_steps_leave_the_smallest_singular_values_of_a_square_matrix_small() -> None:
    values = torch.linalg.svdvals(newton_schulz(_normal(1, 256, 256), schedule=NewtonSchulz.five, dtype=torch.float32))
    assert values.min() < 0.3


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_hybrid_schedule_is_orthogonal_within_6e_4(rows: int, columns: int) -> None:
    x_BMN = _normal(3, rows, columns)
    values = torch.linalg.svdvals(newton_schulz(x_BMN, schedule=NewtonSchulz.hybrid_8_2, dtype=torch.float32))
    assert values.min() > 1 - 1e-5
    assert values.max() < 1 + 6e-4


def test_the_hybrid_schedule_finds_the_polar_factor() -> None:
    x_BMN = _normal(2, 16, 40)
    u_BMM, _, vh_BMN = torch.linalg.svd(x_BMN, full_matrices=False)
    y_BMN = newton_schulz(x_BMN, schedule=NewtonSchulz.hybrid_8_2, dtype=torch.float32)
    torch.testing.assert_close(y_BMN, u_BMM @ vh_BMN, atol=2e-3, rtol=0)


def test_a_matrix_does_not_depend_on_the_others_of_its_batch() -> None:
    x_BMN = _normal(4, 16, 24)
    together = newton_schulz(x_BMN, schedule=NewtonSchulz.five, dtype=torch.float32)
    alone = newton_schulz(x_BMN[2:3], schedule=NewtonSchulz.five, dtype=torch.float32)
    torch.testing.assert_close(together[2:3], alone, atol=1e-6, rtol=1e-5)


def test_zeros_stay_zero() -> None:
    assert not newton_schulz(torch.zeros(1, 8, 8), schedule=NewtonSchulz.five, dtype=torch.bfloat16).any()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_update_has_the_rms_of_an_adamw_update(rows: int, columns: int) -> None:
    """0.2000 with the hybrid schedule; five steps fall short of it."""
    rms = {
        schedule: orthogonal_update(_normal(2, rows, columns), schedule=schedule, dtype=torch.float32)
        .square()
        .mean()
        .sqrt()
        .item()
        for schedule in NewtonSchulz
    }
    assert rms[NewtonSchulz.hybrid_8_2] == pytest.approx(RMS_OF_ADAMW, abs=1e-4)
    assert 0.15 < rms[NewtonSchulz.five] < 0.2


def test_gate_and_up_of_each_expert_are_matrices_of_their_own() -> None:
    gate_up_E2FD = _normal(3, 2 * 5, 7)
    matrices = logical_matrices("model.layers.1.mlp.experts.gate_up_proj", gate_up_E2FD)
    assert matrices.shape == (6, 5, 7)
    assert torch.equal(matrices[2], gate_up_E2FD[1, :5])
    assert torch.equal(matrices[3], gate_up_E2FD[1, 5:])
    assert logical_matrices("model.layers.1.mlp.experts.down_proj", _normal(3, 7, 5)).shape == (3, 7, 5)


def test_only_hidden_matrices_are_on_muon() -> None:
    rules = {
        name: parameter_rule(name, torch.Size(shape), hidden_rule=OptimizerName.muon)
        for name, shape in {
            "model.embed_tokens.weight": (10, 4),
            "lm_head.weight": (10, 4),
            "model.norm.weight": (4,),
            "model.layers.1.mlp.gate.weight": (8, 4),
            "model.layers.1.mlp.gate_proj.weight": (8, 4),
            "model.layers.1.mlp.shared_experts.gate_proj.weight": (8, 4),
            "model.layers.1.mlp.experts.gate_up_proj": (2, 8, 4),
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (6, 4),
        }.items()
    }
    on_muon = {name for name, rule in rules.items() if rule == OptimizerName.muon}
    assert on_muon == {
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    }


def test_momentum_and_step_follow_the_paper() -> None:
    grad, momentum, param = _normal(4), torch.ones(4), torch.full((4,), 2.0)
    direction = nesterov(grad, momentum, decay=0.9)
    torch.testing.assert_close(momentum, 0.9 + grad)
    torch.testing.assert_close(direction, grad + 0.9 * (0.9 + grad))
    apply_update(param, direction, learning_rate=0.1, weight_decay=0.5)
    torch.testing.assert_close(param, 2.0 - 0.1 * (direction + 0.5 * 2.0))

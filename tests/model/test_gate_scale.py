"""The derived factor on the routed output."""

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.gate_scale import gate_scale, routed_scaling_factor
from moetrain.model.router import score


@pytest.mark.parametrize(("num_experts", "num_chosen", "published"), [(64, 6, 2.446), (384, 8, 2.827)])
def test_the_derived_factor_is_the_published_one(num_experts: int, num_chosen: int, published: float) -> None:
    assert gate_scale(num_experts, num_chosen) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("function", ScoreFunction)
def test_the_derived_factor_is_the_mean_over_random_logits(function: ScoreFunction) -> None:
    logits_NE = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0))
    weights_NK = score(logits_NE, function).topk(2).values
    weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    expected = (1 / weights_NK.norm(dim=-1)).mean().item()
    assert gate_scale(8, 2, score_function=function) == pytest.approx(expected, abs=2e-3)


def test_one_chosen_expert_needs_no_factor() -> None:
    assert gate_scale(16, 1) == 1.0


def test_a_given_factor_is_taken_and_one_that_cannot_be_derived_is_an_error() -> None:
    assert routed_scaling_factor(ModelConfig(routed_scaling_factor=1.5)) == 1.5
    with pytest.raises(ConfigError, match=r"routed_scaling_factor is null and model\.normalize_weights is false"):
        routed_scaling_factor(ModelConfig(normalize_weights=False))

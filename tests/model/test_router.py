"""Routing and the bias update against references written token by token."""

import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.router import Router, route


def slow_route(logits: list[float], bias: list[float], config: ModelConfig) -> dict[int, float]:
    """Return expert -> weight of one token, as DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) says it."""
    if config.score_function == ScoreFunction.sigmoid:
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    elif config.score_function == ScoreFunction.softmax:
        scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
    else:
        scores = [math.sqrt(math.log(1 + math.exp(z))) for z in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: config.num_groups_per_token] for e in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_token]
    total = sum(scores[e] for e in chosen) if config.normalize_weights else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("function", ScoreFunction)
@pytest.mark.parametrize(("num_groups", "num_open"), [(1, 1), (4, 2), (12, 5)])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_equals_a_reference_written_token_by_token(
    function: ScoreFunction, num_groups: int, num_open: int, normalize: bool
) -> None:
    config = ModelConfig(
        num_experts=12,
        num_experts_per_token=3,
        num_groups=num_groups,
        num_groups_per_token=num_open,
        score_function=function,
        normalize_weights=normalize,
        routed_scaling_factor=1.3,
    )
    stream = torch.Generator().manual_seed(0)
    logits_NE, bias_E = torch.randn(50, 12, generator=stream), 0.2 * torch.randn(12, generator=stream)
    routing = route(logits_NE, bias_E, config=config)
    for token in range(50):
        got = dict(zip(routing.expert_ids_NK[token].tolist(), routing.weights_NK[token].tolist(), strict=True))
        assert got == pytest.approx(slow_route(logits_NE[token].tolist(), bias_E.tolist(), config), rel=1e-5)


def test_the_bias_moves_the_choice_but_not_the_weights() -> None:
    config = ModelConfig(num_experts=4, num_experts_per_token=1, normalize_weights=False, routed_scaling_factor=1.0)
    logits_NE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = route(logits_NE, torch.tensor([0.0, 0.0, 0.0, 5.0]), config=config)
    assert routing.expert_ids_NK.item() == 3
    assert routing.weights_NK.item() == pytest.approx(1 / (1 + math.e))


@pytest.mark.parametrize("bias_mean", [0.0, -2.0])
@pytest.mark.parametrize(("num_groups", "num_open"), [(1, 1), (4, 2), (8, 3)])
def test_routing_equals_that_of_transformers_also_where_all_biased_scores_are_negative(
    bias_mean: float, num_groups: int, num_open: int
) -> None:
    config = ModelConfig(
        hidden_size=12,
        num_experts=32,
        num_experts_per_token=4,
        num_groups=num_groups,
        num_groups_per_token=num_open,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=12,
            n_routed_experts=32,
            num_experts_per_tok=4,
            n_group=num_groups,
            topk_group=num_open,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )
    )
    ours = Router(config)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours.weight.normal_(generator=stream)
        ours.e_score_correction_bias.normal_(mean=bias_mean, std=0.3, generator=stream)
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.e_score_correction_bias)
    x_ND = torch.randn(200, 12, generator=stream)
    routing = ours(x_ND)
    _, their_weights_NK, their_ids_NK = theirs(x_ND)
    for token in range(200):
        found = dict(zip(routing.expert_ids_NK[token].tolist(), routing.weights_NK[token].tolist(), strict=True))
        expected = dict(zip(their_ids_NK[token].tolist(), their_weights_NK[token].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-6)

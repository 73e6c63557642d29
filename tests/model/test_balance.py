"""The bias rules and the balance losses against references written token by token."""

import math
from dataclasses import replace

import pytest
import torch

from moetrain.errors import ConfigError
from moetrain.model.balance import global_balance_loss, quantile_bias, required_biases, update_bias, z_loss_sum
from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig, ScoreFunction
from moetrain.model.router import Router, route, score

QUANTILE = BalanceConfig(bias_rule=BiasRule.quantile)
CONFIG = ModelConfig(num_experts=8, num_experts_per_token=2, balance=QUANTILE)


def skewed_scores(num_tokens: int, config: ModelConfig = CONFIG) -> torch.Tensor:
    """Return scores of which the first experts are liked best."""
    stream = torch.Generator().manual_seed(0)
    slope_E = torch.linspace(1.5, -1.5, config.num_experts)
    return score(torch.randn(num_tokens, config.num_experts, generator=stream) + slope_E, config.score_function)


def histogram(scores_NE: torch.Tensor, bias_E: torch.Tensor, config: ModelConfig = CONFIG) -> torch.Tensor:
    return required_biases(scores_NE, bias_E, is_token_N=torch.ones(len(scores_NE), dtype=torch.bool), config=config)


def slow_quantile(scores_NE: torch.Tensor, bias_E: torch.Tensor, config: ModelConfig) -> list[float]:
    """Return the centred K / E quantiles of the required biases, from sorted lists."""
    count = len(scores_NE) * config.num_experts_per_token / config.num_experts
    quantiles = []
    for expert in range(config.num_experts):
        required = []
        for row in scores_NE.tolist():
            biased = sorted((s + b for s, b in zip(row, bias_E.tolist(), strict=True)), reverse=True)
            required.append(biased[config.num_experts_per_token] - row[expert])
        quantiles.append(sorted(required)[math.ceil(count) - 1])
    mean = sum(quantiles) / len(quantiles)
    return [quantile - mean for quantile in quantiles]


def largest_violation(scores_NE: torch.Tensor, bias_E: torch.Tensor, config: ModelConfig = CONFIG) -> float:
    ids_NK = (scores_NE + bias_E).topk(config.num_experts_per_token).indices
    counts_E = torch.bincount(ids_NK.flatten(), minlength=config.num_experts).double()
    return float(counts_E.max() / counts_E.mean() - 1)


def test_the_bias_rises_for_experts_with_few_tokens() -> None:
    counts_E = torch.tensor([10, 2, 3, 5])  # mean 5
    for rule, expected in (
        (BiasRule.none, [0.0, 0.0, 0.0, 0.0]),
        (BiasRule.sign, [-0.1, 0.1, 0.1, 0.0]),
        (BiasRule.centred, [-0.125, 0.075, 0.075, -0.025]),
    ):
        router = Router(ModelConfig(num_experts=4))
        update_bias(router, counts_E, required_EB=torch.zeros(4, 0), rule=rule, rate=0.1)
        torch.testing.assert_close(router.e_score_correction_bias, torch.tensor(expected))


@pytest.mark.parametrize("function", ScoreFunction)
def test_the_quantile_bias_is_the_quantile_of_sorted_lists_within_a_bin(function: ScoreFunction) -> None:
    config = replace(CONFIG, score_function=function, routed_scaling_factor=1.0)
    scores_NE = skewed_scores(400, config)
    bias_E = 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    span = 8.0 if function is ScoreFunction.sqrt_softplus else 1.0
    bin_width = (float(bias_E.max() - bias_E.min()) + 2 * span) / 1000
    got = quantile_bias(bias_E, histogram(scores_NE, bias_E, config), config=config)
    assert got.tolist() == pytest.approx(slow_quantile(scores_NE, bias_E, config), abs=2 * bin_width)
    assert got.dtype == torch.float32
    assert float(got.sum()) == pytest.approx(0.0, abs=1e-6)


def test_a_few_quantile_steps_balance_what_the_scores_do_not() -> None:
    scores_NE = skewed_scores(4000)
    router = Router(CONFIG)
    bias_E = router.e_score_correction_bias
    assert largest_violation(scores_NE, bias_E) > 1.0
    for _ in range(8):
        required_EB = histogram(scores_NE, bias_E)
        update_bias(router, torch.zeros(8), required_EB=required_EB, rule=BiasRule.quantile, rate=0.0)
    assert largest_violation(scores_NE, bias_E) < 0.05


def test_histograms_of_any_split_of_a_batch_have_the_same_sum_and_leave_padding_out() -> None:
    scores_NE, bias_E = skewed_scores(100), torch.linspace(-0.2, 0.3, 8)
    whole_EB = histogram(scores_NE, bias_E)
    parts_EB = sum(histogram(part, bias_E) for part in scores_NE.split([1, 40, 0, 59]))
    assert torch.equal(whole_EB, parts_EB)
    assert whole_EB.sum(dim=1).tolist() == [100] * 8
    padded_NE = torch.cat([scores_NE, torch.rand(7, 8)])
    is_token_N = torch.arange(107) < 100
    assert torch.equal(whole_EB, required_biases(padded_NE, bias_E, is_token_N=is_token_N, config=CONFIG))


def test_the_bias_stays_in_a_step_without_tokens() -> None:
    bias_E = torch.linspace(-0.2, 0.3, 8)
    assert torch.equal(quantile_bias(bias_E, histogram(skewed_scores(0), bias_E), config=CONFIG), bias_E)


def test_scores_above_the_span_are_counted_in_the_last_bins() -> None:
    config = replace(CONFIG, score_function=ScoreFunction.sqrt_softplus, routed_scaling_factor=1.0)
    scores_NE = score(torch.full((5, 8), 1e4) * torch.arange(8), ScoreFunction.sqrt_softplus)
    required_EB = histogram(scores_NE, torch.zeros(8), config)
    assert required_EB.sum(dim=1).tolist() == [5] * 8
    assert quantile_bias(torch.zeros(8), required_EB, config=config).isfinite().all()


def test_the_z_loss_is_the_squared_log_of_the_sum_of_exponentials_of_tokens() -> None:
    logits_NE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits_NE[:4].tolist())
    got = z_loss_sum(logits_NE, is_token_N=torch.arange(6) < 4)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(got, logits_NE)
    assert gradient[:4].abs().min() > 0 and gradient[4:].abs().max() == 0


def test_the_global_loss_equals_a_loop_over_the_tokens_of_all_micro_batches() -> None:
    stream = torch.Generator().manual_seed(0)
    scores_NE = torch.rand(30, 8, generator=stream)
    normalized_NE = scores_NE / scores_NE.sum(dim=1, keepdim=True)
    ids_NK = route(torch.randn(30, 8, generator=stream), torch.zeros(8), config=CONFIG).expert_ids_NK
    expected = 0.0
    for expert in range(8):
        share = sum(expert in row for row in ids_NK.tolist()) / (30 * 2) * 8
        expected += share * sum(row[expert] for row in normalized_NE.tolist()) / 30
    loads_LE = torch.bincount(ids_NK.flatten(), minlength=8)[None]
    parts = [part.sum(dim=0)[None] for part in normalized_NE.split([11, 19])]
    got = sum(global_balance_loss(part_LE, loads_LE, config=CONFIG) for part_LE in parts) / 30
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_an_even_load_has_a_global_loss_of_one_a_token() -> None:
    loss = global_balance_loss(torch.full((1, 8), 5 / 8), torch.full((1, 8), 3), config=CONFIG)
    assert loss.item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("field", "value"), [("bias_rate", -1.0), ("sequence_loss", math.nan), ("global_loss", -0.1), ("z_loss", math.inf)]
)
def test_a_weight_or_rate_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model\.balance\.{field} is"):
        BalanceConfig(**{field: value})  # type: ignore[arg-type]


def test_the_quantile_rule_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(ConfigError, match="quantile: every token visits all 4 experts"):
        ModelConfig(num_experts=4, num_experts_per_token=4, balance=QUANTILE)
    with pytest.raises(ConfigError, match=r"quantile and model\.num_groups is 2"):
        ModelConfig(num_experts=8, num_groups=2, balance=QUANTILE)
    with pytest.raises(ConfigError, match=r"model\.balance\.quantile_bins is 1"):
        BalanceConfig(quantile_bins=1)

"""Load balancing over experts: rules that update the balance bias, and the balance losses. Everything is in float32.

The bias is updated once per step from integer counts over the whole batch, so the result does not depend on ranks,
micro-batches or recomputation. docs/balance.md explains each rule. N tokens, E experts, K chosen experts per token, B
bins, L layers.
"""

from dataclasses import dataclass

import torch

from moetrain.model.config import BiasRule, ModelConfig, ScoreFunction
from moetrain.model.router import Router

_SCORE_SPAN = {ScoreFunction.sigmoid: 1.0, ScoreFunction.softmax: 1.0, ScoreFunction.sqrt_softplus: 8.0}
"""Upper bound of the scores; the lower bound is 0. sqrt(softplus) reaches 8 at a logit of 64; larger scores are clamped
to the last bin."""


@torch.no_grad()
def update_bias(
    router: Router, counts_E: torch.Tensor, *, required_EB: torch.Tensor, rule: BiasRule, rate: float
) -> None:
    """Update the router's bias in place after a step, so that experts with few tokens are chosen more often.

    `counts_E`: tokens of the step that chose each expert. `sign` adds `rate` for experts below the mean count and
    subtracts it above (arXiv 2408.15664, algorithm 1). `centred` also subtracts the mean update (Moonlight, arXiv
    2502.16982, appendix C), so the sum of the biases stays constant. `quantile` ignores `rate` and uses `required_EB`;
    see `quantile_bias`.
    """
    bias_E = router.e_score_correction_bias
    if rule == BiasRule.none:
        return
    if rule == BiasRule.quantile:
        bias_E.copy_(quantile_bias(bias_E, required_EB.to(bias_E.device), config=router.config))
        return
    counts_E = counts_E.to(bias_E.device, torch.float32)
    direction_E = torch.sign(counts_E.mean() - counts_E)
    if rule == BiasRule.centred:
        direction_E = direction_E - direction_E.mean()
    bias_E.add_(direction_E, alpha=rate)


@dataclass(frozen=True, kw_only=True)
class _Bins:
    """Bins of a histogram of required biases; the fields are float64 scalars."""

    low: torch.Tensor
    width: torch.Tensor

    @classmethod
    def of(cls, bias_E: torch.Tensor, *, config: ModelConfig) -> "_Bins":
        """Return bins that cover every possible required bias: a biased score minus a score."""
        span = _SCORE_SPAN[config.score_function]
        low, high = bias_E.double().min() - span, bias_E.double().max() + span
        return cls(low=low, width=(high - low) / config.balance.quantile_bins)


@torch.no_grad()
def required_biases(
    scores_NE: torch.Tensor, bias_E: torch.Tensor, *, is_token_N: torch.Tensor, config: ModelConfig
) -> torch.Tensor:
    """Return the histogram [E, B], int32, of the bias that each expert needs in order to be chosen by each token.

    A token chooses the experts whose biased score is above its cutoff, the (K+1)-th largest biased score. So the bias
    must exceed cutoff - score (Kimi K3, arXiv 2607.24653, appendix D). Padding is not counted. Histograms of
    micro-batches and ranks can be added, as long as the bias does not change in between: the bins depend on it.
    """
    num_bins, num_experts = config.balance.quantile_bins, config.num_experts
    bins = _Bins.of(bias_E, config=config)
    kept_NE = scores_NE[is_token_N]
    cutoffs_N1 = (kept_NE + bias_E).topk(config.num_experts_per_token + 1, dim=-1).values[:, -1:]
    required_NE = (cutoffs_N1 - kept_NE).double()
    bin_NE = ((required_NE - bins.low) / bins.width).floor().long().clamp_(0, num_bins - 1)
    bin_NE += num_bins * torch.arange(num_experts, device=bin_NE.device)
    return torch.bincount(bin_NE.flatten(), minlength=num_experts * num_bins).view(num_experts, num_bins).int()


@torch.no_grad()
def quantile_bias(bias_E: torch.Tensor, required_EB: torch.Tensor, *, config: ModelConfig) -> torch.Tensor:
    """Return the bias [E] at which a share K / E of the step's tokens would have chosen each expert.

    It is the K / E quantile of the step's required biases, whose cutoffs come from the current `bias_E`: one step of
    coordinate descent on the dual of the balanced assignment problem. The quantile is interpolated within its bin, and
    the result is centred. Without tokens the bias is returned unchanged.
    """
    counts_EB = required_EB.double()
    target = counts_EB[0].sum() * config.num_experts_per_token / config.num_experts
    if target == 0:
        return bias_E
    bins = _Bins.of(bias_E, config=config)
    reached_EB = counts_EB.cumsum(dim=1)
    first_E1 = (reached_EB < target).sum(dim=1, keepdim=True)
    count_E1 = counts_EB.gather(1, first_E1)
    fraction_E1 = 1.0 - (reached_EB.gather(1, first_E1) - target) / count_E1
    quantile_E = (bins.low + (first_E1 + fraction_E1) * bins.width)[:, 0]
    return (quantile_E - quantile_E.mean()).float()


def z_loss_sum(logits_NE: torch.Tensor, *, is_token_N: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of logsumexp(logits)^2, float32 with gradient (arXiv 2202.08906, eq. 5).

    Padding is excluded. Divided by the number of tokens of the step, this is one layer's router z-loss.
    """
    return (torch.logsumexp(logits_NE, dim=-1).square() * is_token_N).sum()


def global_balance_loss(score_sums_LE: torch.Tensor, loads_LE: torch.Tensor, *, config: ModelConfig) -> torch.Tensor:
    """Return this micro-batch's share of N * sum over layers and experts of f_e P_e (arXiv 2501.11873).

    f_e is the expert's share of the step's choices, times E (so 1 when even); it comes from `loads_LE`, the counts over
    all ranks and micro-batches. P_e is the step's mean normalised score; `score_sums_LE` (with gradient) is this
    micro-batch's contribution to it. N is the number of tokens of the step; the factor makes this a sum over tokens,
    like `sequence_balance_loss`.
    """
    even_L1 = loads_LE.sum(dim=1, keepdim=True).clamp(min=1).to(score_sums_LE.dtype) / config.num_experts
    return (loads_LE / even_L1 * score_sums_LE).sum()

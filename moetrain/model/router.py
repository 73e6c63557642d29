"""The router: which experts process each token, with which weights. Everything is in float32.

The native kernels compute scores and choice where they support the activations; generation then finds the same bits.
`model.balance` updates the bias. N tokens, E experts, K chosen experts per token, G groups.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from moetrain.kernels.choice import usable
from moetrain.model.config import ModelConfig, ScoreFunction
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.model.kernel_module import KernelModule
from moetrain.ops import native_router

_NORM_EPS = 1e-20  # as in DeepSeek-V3's code
_SCORES_PER_GROUP = 2  # a group's score is the sum of its two best (arXiv 2412.19437, section 2.1.2)

KERNEL_NUMBERS = {
    ScoreFunction.sigmoid: native_router.SIGMOID,
    ScoreFunction.softmax: native_router.SOFTMAX,
    ScoreFunction.sqrt_softplus: native_router.SQRT_SOFTPLUS,
}
"""The native kernels' numbers for the score functions."""


class Routing(NamedTuple):
    """The routing of N tokens: `logits_NE` and `scores_NE` of all experts, `expert_ids_NK` and `weights_NK` of the
    chosen.

    The ids are int64, the rest float32. It is a tuple because ZeRO 3 finds the tensors of a module's output only in
    tuples.
    """

    logits_NE: torch.Tensor
    scores_NE: torch.Tensor
    expert_ids_NK: torch.Tensor
    weights_NK: torch.Tensor


def score(logits_NE: torch.Tensor, function: ScoreFunction) -> torch.Tensor:
    """Return the scores of float32 logits."""
    if function == ScoreFunction.sigmoid:
        return logits_NE.sigmoid()
    if function == ScoreFunction.softmax:
        return logits_NE.softmax(-1)
    return F.softplus(logits_NE).sqrt()


@torch.no_grad()
def choose(scores_NE: torch.Tensor, bias_E: torch.Tensor, *, config: ModelConfig) -> torch.Tensor:
    """Return the ids [N, K] of the experts with the largest biased scores, within the best groups only."""
    biased_NE = scores_NE + bias_E
    if config.num_groups > 1:
        grouped_NGE = biased_NE.view(-1, config.num_groups, config.num_experts // config.num_groups)
        num_best = min(_SCORES_PER_GROUP, grouped_NGE.shape[-1])
        best_NG = grouped_NGE.topk(num_best, dim=-1).values.sum(-1).topk(config.num_groups_per_token, dim=-1).indices
        closed_NG = torch.ones(grouped_NGE.shape[:2], dtype=torch.bool, device=biased_NE.device)
        closed_NG.scatter_(1, best_NG, False)
        biased_NE = grouped_NGE.masked_fill(closed_NG[..., None], float("-inf")).flatten(1)
    return biased_NE.topk(config.num_experts_per_token, dim=-1).indices


def route(logits_NE: torch.Tensor, bias_E: torch.Tensor, *, config: ModelConfig) -> Routing:
    """Return the routing for float32 logits; the bias affects the choice but not the weights (arXiv 2408.15664)."""
    scores_NE = score(logits_NE, config.score_function)
    return _routing(logits_NE, scores_NE, expert_ids_NK=choose(scores_NE, bias_E, config=config), config=config)


def _routing(
    logits_NE: torch.Tensor, scores_NE: torch.Tensor, *, expert_ids_NK: torch.Tensor, config: ModelConfig
) -> Routing:
    weights_NK = scores_NE.gather(1, expert_ids_NK)
    if config.normalize_weights:
        total_N = reduce(torch.add, weights_NK.unbind(-1))  # in the order of k, as the native kernels add
        weights_NK = weights_NK / (total_N[:, None] + _NORM_EPS)
    return Routing(
        logits_NE=logits_NE,
        scores_NE=scores_NE,
        expert_ids_NK=expert_ids_NK,
        weights_NK=weights_NK * routed_scaling_factor(config),
    )


class Router(KernelModule):
    """The router of a layer: fp32 weight [E, D] over all experts, and the balance bias, a buffer without gradient."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.e_score_correction_bias: torch.Tensor

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """Return the routing of tokens."""
        if library := usable(self.library, x_ND):
            choice = native_router.Choice(
                function=KERNEL_NUMBERS[self.config.score_function],
                num_chosen=self.config.num_experts_per_token,
                num_groups=self.config.num_groups,
                num_best_groups=self.config.num_groups_per_token,
            )
            logits_NE, scores_NE, expert_ids_NK = native_router.score_and_choose(
                x_ND, self.weight, bias_E=self.e_score_correction_bias, choice=choice, library=library
            )
            return _routing(logits_NE, scores_NE, expert_ids_NK=expert_ids_NK, config=self.config)
        return route(F.linear(x_ND.float(), self.weight), self.e_score_correction_bias, config=self.config)

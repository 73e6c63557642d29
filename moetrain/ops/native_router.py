"""The router's scores and choice by the native kernels, as a differentiable torch function.

Generation calls the same kernel functions, so equal tokens give equal bits for any number of rows. Ties go to the
expert with the smaller number. N tokens, D hidden, E experts, K chosen experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moetrain.kernels.build import Library

SIGMOID, SOFTMAX, SQRT_SOFTPLUS = range(3)
"""The kernels' numbers for the score functions."""
_SMALLEST_SCORE = 1e-20  # smaller scores (logits below -92) would give 0 / 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How experts are chosen: K of them from the best groups. function: number of the score function."""

    function: int
    num_chosen: int
    num_groups: int
    num_best_groups: int


def score_and_choose(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, *, bias_E: torch.Tensor, choice: Choice, library: Library
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits and scores [N, E], float32, and the ids [N, K] of the largest biased scores, int64.

    x is bfloat16, the weight float32; the products are in float32.
    """
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ScoreAndChoose.apply(  # type: ignore[no-untyped-call]
        x_ND, weight_ED, bias_E, choice, library
    )
    return found


class _ScoreAndChoose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, choice: Choice, library: Library
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_ND, weight_ED = x_ND.contiguous(), weight_ED.contiguous()
        num_experts = len(weight_ED)
        logits_NE = x_ND.new_empty(len(x_ND), num_experts, dtype=torch.float32)
        scores_NE = torch.empty_like(logits_NE)
        ids_NK = x_ND.new_empty(len(x_ND), choice.num_chosen, dtype=torch.int64)
        sizes = (*x_ND.shape, num_experts, choice.num_chosen, choice.num_groups, choice.num_best_groups)
        results = (logits_NE, scores_NE, ids_NK)
        library("router_rows", x_ND, weight_ED, bias_E.contiguous(), *results, *sizes, choice.function)
        ctx.save_for_backward(x_ND, weight_ED, logits_NE, scores_NE)
        ctx.mark_non_differentiable(ids_NK)
        ctx.function = choice.function
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_ND, weight_ED, logits_NE, scores_NE = ctx.saved_tensors
        grad_NE = grads[0] + _through_scores(grads[1], logits_NE, scores_NE=scores_NE, function=ctx.function)
        grad_x_ND = (grad_NE @ weight_ED).to(x_ND.dtype) if ctx.needs_input_grad[0] else None
        grad_ED = grad_NE.T @ x_ND.float() if ctx.needs_input_grad[1] else None
        return grad_x_ND, grad_ED, None, None, None


def _through_scores(
    grad_NE: torch.Tensor, logits_NE: torch.Tensor, *, scores_NE: torch.Tensor, function: int
) -> torch.Tensor:
    """Return the gradient of the logits, given that of the scores."""
    if function == SIGMOID:
        return grad_NE * scores_NE * (1 - scores_NE)
    if function == SOFTMAX:
        along_N1 = (grad_NE * scores_NE).sum(-1, keepdim=True)
        return (grad_NE - along_N1) * scores_NE
    return grad_NE * logits_NE.sigmoid() / (2 * scores_NE.clamp(min=_SMALLEST_SCORE))

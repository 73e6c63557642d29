"""AdamW (arXiv 1711.05101) as one pure function, element by element: any slice of a parameter can be stepped alone."""

import math
from collections.abc import Sequence

import torch


def adamw_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    *,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    learning_rate: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step `param`, `exp_avg` and `exp_avg_sq` in place, as torch.optim.AdamW does; `step` counts from 1."""
    beta1, beta2 = betas
    param.mul_(1.0 - learning_rate * weight_decay)
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-learning_rate / (1.0 - beta1**step))

"""AdamW (arXiv 1711.05101) as one elementwise pure function, so that any slice of a parameter can be updated on its
own.
"""

import math
from collections.abc import Sequence

import torch

from moetrain.kernels.build import Library

_SLICE_ELEMENTS = 1 << 17  # updated at once on a CPU: 512 KB of each tensor, which fit in the cache


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
    library: Library | None = None,
) -> None:
    """Update `param`, `exp_avg` and `exp_avg_sq` in place, as torch.optim.AdamW does; `step` counts from 1.

    All four tensors must be contiguous and have the same shape. library: native kernels, used for float32 on a CPU.
    """
    beta1, beta2 = betas
    if library and param.device.type == "cpu" and param.dtype == torch.float32:
        library(
            "adamw_step",
            *(param.view(-1), grad.contiguous(), exp_avg.view(-1), exp_avg_sq.view(-1), param.numel()),
            *(1.0 - learning_rate * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2),
            *(math.sqrt(1.0 - beta2**step), eps, learning_rate / (1.0 - beta1**step)),
        )
        return
    whole = (param.view(-1), grad.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1))
    # On other devices, slices would only add kernel launches.
    length = _SLICE_ELEMENTS if param.device.type == "cpu" else max(param.numel(), 1)
    for slices in zip(*(torch.split(tensor, length) for tensor in whole), strict=True):
        p, g, m, v = slices
        p.mul_(1.0 - learning_rate * weight_decay)
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = v.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
        p.addcdiv_(m, denominator, value=-learning_rate / (1.0 - beta1**step))

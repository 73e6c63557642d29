"""The plain layers: linear, RMS norm, SwiGLU feed-forward. Parameters are fp32; products run in the dtype of x.

X any leading axes, D hidden size, F feed-forward width.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moetrain.kernels.choice import native_for
from moetrain.model.recompute import Recomputable, run_part
from moetrain.ops import native


class Linear(nn.Module):
    """A product without bias; the fp32 weight [out, in] is cast to the dtype of its input."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T over the last axis."""
        if library := native_for(x):
            return native.linear(x, self.weight, library=library)
        return F.linear(x, self.weight.to(x.dtype))


class _RMSNorm(torch.autograd.Function):
    """The norm with its gradient written out: half the passes over memory of the composed one."""

    @staticmethod
    def forward(ctx: Any, x_XD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight in the dtype of x."""
        x32_XD = x_XD.float()
        inverse_X1 = (x32_XD.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x_XD, weight_D, inverse_X1)
        return (x32_XD * inverse_X1).mul_(weight_D).to(x_XD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the gradients of x and weight; with n = x / rms: (g w - n mean(g w n)) / rms, and sum(g n)."""
        x_XD, weight_D, inverse_X1 = ctx.saved_tensors
        normed_XD = x_XD.float() * inverse_X1
        product_XD = normed_XD * grads[0]
        along_X1 = (product_XD @ weight_D).div_(x_XD.shape[-1]).unsqueeze(-1)
        grad_XD = (grads[0].float() * weight_D).addcmul_(normed_XD, along_X1, value=-1).mul_(inverse_X1)
        return grad_XD.to(x_XD.dtype), product_XD.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32 because squares of bf16 lose too much."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed and scaled x in its own dtype."""
        if library := native_for(x):
            return native.rms_norm(x, self.weight, eps=self.eps, library=library)
        normed: torch.Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class FeedForward(Recomputable):
    """SwiGLU (arXiv 2002.05202): a dense layer's, or the shared experts taken as one."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        return run_part(self._compute, x, parameters=self.parameters(), recompute=self.recompute)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        library = native_for(x)
        hidden = native.swiglu(gate, up, library=library) if library else F.silu(gate) * up
        y: torch.Tensor = self.down_proj(hidden)
        return y

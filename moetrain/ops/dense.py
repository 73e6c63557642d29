"""The dense computations of a block: product, RMS norm, SwiGLU. Each has a torch path and a native path for CPUs.

X any leading axes, D in, O out, F feed-forward width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moetrain.kernels.build import Library
from moetrain.kernels.choice import usable
from moetrain.ops import native


def linear(x_XD: torch.Tensor, weight_OD: torch.Tensor, *, library: Library | None) -> torch.Tensor:
    """Return x W^T over the last axis in the dtype of x; the float32 weight is cast to that dtype."""
    if native_library := usable(library, x_XD):
        return native.linear(x_XD, weight_OD, library=native_library)
    return F.linear(x_XD, weight_OD.to(x_XD.dtype))


def rms_norm(x_XD: torch.Tensor, weight_D: torch.Tensor, *, eps: float, library: Library | None) -> torch.Tensor:
    """Return x / rms(x) * weight over the last axis in the dtype of x, computed in float32."""
    if native_library := usable(library, x_XD):
        return native.rms_norm(x_XD, weight_D, eps=eps, library=native_library)
    normed_XD: torch.Tensor = _RMSNorm.apply(x_XD, weight_D, eps)  # type: ignore[no-untyped-call]
    return normed_XD


def swiglu(gate_XF: torch.Tensor, up_XF: torch.Tensor, *, library: Library | None) -> torch.Tensor:
    """Return silu(gate) * up (arXiv 2002.05202) in the dtype of gate."""
    if native_library := usable(library, gate_XF):
        return native.swiglu(gate_XF, up_XF, library=native_library)
    return F.silu(gate_XF) * up_XF


class _RMSNorm(torch.autograd.Function):
    """The norm with an explicit backward pass, which needs half the memory passes of the composed operations."""

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

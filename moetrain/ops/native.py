"""The native kernels as differentiable torch functions; each takes the library as an argument.

They run on a CPU with bfloat16 activations and float32 parameters. Gradients of parameters are float32 sums.

X any leading axes, N tokens, D in, O out, S rows sorted by expert, L experts, G = 2F (gate rows first), F expert width,
K experts per token, B rows, T tokens, H heads, C = N + R query width per head, E = N + V width of keys without position
and values per head, R rotary width, P = R / 2 pairs, V value width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moetrain.kernels.build import Library

Gradients = tuple[torch.Tensor | None, ...]


def linear(x_XD: torch.Tensor, weight_OD: torch.Tensor, *, library: Library) -> torch.Tensor:
    """Return x W^T over the last axis."""
    y_XO: torch.Tensor = _Linear.apply(x_XD, weight_OD, library)  # type: ignore[no-untyped-call]
    return y_XO


def rms_norm(x_XD: torch.Tensor, weight_D: torch.Tensor, *, eps: float, library: Library) -> torch.Tensor:
    """Return x / rms(x) * weight over the last axis."""
    y_XD: torch.Tensor = _RMSNorm.apply(x_XD, weight_D, eps, library)  # type: ignore[no-untyped-call]
    return y_XD


def swiglu(gate_XF: torch.Tensor, up_XF: torch.Tensor, *, library: Library) -> torch.Tensor:
    """Return silu(gate) * up."""
    hidden_XF: torch.Tensor = _SwiGLU.apply(gate_XF, up_XF, library)  # type: ignore[no-untyped-call]
    return hidden_XF


def expert_rows(
    x_SD: torch.Tensor,
    counts_L: torch.Tensor,
    *,
    gate_up_LGD: torch.Tensor,
    down_LDF: torch.Tensor,
    library: Library,
) -> torch.Tensor:
    """Return down(silu(gate x) * up x) of rows sorted by expert, `counts_L` (int64) rows each.

    Weights are float32 or bfloat16. An expert without rows still gets a gradient: zero.
    """
    y_SD: torch.Tensor = _Experts.apply(x_SD, gate_up_LGD, down_LDF, counts_L, library)  # type: ignore[no-untyped-call]
    return y_SD


def rows_for_experts(x_ND: torch.Tensor, places_NK: torch.Tensor, *, library: Library) -> torch.Tensor:
    """Return N * K rows, where row `places_NK[n, k]` is x[n]. The places (int64) are a permutation."""
    rows_SD: torch.Tensor = _Spread.apply(x_ND, places_NK, library)  # type: ignore[no-untyped-call]
    return rows_SD


def combine(
    rows_SD: torch.Tensor, places_NK: torch.Tensor, *, weights_NK: torch.Tensor, library: Library
) -> torch.Tensor:
    """Return sum over k of weight * rows[places_NK[n, k]] [N, D]; weights are float32, the places a permutation."""
    out_ND: torch.Tensor = _Combine.apply(rows_SD, weights_NK, places_NK, library)  # type: ignore[no-untyped-call]
    return out_ND


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Positions and segments of tokens: cosine and sine [B, T, P] float32, and the first key that each token attends
    to.
    """

    cosine_BTP: torch.Tensor
    sine_BTP: torch.Tensor
    first_seen_BT: torch.Tensor
    """int32; token t attends to the keys first_seen..t."""


def latent_attention(
    q_BTHC: torch.Tensor,
    kv_BTHE: torch.Tensor,
    *,
    k_rotary_BTR: torch.Tensor,
    rows: Rows,
    scale: float,
    library: Library,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs [B, T, H, V] and the largest logit per token [B, H, T], float32, without gradient.

    Queries and keys are the outputs of their projections; this function also applies the rotation.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _LatentAttention.apply(  # type: ignore[no-untyped-call]
        q_BTHC, kv_BTHE, k_rotary_BTR, rows, scale, library
    )
    return found


def _check_float32(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), "the native kernels read contiguous float32"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: torch.Tensor, weight_OD: torch.Tensor, library: Library) -> torch.Tensor:
        x_XD = x_XD.contiguous()
        _check_float32(weight_OD)
        num_out, num_in = weight_OD.shape
        y_XO = x_XD.new_empty(*x_XD.shape[:-1], num_out)
        library("linear", library.units, x_XD, weight_OD, y_XO, x_XD.numel() // num_in, num_out, num_in)
        ctx.save_for_backward(x_XD, weight_OD)
        ctx.library = library
        return y_XO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        x_XD, weight_OD = ctx.saved_tensors
        library, grad_XO = ctx.library, grads[0].contiguous()
        num_out, num_in = weight_OD.shape
        sizes = (x_XD.numel() // num_in, num_out, num_in)
        grad_x_XD = grad_OD = None
        if ctx.needs_input_grad[0]:
            grad_x_XD = torch.empty_like(x_XD)
            library("linear_grad_x", library.units, grad_XO, weight_OD, grad_x_XD, *sizes)
        if ctx.needs_input_grad[1]:
            grad_OD = torch.empty_like(weight_OD)
            library("linear_grad_w", library.units, grad_XO, x_XD, grad_OD, *sizes, 0)
        return grad_x_XD, grad_OD, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: torch.Tensor, weight_D: torch.Tensor, eps: float, library: Library) -> torch.Tensor:
        x_XD = x_XD.contiguous()
        _check_float32(weight_D)
        width = len(weight_D)
        y_XD, inverse_X = torch.empty_like(x_XD), x_XD.new_empty(x_XD.shape[:-1], dtype=torch.float32)
        library("rms_norm_rows", x_XD, weight_D, y_XD, inverse_X, inverse_X.numel(), width, eps)
        ctx.save_for_backward(x_XD, weight_D, inverse_X)
        ctx.library = library
        return y_XD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        x_XD, weight_D, inverse_X = ctx.saved_tensors
        grad_x_XD, grad_D = torch.empty_like(x_XD), torch.empty_like(weight_D)
        sizes = (inverse_X.numel(), len(weight_D))
        ctx.library(
            "rms_norm_rows_backward", grads[0].contiguous(), x_XD, weight_D, inverse_X, grad_x_XD, grad_D, *sizes
        )
        return grad_x_XD, grad_D, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_XF: torch.Tensor, up_XF: torch.Tensor, library: Library) -> torch.Tensor:
        gate_XF, up_XF = gate_XF.contiguous(), up_XF.contiguous()
        hidden_XF = torch.empty_like(gate_XF)
        library("swiglu", gate_XF, up_XF, hidden_XF, gate_XF.numel())
        ctx.save_for_backward(gate_XF, up_XF)
        ctx.library = library
        return hidden_XF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        gate_XF, up_XF = ctx.saved_tensors
        grad_gate_XF, grad_up_XF = torch.empty_like(gate_XF), torch.empty_like(up_XF)
        sources = (grads[0].contiguous(), gate_XF, up_XF)
        ctx.library("swiglu_backward", *sources, grad_gate_XF, grad_up_XF, gate_XF.numel())
        return grad_gate_XF, grad_up_XF, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: torch.Tensor,
        gate_up_LGD: torch.Tensor,
        down_LDF: torch.Tensor,
        counts_L: torch.Tensor,
        library: Library,
    ) -> torch.Tensor:
        x_SD, gate_up_LGD, down_LDF = x_SD.contiguous(), gate_up_LGD.contiguous(), down_LDF.contiguous()
        ends_L = counts_L.cumsum(0)
        num_experts, hidden, width = down_LDF.shape
        gate_up_SG, y_SD = x_SD.new_empty(len(x_SD), 2 * width), torch.empty_like(x_SD)
        ctx.kind = (library.units, int(gate_up_LGD.dtype == torch.bfloat16))
        ctx.sizes = (num_experts, hidden, width)
        library("expert_rows", *ctx.kind, x_SD, ends_L, gate_up_LGD, down_LDF, gate_up_SG, y_SD, *ctx.sizes)
        ctx.save_for_backward(x_SD, gate_up_SG, ends_L, gate_up_LGD, down_LDF)
        ctx.library = library
        return y_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        x_SD, gate_up_SG, ends_L, gate_up_LGD, down_LDF = ctx.saved_tensors
        grad_x_SD = torch.empty_like(x_SD)
        grad_gate_up_LGD = torch.empty_like(gate_up_LGD, dtype=torch.float32)
        grad_down_LDF = torch.empty_like(down_LDF, dtype=torch.float32)
        sources = (grads[0].contiguous(), x_SD, gate_up_SG, ends_L, gate_up_LGD, down_LDF)
        results = (grad_x_SD, grad_gate_up_LGD, grad_down_LDF)
        ctx.library("expert_rows_backward", *ctx.kind, *sources, *results, *ctx.sizes)
        return grad_x_SD, grad_gate_up_LGD.to(gate_up_LGD.dtype), grad_down_LDF.to(down_LDF.dtype), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, places_NK: torch.Tensor, library: Library) -> torch.Tensor:
        x_ND = x_ND.contiguous()
        rows_SD = x_ND.new_empty(places_NK.numel(), x_ND.shape[1])
        library("spread_rows", x_ND, places_NK, rows_SD, *places_NK.shape, x_ND.shape[1])
        ctx.save_for_backward(places_NK)
        ctx.library = library
        return rows_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        (places_NK,) = ctx.saved_tensors
        grad_SD = grads[0].contiguous()
        grad_ND = grad_SD.new_empty(len(places_NK), grad_SD.shape[1])
        ctx.library("sum_rows", grad_SD, places_NK, None, grad_ND, *places_NK.shape, grad_SD.shape[1])
        return grad_ND, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_SD: torch.Tensor, weights_NK: torch.Tensor, places_NK: torch.Tensor, library: Library
    ) -> torch.Tensor:
        rows_SD, weights_NK = rows_SD.contiguous(), weights_NK.contiguous()
        out_ND = rows_SD.new_empty(len(places_NK), rows_SD.shape[1])
        library("sum_rows", rows_SD, places_NK, weights_NK, out_ND, *places_NK.shape, rows_SD.shape[1])
        ctx.save_for_backward(rows_SD, weights_NK, places_NK)
        ctx.library = library
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        rows_SD, weights_NK, places_NK = ctx.saved_tensors
        grad_SD, grad_NK = torch.empty_like(rows_SD), torch.empty_like(weights_NK)
        sources = (grads[0].contiguous(), rows_SD, places_NK, weights_NK)
        ctx.library("sum_rows_backward", *sources, grad_SD, grad_NK, *places_NK.shape, rows_SD.shape[1])
        return grad_SD, grad_NK, None, None


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHC: torch.Tensor,
        kv_BTHE: torch.Tensor,
        k_rotary_BTR: torch.Tensor,
        rows: Rows,
        scale: float,
        library: Library,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_BTHC, kv_BTHE = q_BTHC.contiguous(), kv_BTHE.contiguous()
        # A view if the token stride is uniform, as in a slice of a wider projection.
        flat_NR = k_rotary_BTR.flatten(0, 1)
        flat_NR = flat_NR if flat_NR.stride(1) == 1 else flat_NR.contiguous()
        _check_float32(rows.cosine_BTP, rows.sine_BTP)
        num_rows, num_tokens, num_heads, width = q_BTHC.shape
        rotary = flat_NR.shape[1]
        value = kv_BTHE.shape[3] - (width - rotary)
        ctx.sizes = (flat_NR.stride(0), num_rows, num_tokens, num_heads, width - rotary, rotary, value)
        out_BTHV = q_BTHC.new_empty(num_rows, num_tokens, num_heads, value)
        log_sums_BHT = q_BTHC.new_empty(num_rows, num_heads, num_tokens, dtype=torch.float32)
        largest_BHT = torch.empty_like(log_sums_BHT)
        places = (rows.cosine_BTP, rows.sine_BTP, rows.first_seen_BT)
        sources, results = (q_BTHC, kv_BTHE, flat_NR), (out_BTHV, log_sums_BHT, largest_BHT)
        library("latent_attention", library.units, *sources, *places, *results, *ctx.sizes, scale)
        ctx.save_for_backward(*sources, *places, log_sums_BHT)
        ctx.mark_non_differentiable(largest_BHT)
        ctx.library, ctx.scale = library, scale
        return out_BTHV, largest_BHT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Gradients:
        q_BTHC, kv_BTHE, flat_NR, *rest = ctx.saved_tensors
        grad_q_BTHC, grad_kv_BTHE = torch.empty_like(q_BTHC), torch.empty_like(kv_BTHE)
        grad_k_BTR = q_BTHC.new_empty(*q_BTHC.shape[:2], flat_NR.shape[1])
        sources = (grads[0].contiguous(), q_BTHC, kv_BTHE, flat_NR, *rest)
        results = (grad_q_BTHC, grad_kv_BTHE, grad_k_BTR)
        ctx.library("latent_attention_backward", ctx.library.units, *sources, *results, *ctx.sizes, ctx.scale)
        return grad_q_BTHC, grad_kv_BTHE, grad_k_BTR, None, None, None

"""Rows for the chosen experts of each token, and the weighted sum of their outputs: a plain path and two for CPUs.

One CPU path computes the sum in slices, the other is native.

S = N * K rows (one per token and chosen expert), N tokens, n tokens of a slice, K chosen experts, D hidden.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moetrain.kernels.build import Library
from moetrain.kernels.choice import usable
from moetrain.ops import native

_SLICE_ELEMENTS = 1 << 18  # size of a slice: 1 MB in float32, which fits in the cache


def rows_for_experts(
    x_ND: torch.Tensor, order_S: torch.Tensor, *, num_chosen: int, library: Library | None
) -> torch.Tensor:
    """Return rows [S, D], `num_chosen` per token: row i is a copy of the token of pair `order_S[i]`."""
    if native_library := usable(library, x_ND):
        return native.rows_for_experts(x_ND, inverse(order_S).view(-1, num_chosen), library=native_library)
    return x_ND.index_select(0, order_S // num_chosen)


def permute(
    rows_SD: torch.Tensor, order_S: torch.Tensor, *, inverse_S: torch.Tensor, library: Library | None
) -> torch.Tensor:
    """Return the rows in another order: row i is row `order_S[i]`; `inverse_S` is the inverse permutation."""
    if native_library := usable(library, rows_SD):
        return native.rows_for_experts(rows_SD, inverse_S[:, None], library=native_library)
    return rows_SD.index_select(0, order_S)


def combine(
    y_SD: torch.Tensor, order_S: torch.Tensor, *, weights_NK: torch.Tensor, library: Library | None
) -> torch.Tensor:
    """Return the weighted sum [N, D] of each token's K rows, summed in float32, in the dtype of y.

    Row i of `y_SD` belongs to number `order_S[i]` of the N * K (token, k) pairs.
    """
    inverse_S = inverse(order_S)
    if native_library := usable(library, y_SD):
        return native.combine(y_SD, inverse_S.view(weights_NK.shape), weights_NK=weights_NK, library=native_library)
    if y_SD.device.type == "cpu":
        return combine_in_slices(y_SD, order_S, inverse_S=inverse_S, weights_NK=weights_NK)
    return combine_plain(y_SD, inverse_S, weights_NK=weights_NK)


def inverse(order_S: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a permutation: the position of each of 0..S-1 in it."""
    return torch.empty_like(order_S).index_copy_(0, order_S, torch.arange(len(order_S), device=order_S.device))


def combine_plain(y_SD: torch.Tensor, inverse_S: torch.Tensor, *, weights_NK: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum with torch's own operations, which materialise N * K * D float32 values."""
    y_NKD = y_SD.index_select(0, inverse_S).view(*weights_NK.shape, y_SD.shape[1])
    return (y_NKD * weights_NK[..., None]).sum(1).to(y_SD.dtype)


def combine_in_slices(
    y_SD: torch.Tensor, order_S: torch.Tensor, *, inverse_S: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Return the same bits and gradients as `combine_plain`; only one slice at a time exists in float32."""
    out_ND: torch.Tensor = _InSlices.apply(y_SD, weights_NK, order_S, inverse_S)  # type: ignore[no-untyped-call]
    return out_ND


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_SD: torch.Tensor, weights_NK: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor
    ) -> torch.Tensor:
        """Return the sums [N, D]."""
        inverse_NK = inverse_S.view(weights_NK.shape)
        out_ND = y_SD.new_empty(len(weights_NK), y_SD.shape[1])
        for part in _slices(weights_NK, width=y_SD.shape[1]):
            out_ND[part] = (_rows(y_SD, inverse_NK[part]) * weights_NK[part, :, None]).sum(1)
        ctx.save_for_backward(y_SD, weights_NK, order_S, inverse_NK)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the rows and the weights."""
        y_SD, weights_NK, order_S, inverse_NK = ctx.saved_tensors
        grad_NKD = y_SD.new_empty(*weights_NK.shape, y_SD.shape[1])
        grad_weights_NK = torch.empty_like(weights_NK)
        for part in _slices(weights_NK, width=y_SD.shape[1]):
            grad_n1D = grads[0][part, None].float()
            grad_NKD[part] = grad_n1D * weights_NK[part, :, None]
            grad_weights_NK[part] = (grad_n1D * _rows(y_SD, inverse_NK[part])).sum(-1)
        return grad_NKD.flatten(0, 1).index_select(0, order_S), grad_weights_NK, None, None


def _rows(y_SD: torch.Tensor, inverse_nK: torch.Tensor) -> torch.Tensor:
    return y_SD.index_select(0, inverse_nK.flatten()).view(*inverse_nK.shape, y_SD.shape[1])


def _slices(weights_NK: torch.Tensor, *, width: int) -> list[slice]:
    num_tokens, num_chosen = weights_NK.shape
    size = max(1, _SLICE_ELEMENTS // (num_chosen * width))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]

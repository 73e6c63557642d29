"""Attention over packed rows with torch's flash kernel, for GPUs: documents are concatenated, so no mask is needed.

B rows, H heads, T tokens, P = B * T, Q query-key width, V value width, S runs of one segment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_MOST_WIDTH, _WIDTH_MULTIPLE, _CAPABILITY = 256, 8, (8, 0)
"""Limits of FlashAttention-2 (arXiv 2307.08691): largest width, its multiple, compute capability."""
_CAUSAL = (-1, 0)

FlashKernel = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`, or a function with the same arguments."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Consecutive tokens of a segment, row after row: the start of each run and the end of the last, int32 [S + 1]."""

    segments_BT: torch.Tensor
    bounds: torch.Tensor
    longest: int


def supports_flash(device: torch.device, dtype: torch.dtype, *, width: int) -> bool:
    """Return whether the flash kernel supports this device, dtype and head width.

    `width`: the largest of the query, key and value widths per head.
    """
    fits = width <= _MOST_WIDTH and dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= _CAPABILITY


def plan_runs(segments_BT: torch.Tensor) -> Runs:
    """Return the runs of packed rows, for all layers of a forward pass; padding forms runs as well."""
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = starts_BT.flatten().nonzero()[:, 0]
    bounds = F.pad(starts, (0, 1), value=segments_BT.numel())
    return Runs(segments_BT=segments_BT, bounds=bounds.to(torch.int32), longest=int(bounds.diff().max()))


def attend_flash(
    q_BHTQ: torch.Tensor,
    k_BHTQ: torch.Tensor,
    *,
    v_BHTV: torch.Tensor,
    runs: Runs,
    scale: float,
    kernel: FlashKernel | None = None,
) -> torch.Tensor:
    """Return attention outputs [B, H, T, V]; heads are padded to a supported width, which changes no score."""
    attend = kernel or _kernel_of_torch()
    num_rows, num_heads, num_tokens, query_width = q_BHTQ.shape
    value_width = v_BHTV.shape[-1]
    widest = max(query_width, value_width)
    width = widest + -widest % _WIDTH_MULTIPLE

    def laid_out(x_BHTX: torch.Tensor) -> torch.Tensor:
        return F.pad(x_BHTX, (0, width - x_BHTX.shape[-1])).transpose(1, 2).flatten(0, 1)

    heads = (laid_out(q_BHTQ), laid_out(k_BHTQ), laid_out(v_BHTV))
    bounds, longest = runs.bounds, runs.longest
    out_PHX: torch.Tensor = attend(*heads, bounds, bounds, longest, longest, scale=scale, window_size=_CAUSAL)
    return out_PHX[..., :value_width].reshape(num_rows, num_tokens, num_heads, value_width).transpose(1, 2)


def _kernel_of_torch() -> FlashKernel:
    from torch.nn.attention.varlen import varlen_attn  # the import takes seconds, and CPU runs do not need it

    return varlen_attn

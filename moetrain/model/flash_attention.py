"""Attention over packed rows by torch's flash kernel, for GPUs: no mask, documents laid end to end.

B rows, H heads, T tokens, P = B * T, Q query-key width, V value width, S runs of one segment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

_MOST_WIDTH, _WIDTH_MULTIPLE = 256, 8
"""What FlashAttention-2 takes (arXiv 2307.08691)."""
_CAUSAL = (-1, 0)

FlashKernel = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`, or what takes the same arguments."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one segment, row after row: the first token of each and the end of the last, int32 [S + 1]."""

    segments_BT: torch.Tensor
    bounds: torch.Tensor
    longest: int


def takes_flash(device: torch.device, dtype: torch.dtype, *, width: int) -> bool:
    """Return whether the flash kernel runs there for queries and keys of this width."""
    fits = width <= _MOST_WIDTH and width % _WIDTH_MULTIPLE == 0
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and fits


def plan_runs(segments_BT: torch.Tensor) -> Runs:
    """Return the runs of packed rows, for all layers of a forward pass; padding is a run like any other."""
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
    kernel: FlashKernel = varlen_attn,
) -> torch.Tensor:
    """Return attention outputs [B, H, T, V]; values no wider than queries are padded to their width."""
    num_rows, num_heads, num_tokens, width = q_BHTQ.shape
    value_width = v_BHTV.shape[-1]
    padded_BHTQ = F.pad(v_BHTV, (0, width - value_width))
    q_PHQ, k_PHQ, v_PHQ = (x_BHTQ.transpose(1, 2).flatten(0, 1) for x_BHTQ in (q_BHTQ, k_BHTQ, padded_BHTQ))
    bounds, longest = runs.bounds, runs.longest
    out_PHQ: torch.Tensor = kernel(
        q_PHQ, k_PHQ, v_PHQ, bounds, bounds, longest, longest, scale=scale, window_size=_CAUSAL
    )
    return out_PHQ[..., :value_width].reshape(num_rows, num_tokens, num_heads, value_width).transpose(1, 2)

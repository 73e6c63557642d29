"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules after the last block that predict
further tokens.

Module k, counted from 1, reads at position i what the head reads of module k - 1 (for module 1: of the model) and the
embedding of the token at i + k, and predicts the token at i + k + 1. Embedding and head are those of the model. B rows,
T tokens, D hidden.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn

from moetrain.model.layers import RMSNorm


class Mtp(StrEnum):
    """What a forward pass does with the modules.

    off: they are not computed. joint: their loss trains the whole model. detached: it trains the modules alone, because
    no gradient leaves them.
    """

    off = "off"
    joint = "joint"
    detached = "detached"


@dataclass(frozen=True, kw_only=True)
class MtpHidden:
    """What the head reads of each module, [B, T, D], and whether gradients stay in the modules."""

    hidden_BTD: tuple[torch.Tensor, ...] = ()
    is_detached: bool = False


class SharedHead(nn.Module):
    """The norm before the head; the head itself is that of the model."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=eps)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return what the head reads."""
        normed: torch.Tensor = self.norm(x_BTD)
        return normed


def shifted_segments(segments_BT: torch.Tensor, distance: int) -> torch.Tensor:
    """Return the segments, with 0 (padding) where the same document has no token `distance` positions later."""
    later_BT = shifted(segments_BT, distance)
    return torch.where(later_BT == segments_BT, segments_BT, 0)


def shifted(values_BT: torch.Tensor, distance: int) -> torch.Tensor:
    """Return [B, T, ...] whose position i holds the value of position i + distance; zeros at the end."""
    kept = values_BT[:, distance:]
    return torch.cat([kept, torch.zeros_like(values_BT[:, : values_BT.shape[1] - kept.shape[1]])], dim=1)

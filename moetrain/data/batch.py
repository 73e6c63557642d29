"""The only thing that travels from data and rollouts to the trainer: per-token columns of packed rows.

B rows, T tokens a row.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(kw_only=True)
class TokenBatch:
    """Packed rows. A document never spans rows; attention and positions do not cross documents.

    tokens_BT: int64 ids. segments_BT: int64, 0 is padding, documents of a row count from 1. positions_BT: int64, from 0
    in each document. loss_mask_BT: bool; True where the token at t is predicted, from t-1 of the same document (never
    True at position 0). weights_BT: float32 factor on each token's loss. advantages_BT, logprobs_BT: float32, the
    advantage of the token's trajectory and its logprob as sampled; None outside RL.
    """

    tokens_BT: torch.Tensor
    segments_BT: torch.Tensor
    positions_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    weights_BT: torch.Tensor
    advantages_BT: torch.Tensor | None = None
    logprobs_BT: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments_BT > 0).sum())

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int(self.loss_mask_BT.sum())

    def rows(self, start: int, stop: int) -> "TokenBatch":
        """Return rows start to stop as a batch."""
        columns = {name: value[start:stop] for name, value in vars(self).items() if value is not None}
        return replace(self, **columns)

"""`TokenBatch`: packed rows of tokens with per-token columns, the input of every training step.

Both the data loader and RL produce it. B rows, T tokens per row, N predicted tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

WEIGHT = "weight"
"""Name of the column that multiplies each token's loss, float32. A batch without it uses 1."""


@dataclass(kw_only=True)
class TokenBatch:
    """Packed rows. A document never spans rows; attention and positions do not cross documents.

    tokens_BT: int64 ids. segments_BT: int64, number of the document within its row, from 1; 0 is padding.
    positions_BT: int64, position within the document, from 0. loss_mask_BT: bool, True where the token at t is
    predicted from t-1 of the same document (never at position 0). columns: other per-token inputs of an objective, by
    name; the first two axes of each tensor are [B, T].
    """

    tokens_BT: torch.Tensor
    segments_BT: torch.Tensor
    positions_BT: torch.Tensor
    loss_mask_BT: torch.Tensor
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments_BT > 0).sum())

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int(self.loss_mask_BT.sum())

    def target_weights(self) -> torch.Tensor:
        """Return the factor on the loss of each predicted token, float32 [N]."""
        if WEIGHT in self.columns:
            return self.at_targets(WEIGHT)
        return torch.ones(self.num_targets, device=self.tokens_BT.device)

    def at_targets(self, name: str) -> torch.Tensor:
        """Return a column at the predicted tokens, [N, ...], row by row. Raises KeyError for an unknown column."""
        return self.columns[name][self.loss_mask_BT]

    def with_columns(self, columns: Mapping[str, torch.Tensor]) -> "TokenBatch":
        """Return the batch with `columns` added; they replace columns of the same names."""
        return TokenBatch(**{**vars(self), "columns": {**self.columns, **columns}})

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenBatch":
        """Return the batch with `function` applied to every tensor."""
        changed = {name: function(value) for name, value in vars(self).items() if name != "columns"}
        return TokenBatch(**changed, columns={name: function(value) for name, value in self.columns.items()})

    def rows(self, start: int, stop: int) -> "TokenBatch":
        """Return rows start to stop as a batch."""
        return self.map(lambda column: column[start:stop])


def concatenated(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Return the rows of all batches, in order; the batches have the same row length and the same columns."""
    first = batches[0]
    own = {name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(first) if name != "columns"}
    columns = {name: torch.cat([batch.columns[name] for batch in batches]) for name in first.columns}
    return TokenBatch(**own, columns=columns)

"""From graded trajectories to micro-batches of per-token columns.

B rows, T tokens a row; one trajectory a row, rows of similar length together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moetrain.data.batch import TokenBatch
from moetrain.rollout.types import Trajectory

_LENGTH_MULTIPLE, _ROW_MULTIPLE = 128, 4  # rows and their lengths are rounded up, so that kernels meet few shapes


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A trajectory and its advantage."""

    trajectory: Trajectory
    advantage: float


def _rounded(length: int) -> int:
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def micro_batches(scored: Sequence[Scored], *, max_tokens: int, pad_id: int) -> list[TokenBatch]:
    """Return the trajectories that have an advantage as micro-batches of at most `max_tokens` padded tokens each.

    A trajectory never spans micro-batches; one longer than `max_tokens` is a micro-batch of its own. Trajectories with
    advantage 0 have no policy gradient and are left out: the caller's normaliser counts their tokens all the same.
    """
    rows = sorted((s for s in scored if s.advantage != 0), key=lambda s: len(s.trajectory.tokens))
    groups: list[list[Scored]] = []
    for row in rows:
        width = _rounded(len(row.trajectory.tokens))
        if groups and (len(groups[-1]) + 1) * width <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_columns(group, pad_id=pad_id) for group in groups]


def _columns(rows: Sequence[Scored], *, pad_id: int) -> TokenBatch:
    width = _rounded(max(len(row.trajectory.tokens) for row in rows))
    shape = (-(-len(rows) // _ROW_MULTIPLE) * _ROW_MULTIPLE, width)
    batch = TokenBatch(
        tokens_BT=torch.full(shape, pad_id),
        segments_BT=torch.zeros(shape, dtype=torch.long),
        positions_BT=torch.zeros(shape, dtype=torch.long),
        loss_mask_BT=torch.zeros(shape, dtype=torch.bool),
        weights_BT=torch.ones(shape),
        advantages_BT=torch.zeros(shape),
        logprobs_BT=torch.zeros(shape),
    )
    assert batch.advantages_BT is not None and batch.logprobs_BT is not None
    for index, row in enumerate(rows):
        length = len(row.trajectory.tokens)
        batch.tokens_BT[index, :length] = torch.tensor(row.trajectory.tokens)
        batch.segments_BT[index, :length] = 1
        batch.positions_BT[index, :length] = torch.arange(length)
        batch.loss_mask_BT[index, :length] = torch.tensor(row.trajectory.is_sampled)
        batch.advantages_BT[index, :length] = row.advantage
        batch.logprobs_BT[index, :length] = torch.tensor(row.trajectory.logprobs)
    return batch

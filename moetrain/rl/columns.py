"""Turns graded trajectories into the micro-batches of one rank: rows with per-token columns.

A row contains one segment. Segments of similar length share a micro-batch.

B rows, T tokens per row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import ConfigError
from moetrain.rollout.types import Segment, Trajectory

_LENGTH_MULTIPLE = 128  # row lengths are rounded up to it, so that kernels get few different shapes
LOGPROB, TEMPERATURE = "logprob", "temperature"
"""Columns that every RL batch has."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A segment of a trajectory, with an advantage per token. trajectory_id: number of the trajectory in its step."""

    trajectory: Trajectory
    segment: Segment
    advantages: Sequence[float]
    trajectory_id: int

    @property
    def width(self) -> int:
        """Tokens of the row including padding: the segment's length, rounded up."""
        return -(-len(self.segment.tokens) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a column is computed. values: returns one value per token of a row's segment. padding: value elsewhere."""

    dtype: torch.dtype
    padding: float
    values: Callable[[Row], Sequence[float]]


def _every(value: Callable[[Row], float]) -> Callable[[Row], Sequence[float]]:
    return lambda row: [value(row)] * len(row.segment.tokens)


COLUMNS: dict[str, Column] = {
    "advantage": Column(dtype=torch.float32, padding=0.0, values=lambda row: row.advantages),
    # Logprob with which the token was sampled, at the segment's temperature.
    LOGPROB: Column(dtype=torch.float32, padding=0.0, values=lambda row: row.segment.logprobs),
    # 1 for greedy segments, whose logprobs are those of temperature 1.
    TEMPERATURE: Column(dtype=torch.float32, padding=1.0, values=_every(lambda row: row.segment.temperature or 1.0)),
    # Version of the weights that sampled the token.
    "version": Column(dtype=torch.int64, padding=0, values=lambda row: row.segment.versions),
    # Number of the trajectory in the step; -1 is padding. Several micro-batches can contain its segments.
    "trajectory": Column(dtype=torch.int64, padding=-1, values=_every(lambda row: row.trajectory_id)),
    # Sampled tokens of all segments of the token's trajectory: divide by it for a mean per trajectory.
    "trajectory_tokens": Column(
        dtype=torch.float32, padding=1.0, values=_every(lambda row: row.trajectory.num_sampled)
    ),
}
"""The columns that an algorithm can request, by name. `register_column` adds one."""
_OWN = frozenset(COLUMNS)


def register_column(name: str, column: Column) -> None:
    """Add a column that algorithms can request. Raises ConfigError if moetrain has one of this name."""
    if name in _OWN:
        raise ConfigError(f"a plugin registers the RL column {name}, which moetrain has: give another name")
    COLUMNS[name] = column


def micro_batches(
    rows: Sequence[Row], *, columns: Sequence[str], max_tokens: int, pad_id: int, rank: int, world_size: int
) -> list[TokenBatch]:
    """Return the micro-batches of one rank, with at most `max_tokens` tokens each, padding included.

    Every rank gets the same number of them. A row longer than `max_tokens` is a micro-batch of its own. Rows are
    distributed so that the micro-batches that the ranks compute at the same time have similar sizes. A micro-batch
    without rows has one row of padding.
    """
    shares = balanced_groups(rows, max_tokens=max_tokens, world_size=world_size)
    names = [*dict.fromkeys([*columns, LOGPROB, TEMPERATURE])]
    return [_batch(share, columns=names, pad_id=pad_id) for share in shares[rank::world_size]]


def balanced_groups(rows: Sequence[Row], *, max_tokens: int, world_size: int) -> list[list[Row]]:
    """Return the rows in groups whose number is a multiple of `world_size`; group i is for rank i % world_size.

    The number of groups is the smallest that `max_tokens` allows. Rows are grouped in order of length, such that the
    largest group is as small as possible with this number. No group is empty while another has two rows.
    """
    ordered = sorted(rows, key=lambda row: row.width)
    fewest = len(_groups(ordered, max_tokens=max_tokens))
    num_groups = -(-fewest // world_size) * world_size
    low, high = 1, max_tokens
    while low < high:  # smallest limit that gives no more groups
        middle = (low + high) // 2
        if len(_groups(ordered, max_tokens=middle)) <= num_groups:
            high = middle
        else:
            low = middle + 1
    groups = _groups(ordered, max_tokens=low)
    while len(groups) < num_groups:
        group = groups.pop(max(range(len(groups)), key=lambda index: (len(groups[index]) > 1, _size(groups[index]))))
        half = len(group) // 2  # 0 for a single row: the other part is then empty
        groups += [group[:half], group[half:]]
    return sorted(groups, key=_size)


def _size(group: Sequence[Row]) -> int:
    """Return the padded tokens of a group."""
    return len(group) * max((row.width for row in group), default=0)


def _groups(ordered: Sequence[Row], *, max_tokens: int) -> list[list[Row]]:
    """Return rows of ascending width in groups of at most `max_tokens` padded tokens, or of one row."""
    groups: list[list[Row]] = []
    for row in ordered:
        if groups and (len(groups[-1]) + 1) * row.width <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _batch(rows: Sequence[Row], *, columns: Sequence[str], pad_id: int) -> TokenBatch:
    shape = (max(len(rows), 1), max((row.width for row in rows), default=_LENGTH_MULTIPLE))
    batch = TokenBatch(
        tokens_BT=torch.full(shape, pad_id),
        segments_BT=torch.zeros(shape, dtype=torch.long),
        positions_BT=torch.zeros(shape, dtype=torch.long),
        loss_mask_BT=torch.zeros(shape, dtype=torch.bool),
        columns={name: torch.full(shape, COLUMNS[name].padding, dtype=COLUMNS[name].dtype) for name in columns},
    )
    for index, row in enumerate(rows):
        length = len(row.segment.tokens)
        batch.tokens_BT[index, :length] = torch.tensor(row.segment.tokens)
        batch.segments_BT[index, :length] = 1
        batch.positions_BT[index, :length] = torch.arange(length)
        batch.loss_mask_BT[index, :length] = torch.tensor(row.segment.is_sampled)
        for name in columns:
            values_T = torch.tensor(COLUMNS[name].values(row), dtype=COLUMNS[name].dtype)
            if values_T.shape != (length,):  # one number would be broadcast
                raise ConfigError(
                    f"the RL column {name} has values of shape {list(values_T.shape)} for a segment of {length} "
                    "tokens: return one number per token"
                )
            batch.columns[name][index, :length] = values_T
    return batch

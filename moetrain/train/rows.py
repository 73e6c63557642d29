"""How the rows of a global batch are split over ranks and micro-batches. Pure functions of sizes."""

from collections.abc import Callable

import torch

from moetrain.data.batch import TokenBatch


def padded(batch: TokenBatch, num_rows: int) -> TokenBatch:
    """Return `batch` extended to `num_rows` rows with padding rows, which contain no tokens and change no result."""
    missing = num_rows - len(batch.tokens_BT)
    if missing <= 0:
        return batch
    return batch.map(lambda column: torch.cat([column, column.new_zeros(missing, *column.shape[1:])]))


def rank_rows(batch: TokenBatch, *, rank: int, world_size: int) -> TokenBatch:
    """Return the rows of one rank: consecutive, the same number on every rank, padded if they do not divide evenly."""
    rows = -(-len(batch.tokens_BT) // world_size)
    return padded(batch, rows * world_size).rows(rank * rows, (rank + 1) * rows)


def read_rank_rows(read: Callable[[int, int], TokenBatch], rows: range, *, rank: int, world_size: int) -> TokenBatch:
    """Return what `rank_rows` returns for the rows of a step, but read only this rank's.

    read: returns rows [start, stop) of the run.
    """
    share = -(-len(rows) // world_size)
    own = rows[rank * share : (rank + 1) * share]
    if not own:  # the last ranks of a step with fewer rows than ranks have padding alone
        return padded(read(rows.start, rows.start + 1).rows(0, 0), share)
    return padded(read(own.start, own.stop), share)


def split_rows(batch: TokenBatch, *, rows: int) -> list[TokenBatch]:
    """Return `batch` as micro-batches of at most `rows` rows, in order."""
    return [batch.rows(start, start + rows) for start in range(0, len(batch.tokens_BT), rows)]

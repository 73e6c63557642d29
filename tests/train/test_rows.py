"""The rows of a rank: the same whether the whole step is read or the rank's share alone."""

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.train.rows import rank_rows, read_rank_rows
from tests.train.toy import toy_batch


@pytest.mark.parametrize(("num_rows", "world_size"), [(8, 1), (8, 2), (7, 3), (2, 4), (1, 3), (9, 4)])
def test_a_rank_reads_only_its_own_rows(num_rows: int, world_size: int) -> None:
    whole = toy_batch(0, rows=50)
    read: list[int] = []

    def between(start: int, stop: int) -> TokenBatch:
        read.extend(range(start, stop))
        return whole.rows(start, stop)

    rows = range(5, 5 + num_rows)
    for rank in range(world_size):
        mine = read_rank_rows(between, rows, rank=rank, world_size=world_size)
        expected = rank_rows(whole.rows(rows.start, rows.stop), rank=rank, world_size=world_size)
        for name, column in vars(mine).items():
            if name != "columns":
                assert torch.equal(column, vars(expected)[name])
    assert sorted({*read}) == list(rows) and len(read) <= num_rows + world_size - 1

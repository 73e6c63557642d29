"""Trajectories as columns, and how micro-batches are shared out over ranks."""

from dataclasses import replace

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import ConfigError
from moetrain.rl.columns import COLUMNS, Column, Row, balanced_groups, micro_batches, register_column
from tests.rl.trajectories import draw_trajectory, segment_of


def _row(length: int, *, advantage: float = 0.5, temperature: float = 1.0) -> Row:
    trajectory = draw_trajectory([segment_of(length, temperature=temperature)])
    return Row(
        trajectory=trajectory, segment=trajectory.segments[0], advantages=[advantage] * length, trajectory_id=length
    )


def _batches(rows: list[Row], *, max_tokens: int, world_size: int = 1) -> list[list[TokenBatch]]:
    """Return the micro-batches of each rank."""
    return [
        micro_batches(rows, columns=["advantage"], max_tokens=max_tokens, pad_id=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
def test_every_row_is_in_one_micro_batch_of_one_rank_and_whole(world_size: int) -> None:
    lengths = [10, 70, 130, 131, 500, 500, 640, 1200]
    of_ranks = _batches([_row(length) for length in lengths], max_tokens=1280, world_size=world_size)
    assert len({len(batches) for batches in of_ranks}) == 1
    found = [int(row.sum()) for batches in of_ranks for batch in batches for row in batch.segments_BT if row.any()]
    assert sorted(found) == lengths
    assert all(batch.tokens_BT.numel() <= 1280 for batches in of_ranks for batch in batches)


def test_a_row_that_is_longer_than_a_micro_batch_is_one_of_its_own() -> None:
    ((first, second),) = _batches([_row(1000), _row(100)], max_tokens=256)
    assert [len(first.tokens_BT), len(second.tokens_BT)] == [1, 1]
    assert second.tokens_BT.shape[1] == 1024


def test_a_limit_of_one_rank_holds_for_every_rank_and_none_computes_padding_while_others_work() -> None:
    """64 ranks, 128 rows of up to 1,280 tokens: a global micro-batch that is split over ranks is mostly padding."""
    rows = [_row(640 + 5 * index) for index in range(128)]
    of_ranks = _batches(rows, max_tokens=2560, world_size=64)
    padded = sum(batch.tokens_BT.numel() for batches in of_ranks for batch in batches)
    held = sum(batch.num_tokens for batches in of_ranks for batch in batches)
    assert held / padded > 0.85
    assert all(batch.num_tokens for batches in of_ranks for batch in batches)
    assert {len(batches) for batches in of_ranks} == {1}


def test_micro_batches_that_are_computed_at_the_same_time_are_of_similar_size() -> None:
    groups = balanced_groups([_row(100 + 11 * index) for index in range(100)], max_tokens=8192, world_size=4)
    for start in range(0, len(groups), 4):
        sizes = [len(group) * max(row.width for row in group) for group in groups[start : start + 4]]
        assert max(sizes) < 1.5 * min(sizes)


def test_more_ranks_than_rows_give_each_of_the_others_one_row_of_padding() -> None:
    of_ranks = _batches([_row(10), _row(20)], max_tokens=4096, world_size=4)
    assert [batch.num_tokens for (batch,) in of_ranks] == [0, 0, 10, 20]
    assert all(batch.num_targets == 0 for (batch,) in of_ranks[:2])


def test_only_sampled_tokens_are_trained_on_with_their_own_numbers() -> None:
    ((batch,),) = _batches([_row(10, temperature=0.7)], max_tokens=2048)
    assert batch.loss_mask_BT[0].nonzero().flatten().tolist() == [7, 8, 9]
    assert batch.at_targets("logprob").tolist() == [-0.5] * 3
    assert batch.at_targets("advantage").tolist() == [0.5] * 3
    assert batch.at_targets("temperature").tolist() == pytest.approx([0.7] * 3)


def test_a_greedy_token_has_the_temperature_of_its_logprob() -> None:
    ((batch,),) = _batches([_row(10, temperature=0.0)], max_tokens=2048)
    assert batch.at_targets("temperature").tolist() == [1.0] * 3


def test_every_column_can_be_asked_for() -> None:
    rows = [_row(10), _row(20)]
    (batch,) = micro_batches(rows, columns=list(COLUMNS), max_tokens=4096, pad_id=0, rank=0, world_size=1)
    assert batch.columns.keys() == COLUMNS.keys()
    assert batch.at_targets("trajectory").tolist() == [10] * 3 + [20] * 3
    assert batch.at_targets("trajectory_tokens").tolist() == [3.0] * 6
    assert batch.columns["version"].dtype == torch.int64


def test_a_column_of_a_plugin_is_computed_and_none_of_moetrain_is_replaced() -> None:
    turns = Column(
        dtype=torch.int64, padding=-1, values=lambda row: [row.trajectory.num_turns] * len(row.segment.tokens)
    )
    with pytest.raises(ConfigError, match="registers the RL column advantage, which moetrain has: give another name"):
        register_column("advantage", turns)
    register_column("turns", turns)
    try:
        (batch,) = micro_batches([_row(5)], columns=["turns"], max_tokens=4096, pad_id=0, rank=0, world_size=1)
        register_column("turns", replace(turns, values=lambda row: [row.trajectory.num_turns]))
        with pytest.raises(ConfigError, match=r"column turns has values of shape \[1\] for a segment of 5 tokens"):
            micro_batches([_row(5)], columns=["turns"], max_tokens=4096, pad_id=0, rank=0, world_size=1)
    finally:
        del COLUMNS["turns"]
    values = batch.columns["turns"][0].tolist()
    assert values[:5] == [_row(5).trajectory.num_turns] * 5 and set(values[5:]) == {-1}

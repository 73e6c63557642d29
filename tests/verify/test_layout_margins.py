"""The lead of a choice of experts is twice the smallest change of scores that makes another choice."""

import itertools

import pytest
import torch

from moetrain.model.config import ModelConfig
from moetrain.model.router import choose
from moetrain.verify.layout_margins import largest_score_gap, smallest_lead

EXPERTS = 6


@pytest.mark.parametrize(
    ("num_groups", "num_open", "num_chosen"), [(1, 1, 2), (3, 2, 1), (3, 2, 2), (3, 1, 2), (2, 1, 1), (6, 3, 2)]
)
def test_changes_below_half_the_lead_change_no_choice_and_some_change_just_above_does(
    num_groups: int, num_open: int, num_chosen: int
) -> None:
    config = ModelConfig(
        num_experts=EXPERTS,
        num_experts_per_token=num_chosen,
        num_groups=num_groups,
        num_groups_per_token=num_open,
        routed_scaling_factor=1.0,
    )
    signs_SE = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=EXPERTS)), dtype=torch.float64)
    stream = torch.Generator().manual_seed(0)
    zeros_E = torch.zeros(EXPERTS, dtype=torch.float64)
    for scores_E in torch.rand(40, EXPERTS, generator=stream, dtype=torch.float64):
        ids_1K = choose(scores_E[None], zeros_E, config=config)
        half = smallest_lead(scores_E[None], ids_1K, config=config) / 2
        expected_K = ids_1K.sort().values
        below_SK = choose(scores_E + 0.999 * half * signs_SE, zeros_E, config=config).sort(dim=1).values
        assert (below_SK == expected_K).all()
        above_SK = choose(scores_E + 1.001 * half * signs_SE, zeros_E, config=config).sort(dim=1).values
        assert (above_SK != expected_K).any()


def test_where_every_expert_is_chosen_there_is_no_other_choice() -> None:
    config = ModelConfig(num_experts=2, num_experts_per_token=2, routed_scaling_factor=1.0)
    assert smallest_lead(torch.tensor([[0.1, 0.1]]), torch.tensor([[0, 1]]), config=config) == float("inf")


def test_scores_of_rows_in_reverse_are_compared_with_those_of_the_same_row() -> None:
    whole_NE = torch.rand(3 * 2, 4, generator=torch.Generator().manual_seed(0))
    rows = list(whole_NE.split(2))
    moved = [rows[2], rows[1] + 0.25, rows[0]]
    assert largest_score_gap([whole_NE], rows[::-1], num_layers=1) == 0.0
    assert largest_score_gap([whole_NE], moved, num_layers=1) == pytest.approx(0.25)

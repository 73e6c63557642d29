"""Experts in rounds of limited rows: the same numbers as at once, and memory that the limit bounds."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from moetrain.model.config import ModelConfig
from moetrain.model.moe import Experts, LocalDispatcher
from moetrain.ops.expert_rounds import experts_of_round, round_ends, rows_between
from moetrain.ops.experts import ROW_MULTIPLE
from tests.allocations import peak_bytes

EXPERTS, CHOSEN, HIDDEN, WIDTH = 6, 2, 32, 48


@dataclass(kw_only=True)
class Case:
    """A layer and what comes to it; each call of `run` starts from the same values."""

    num_tokens: int = 150
    dtype: torch.dtype = torch.float32
    to_first: bool = False
    width: int = WIDTH

    def run(self, limit: int | None) -> dict[str, torch.Tensor]:
        """Return output and gradients."""
        config = ModelConfig(hidden_size=HIDDEN, moe_intermediate_size=self.width, num_experts=EXPERTS)
        stream = torch.Generator().manual_seed(0)
        experts = Experts(config, num_local=EXPERTS, compute_dtype=self.dtype)
        for param in experts.parameters():
            param.data.normal_(std=0.3, generator=stream)
        x_ND = torch.randn(self.num_tokens, HIDDEN, generator=stream).to(self.dtype).requires_grad_()
        ids_NK = torch.rand(self.num_tokens, EXPERTS, generator=stream).argsort(dim=1)[:, :CHOSEN]
        if self.to_first:
            ids_NK = torch.arange(CHOSEN).expand(self.num_tokens, CHOSEN)
        weights_NK = torch.rand(self.num_tokens, CHOSEN, generator=stream).requires_grad_()
        pull_ND = torch.randn(self.num_tokens, HIDDEN, generator=stream)
        y_ND = LocalDispatcher(expert_rows=limit)(x_ND, ids_NK, weights_NK, experts)
        (y_ND * pull_ND).sum().backward()
        gradients = {"x": x_ND, "weights": weights_NK, **dict(experts.named_parameters())}
        return {"output": y_ND.detach(), **{name: tensor.grad for name, tensor in gradients.items()}}


def gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest element of its tensor."""
    return max(
        float((found[name] - tensor).abs().max() / tensor.abs().max().clamp_min(1e-30)) if tensor.numel() else 0.0
        for name, tensor in expected.items()
    )


def test_a_round_is_within_the_limit_and_cuts_no_expert_that_fits() -> None:
    assert round_ends([3, 3, 3], limit=6) == [6, 9]
    assert round_ends([2, 14, 1], limit=6) == [2, 8, 14, 17]
    assert round_ends([0, 0], limit=6) == [0]
    assert round_ends([12], limit=6) == [6, 12]
    stream = torch.Generator().manual_seed(0)
    for limit in (1, 4, 9, 30):
        for _ in range(50):
            counts = torch.randint(0, 14, (7,), generator=stream).tolist()
            ends = round_ends(counts, limit=limit)
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            assert sum(sizes) == sum(counts)
            assert all(0 < size <= limit for size in sizes) or sum(counts) == 0
            end = 0
            for count in counts:
                inside = [cut for cut in ends if end < cut < end + count]
                assert count > limit or not inside
                end += count


def test_the_blocks_of_a_range_are_those_that_a_list_of_rows_says() -> None:
    counts_X = torch.tensor([3, 0, 4, 2])
    rows = [0, 0, 0, 2, 2, 2, 2, 3, 3]
    for first in range(10):
        for last in range(first, 10):
            found = rows_between(counts_X, first=torch.tensor(first), last=torch.tensor(last))
            assert found.tolist() == [rows[first:last].count(block) for block in range(4)]
    assert experts_of_round([0, 2, 0, 1, 0]) == slice(1, 4)
    assert experts_of_round([0, 0]) == slice(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [ROW_MULTIPLE, 100, 150])
def test_rounds_that_cut_no_expert_give_the_same_bits(limit: int, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    expected, found = case.run(None), case.run(limit)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("limit", [1, 7, ROW_MULTIPLE])
@pytest.mark.parametrize("to_first", [False, True])
def test_rounds_that_cut_experts_change_rounding_alone(limit: int, to_first: bool) -> None:
    case = Case(to_first=to_first)
    assert gap(case.run(limit), case.run(None)) < 1e-6


def test_no_token_at_all_and_more_room_than_rows_are_fine() -> None:
    for num_tokens in (0, 1, 5):
        expected, found = Case(num_tokens=num_tokens).run(None), Case(num_tokens=num_tokens).run(10)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_cut_expert_of_bfloat16_sums_its_gradient_in_float32() -> None:
    exact = Case(to_first=True).run(None)
    at_once, in_rounds = (gap(Case(to_first=True, dtype=torch.bfloat16).run(limit), exact) for limit in (None, 4))
    assert in_rounds < 1.5 * at_once


def test_what_a_row_adds_to_the_memory_does_not_depend_on_the_width_of_an_expert() -> None:
    """Peaks of a forward and backward pass at two sizes: rows are kept as the layer sees them, not as experts do."""
    added = {}
    for limit, width in ((None, WIDTH), (None, 4 * WIDTH), (ROW_MULTIPLE, WIDTH), (ROW_MULTIPLE, 4 * WIDTH)):
        few, many = (peak_bytes(partial(Case(num_tokens=n, width=width).run, limit)) for n in (1000, 2000))
        added[limit, width] = (many - few) / (1000 * CHOSEN)
    assert added[None, 4 * WIDTH] > 2 * added[None, WIDTH]
    assert added[ROW_MULTIPLE, 4 * WIDTH] < 1.05 * added[ROW_MULTIPLE, WIDTH]
    assert added[ROW_MULTIPLE, WIDTH] < added[None, WIDTH]

"""Dispatch over two ranks in rounds of limited rows, against the same at once. One launch serves all tests here."""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.config import ModelConfig, Recompute
from moetrain.model.moe import Experts
from moetrain.ops.experts import ROW_MULTIPLE
from moetrain.parallel import dispatch
from moetrain.parallel.config import EngineName
from moetrain.parallel.dispatch import AllToAllDispatcher
from moetrain.parallel.engine import Engine
from moetrain.parallel.topology import Topology
from tests.allocations import peak_bytes
from tests.distributed import run_ranks
from tests.parallel.nano import Trace, build, difference, padding, train

FP32_ROUNDING = 1e-6
EXPERTS, CHOSEN, HIDDEN, WIDTH = 8, 2, 32, 64
LOCAL = EXPERTS // 2
ROUTES = ("even", "one rank", "one expert")
WHOLE_EXPERTS = 24  # in a step of the nano model no expert has more rows
BELOW_AN_EXPERT = 5


@dataclass(kw_only=True)
class Case:
    """Tokens of both ranks and where they go; the same values at each call of `run`."""

    topology: Topology
    num_tokens: tuple[int, int]
    route: str

    def run(self, limit: int | None) -> dict[str, torch.Tensor]:
        """Return output and gradients of this rank."""
        config = ModelConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS)
        stream = torch.Generator().manual_seed(self.topology.rank)
        experts = Experts(config, num_local=LOCAL, compute_dtype=torch.float32)
        for param in experts.parameters():
            param.data.normal_(std=0.3, generator=stream)
        num_tokens = self.num_tokens[self.topology.rank]
        x_ND = torch.randn(num_tokens, HIDDEN, generator=stream).requires_grad_()
        choices = LOCAL if self.route == "one rank" else EXPERTS
        ids_NK = torch.rand(num_tokens, choices, generator=stream).argsort(dim=1)[:, :CHOSEN]
        if self.route == "one expert":
            ids_NK[:] = torch.tensor([LOCAL + 1, 0])  # the second choice keeps the other rank busy too
        weights_NK = torch.rand(num_tokens, CHOSEN, generator=stream).requires_grad_()
        pull_ND = torch.randn(num_tokens, HIDDEN, generator=stream)
        dispatcher = AllToAllDispatcher(self.topology, num_experts=EXPERTS, expert_rows=limit)
        y_ND = dispatcher(x_ND, ids_NK, weights_NK, experts)
        (y_ND * pull_ND).sum().backward()
        gradients = {"x": x_ND, "weights": weights_NK, **dict(experts.named_parameters())}
        return {"output": y_ND.detach(), **{name: tensor.grad for name, tensor in gradients.items()}}


@dataclass(kw_only=True)
class Compared:
    """A case with a limit beside the same without. `most_rows`: that this rank received at once with the limit."""

    same_bits: bool
    gap: float
    most_rows: int
    num_exchanges: int


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_both_ranks, 2)


CASES = [*product(((90, 60), (0, 40)), ROUTES, (7, 64, 150)), ((0, 0), "even", 7), ((3, 2), "one rank", 1)]
"""(tokens of each rank, where they go, limit)"""
LAYOUTS = [{"zero": 1}, {"zero": 2, "quantize": True, "recompute": Recompute.blocks}, {"zero": 3}]
PEAK_LIMIT = 128
FEW, MANY = 500, 4000


def _both_ranks() -> dict[str, Any]:
    torch.set_num_threads(1)
    topology = build(zero=1, expert=2).topology
    return {
        "compared": {
            (num_tokens, route, limit): _compare(Case(topology=topology, num_tokens=num_tokens, route=route), limit)
            for num_tokens, route, limit in CASES
        },
        "peaks": {
            (num_tokens, limit): peak_bytes(
                partial(Case(topology=topology, num_tokens=(0, num_tokens), route="one rank").run, limit)
            )
            for num_tokens in (FEW, MANY)
            for limit in (None, PEAK_LIMIT)
        },
        "trained": [
            {
                limit: _to_first_experts(build(expert=2, expert_rows=limit, **layout))
                for limit in (None, WHOLE_EXPERTS, BELOW_AN_EXPERT)
            }
            for layout in LAYOUTS
        ],
    }


def _compare(case: Case, limit: int) -> Compared:
    expected = case.run(None)
    received: list[int] = []
    inner = dispatch.exchange

    def watched(rows: torch.Tensor, **named: Any) -> torch.Tensor:
        arrived = inner(rows, **named)
        received.append(len(arrived))
        return arrived

    dispatch.exchange = watched
    try:
        found = case.run(limit)
    finally:
        dispatch.exchange = inner
    pairs = [(found[name], tensor) for name, tensor in expected.items()]
    return Compared(
        same_bits=all(torch.equal(ours, theirs) for ours, theirs in pairs),
        gap=max(
            float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
            for ours, theirs in pairs
            if theirs.numel()
        ),
        most_rows=max(received),
        num_exchanges=len(received),
    )


def _to_first_experts(engine: Engine) -> list[Trace]:
    """Train with all tokens sent to the experts of the first rank; in the second step the other rank has none."""
    for _, layer in engine.model.moe_layers():
        layer.gate.e_score_correction_bias.copy_(torch.tensor([10.0, 10.0, 0.0, 0.0]))
    return [*train(engine, range(1)), *train(engine, range(1, 2), micro_batches_of=_all_to_the_first_rank)]


def _all_to_the_first_rank(whole: TokenBatch, rank: int, world_size: int) -> list[TokenBatch]:
    del world_size
    return [whole.rows(start, start + 1) if rank == 0 else padding() for start in range(len(whole.tokens_BT))]


def test_rounds_change_no_bit_where_no_expert_is_cut_and_rounding_alone_where_one_is(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        for (num_tokens, route, limit), compared in rank["compared"].items():
            where = f"{num_tokens} tokens, {route}, at most {limit} rows: {compared}"
            assert compared.gap < FP32_ROUNDING, where
            assert compared.same_bits or limit < sum(num_tokens), where  # a token goes to an expert once


def test_experts_that_fit_keep_their_bits_when_their_rank_needs_several_rounds(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        compared = rank["compared"][(90, 60), "one rank", 150]
        assert compared.num_exchanges > 4  # more than there and back, forward and backward
        assert compared.same_bits


def test_no_rank_ever_receives_more_rows_of_tokens_than_its_own_or_the_limit(ranks: list[dict[str, Any]]) -> None:
    """What comes back are a rank's own rows: at most so many."""
    for index, rank in enumerate(ranks):
        for (num_tokens, route, limit), compared in rank["compared"].items():
            own = CHOSEN * num_tokens[index]
            assert compared.most_rows <= max(limit, min(own, 2 * limit)), (num_tokens, route, limit, compared)


def test_all_ranks_take_part_in_all_rounds(ranks: list[dict[str, Any]]) -> None:
    for case, compared in ranks[0]["compared"].items():
        assert compared.num_exchanges == ranks[1]["compared"][case].num_exchanges, case


def test_the_memory_of_a_rank_that_receives_everything_is_bounded_by_the_limit(ranks: list[dict[str, Any]]) -> None:
    """The first rank has no token of its own and gets those of the other: what it holds is weights and a round."""
    peaks = ranks[0]["peaks"]
    weights = 3 * LOCAL * HIDDEN * WIDTH * 4  # bytes; they, their gradient, its float32 sum and a round's share of it
    a_round = (PEAK_LIMIT + (ROW_MULTIPLE - 1) * LOCAL) * 7 * (HIDDEN + WIDTH) * 4
    print(f"bytes at most, by tokens and limit: {peaks}; bound with the limit: {4 * weights + a_round}")
    assert peaks[MANY, PEAK_LIMIT] < 4 * weights + a_round < 0.2 * peaks[MANY, None]
    assert peaks[MANY, PEAK_LIMIT] < 1.2 * peaks[FEW, PEAK_LIMIT]


@pytest.mark.parametrize("case", range(len(LAYOUTS)))
def test_training_in_rounds_gives_the_numbers_of_training_without(ranks: list[dict[str, Any]], case: int) -> None:
    for rank in ranks:
        trained = rank["trained"][case]
        assert trained[WHOLE_EXPERTS] == trained[None]
        assert difference(trained[BELOW_AN_EXPERT], trained[None]) < FP32_ROUNDING


@pytest.mark.parametrize("engine", list(EngineName))
@pytest.mark.parametrize("recompute", list(Recompute))
def test_one_process_trains_in_rounds_too(engine: EngineName, recompute: Recompute) -> None:
    torch.set_num_threads(1)
    expected = train(build(engine), range(2))
    assert train(build(engine, recompute=recompute, expert_rows=WHOLE_EXPERTS // 2), range(2)) == expected
    found = train(build(engine, recompute=recompute, expert_rows=BELOW_AN_EXPERT), range(2))
    assert difference(found, expected) < FP32_ROUNDING

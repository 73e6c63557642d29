"""QK-Clip on two gloo ranks against the plain loop in this process. One launch serves all tests of this file."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from moetrain.model.attention import MaxLogits
from moetrain.model.config import BalanceConfig, BiasRule
from moetrain.parallel.config import EngineName
from moetrain.parallel.protocol import Engine, Objective
from moetrain.train.loss import GlobalCounts, language_model_objective
from moetrain.train.rows import rank_rows, split_rows
from moetrain.train.step import train_step
from tests.distributed import run_ranks
from tests.parallel.nano import LEARNING_RATE, batch_of, build, largest_gap, padding

LAYOUTS = list(product((1, 2), (1, 2)))  # (zero, expert)
STEPS = 3
THRESHOLD = 0.6
STATE_ROUNDING = 5e-5  # absolute, after steps of LEARNING_RATE
BALANCE = BalanceConfig(bias_rule=BiasRule.none, sequence_loss=0.0)


@dataclass(kw_only=True)
class Seen:
    """What one rank saw: the metrics of each step, and the state on the main rank."""

    metrics: list[dict[str, float]]
    state: dict[str, torch.Tensor] | None


def _objective_for(counts: GlobalCounts) -> Objective:
    return language_model_objective(counts, balance=BALANCE, max_logits=MaxLogits.measured)


def _see(engine: Engine, *, rows_per_micro_batch: int, only_first_rank: bool = False) -> Seen:
    topology = engine.topology
    metrics = []
    for step in range(STEPS):
        whole = batch_of(step)
        mine = rank_rows(whole, rank=topology.rank, world_size=topology.world_size)
        if only_first_rank:
            mine = whole if topology.is_main else padding()
        metrics.append(
            train_step(
                engine,
                _objective_for,
                micro_batches=split_rows(mine, rows=rows_per_micro_batch),
                learning_rate=LEARNING_RATE,
                balance=BALANCE,
                step=step,
                qk_clip=THRESHOLD,
            )
        )
    return Seen(metrics=metrics, state=engine.gather_state(with_optimizer=True))


def _both_ranks() -> dict[str, Seen]:
    torch.set_num_threads(1)
    seen = {
        f"zero {zero} expert {expert}": _see(build(zero=zero, expert=expert), rows_per_micro_batch=1)
        for zero, expert in LAYOUTS
    }
    seen["one rank without tokens"] = _see(build(zero=2, expert=2), rows_per_micro_batch=4, only_first_rank=True)
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(_both_ranks, 2)


@pytest.fixture(scope="module")
def plain() -> Seen:
    return _see(build(EngineName.torch), rows_per_micro_batch=4)


@pytest.mark.parametrize(
    "layout", [*(f"zero {zero} expert {expert}" for zero, expert in LAYOUTS), "one rank without tokens"]
)
def test_two_ranks_clip_the_heads_that_one_does_by_as_much(
    layout: str, ranks: list[dict[str, Seen]], plain: Seen
) -> None:
    assert any(values["heads_clipped"] > 0 for values in plain.metrics)
    assert any(values["heads_clipped"] < 4 for values in plain.metrics)
    names = [name for name in plain.metrics[0] if name.startswith(("max_logit", "heads_clipped", "loss", "grad_norm"))]
    assert len(names) == 6
    for seen in (rank[layout] for rank in ranks):
        for found, expected in zip(seen.metrics, plain.metrics, strict=True):
            assert {name: found[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-5
            )
    state = ranks[0][layout].state
    assert state is not None and plain.state is not None
    assert largest_gap(state, plain.state) < STATE_ROUNDING

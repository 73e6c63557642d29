"""The balance losses and the bias in training: the same whatever a step is cut into, in one process and in two."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.log import JsonlMetrics
from moetrain.model.config import BalanceConfig, BiasRule
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine
from moetrain.quant.config import QuantConfig
from moetrain.train.config import ComputeDtype, DocumentTrainConfig
from moetrain.train.document_stage import document_training
from moetrain.train.loop import run_training
from moetrain.train.loss import language_model_objective
from moetrain.train.rows import padded, rank_rows, split_rows
from moetrain.train.step import train_step
from tests.distributed import run_ranks
from tests.train.toy import one_document_per_row, toy_batch, toy_engine, toy_model, toy_stage

ALL = BalanceConfig(bias_rule=BiasRule.quantile, sequence_loss=0.1, global_loss=0.2, z_loss=0.05)
"""Weights that make each loss felt in the sum."""
FP32_ROUNDING = 1e-5
STEPS = 3


def biases(engine: Engine) -> torch.Tensor:
    return torch.stack([layer.gate.e_score_correction_bias.clone() for _, layer in engine.model.moe_layers()])


def take_step(
    engine: Engine, batches: list[TokenBatch], *, balance: BalanceConfig = ALL, step: int = 0
) -> dict[str, float]:
    return train_step(
        engine,
        lambda counts: language_model_objective(counts, balance=balance),
        micro_batches=batches,
        learning_rate=1e-2,
        balance=balance,
        step=step,
    )


CUTS: dict[str, Callable[[TokenBatch], list[TokenBatch]]] = {
    "two micro-batches": lambda batch: split_rows(batch, rows=2),
    "one row per micro-batch": lambda batch: split_rows(batch, rows=1),
    "rows of padding": lambda batch: split_rows(padded(batch, 7), rows=3),
    "one document per row": lambda batch: split_rows(one_document_per_row(batch), rows=3),
}


@pytest.mark.parametrize("cut", CUTS)
def test_losses_gradient_and_bias_are_the_same_for_every_cut_of_a_step(cut: str) -> None:
    whole, parts = toy_engine(balance=ALL), toy_engine(balance=ALL)
    expected = take_step(whole, [toy_batch(0)])
    found = take_step(parts, CUTS[cut](toy_batch(0)))
    for name in ("loss", "balance_loss", "global_balance_loss", "z_loss", "grad_norm", "maxvio", "router_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=FP32_ROUNDING), name
        assert expected[name] > 0, name
    torch.testing.assert_close(biases(parts), biases(whole), rtol=0, atol=1e-6)


def test_the_global_loss_is_the_formula_on_the_counts_of_the_whole_batch() -> None:
    balance = BalanceConfig(bias_rule=BiasRule.none, sequence_loss=0.0, global_loss=0.5)
    engine, batch = toy_engine(balance=balance), toy_batch(0)
    config = engine.model.config
    output = engine.model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
    expected = 0.0
    for counts_E, score_sums_E in zip(output.counts_LE.tolist(), output.score_sums_LE.tolist(), strict=True):
        for count, score_sum in zip(counts_E, score_sums_E, strict=True):
            share = count / (batch.num_tokens * config.num_experts_per_token) * config.num_experts
            expected += share * score_sum / batch.num_tokens
    found = take_step(engine, split_rows(batch, rows=1), balance=balance)
    assert found["global_balance_loss"] == pytest.approx(0.5 * expected, rel=FP32_ROUNDING)


def test_each_loss_reaches_the_router_and_no_loss_no_gradient() -> None:
    without = BalanceConfig(bias_rule=BiasRule.none, sequence_loss=0.0)
    norms = {}
    for name in ("none", "sequence_loss", "global_loss", "z_loss"):
        balance = without if name == "none" else replace(without, **{name: 0.5})
        engine = toy_engine(balance=balance)
        norms[name] = take_step(engine, [toy_batch(0)], balance=balance)["grad_norm"]
    assert all(abs(norms[name] - norms["none"]) > 1e-3 for name in norms if name != "none"), norms


def test_metrics_of_losses_that_are_off_are_left_out() -> None:
    balance = BalanceConfig()
    found = take_step(toy_engine(balance=balance), [toy_batch(0)], balance=balance)
    assert "balance_loss" in found
    assert "z_loss" not in found and "global_balance_loss" not in found


def test_the_quantile_bias_is_float32_under_bfloat16_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def trained(folder: str, *, steps: int) -> Engine:
        engine = toy_engine(balance=ALL, compute_dtype=torch.bfloat16)
        stage = replace(
            toy_stage(engine, steps=4),
            balance=ALL,
            objective_at=lambda step: lambda counts: language_model_objective(counts, balance=ALL),
        )
        config = DocumentTrainConfig(
            steps=steps,
            rows_per_step=4,
            rows_per_micro_batch=2,
            checkpoint_every=2,
            compute_dtype=ComputeDtype.bfloat16,
        )
        metrics = JsonlMetrics(tmp_path / f"{folder}.jsonl")
        run_training(document_training(stage, config), config, folder=tmp_path / folder, metrics=metrics)
        metrics.close()
        return engine

    straight = trained("straight", steps=4)
    trained("stopped", steps=2)
    resumed = trained("stopped", steps=4)
    assert biases(straight).dtype == torch.float32
    assert biases(straight).abs().max() > 0
    assert torch.equal(biases(resumed), biases(straight))
    state = resumed.gather_state(with_optimizer=False)
    assert state is not None
    stored = [tensor for name, tensor in state.items() if name.endswith("e_score_correction_bias")]
    assert torch.equal(torch.stack(stored), biases(straight))


LAYOUTS = {
    "data": (1, 1, 4),
    "data, accumulated": (1, 2, 1),
    "experts": (2, 1, 4),
    "experts, accumulated": (2, 1, 1),
    "weights in parts, accumulated": (1, 3, 1),
    "experts, weights in parts": (2, 3, 4),
}
"""(parallel.expert, parallel.zero, rows a micro-batch)"""


def _trace(engine: Engine, *, rows: int) -> dict[str, Any]:
    topology = engine.topology
    steps = []
    for step in range(STEPS):
        mine = rank_rows(toy_batch(step), rank=topology.rank, world_size=topology.world_size)
        steps.append(take_step(engine, split_rows(mine, rows=rows), step=step))
    return {"steps": steps, "biases": biases(engine)}


def _engine(engine: EngineName, *, expert: int = 1, zero: int = 1) -> Engine:
    return build_engine(
        toy_model(ALL),
        ParallelConfig(engine=engine, expert=expert, zero=zero, timeout_s=120),
        optim_config=OptimConfig(lr=1e-2),
        quant_config=QuantConfig(),
        compute_dtype=torch.float32,
        seed=0,
    )


def _all_layouts() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        name: _trace(_engine(EngineName.deepspeed, expert=expert, zero=zero), rows=rows)
        for name, (expert, zero, rows) in LAYOUTS.items()
    }


def test_two_ranks_give_the_losses_and_the_bias_of_one() -> None:
    expected = _trace(_engine(EngineName.torch), rows=4)
    for rank in run_ranks(_all_layouts, 2):
        for layout, found in rank.items():
            for step in range(STEPS):
                for name in ("loss", "global_balance_loss", "z_loss", "balance_loss", "grad_norm", "maxvio"):
                    value = found["steps"][step][name]
                    assert value == pytest.approx(expected["steps"][step][name], rel=1e-4), (layout, step, name)
            torch.testing.assert_close(found["biases"], expected["biases"], rtol=0, atol=1e-5)

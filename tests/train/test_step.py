"""One optimizer step: global counts, balance bias, metrics."""

import math
from dataclasses import replace

import pytest
import torch

from moetrain.errors import DivergenceError
from moetrain.model.config import BalanceConfig, BiasRule
from moetrain.parallel.protocol import Engine, Objective, ObjectiveResult
from moetrain.train.loss import GlobalCounts, language_model_objective
from moetrain.train.rows import split_rows
from moetrain.train.step import global_counts, train_step
from moetrain.train.validate import total_nats
from tests.train.toy import toy_batch, toy_engine


def _objective_for(counts: GlobalCounts) -> Objective:
    return language_model_objective(counts, balance=BalanceConfig(sequence_loss=1e-2))


def _step(engine: Engine, *, rows: int, rule: BiasRule = BiasRule.sign) -> dict[str, float]:
    return train_step(
        engine,
        _objective_for,
        micro_batches=split_rows(toy_batch(0), rows=rows),
        learning_rate=1e-3,
        balance=BalanceConfig(bias_rule=rule, bias_rate=0.25),
        step=0,
    )


def test_global_counts_are_sums_over_micro_batches() -> None:
    batch = toy_batch(0)
    counts = global_counts(split_rows(batch, rows=1), toy_engine().topology)
    assert (counts.tokens, counts.targets) == (batch.num_tokens, batch.num_targets)
    assert counts.target_weight == pytest.approx(float(batch.target_weights().sum()))


def test_metrics_of_a_step_do_not_depend_on_micro_batches() -> None:
    whole, cut = _step(toy_engine(), rows=4), _step(toy_engine(), rows=1)
    for name in whole.keys() - {"time/seconds", "time/tokens_per_s"}:
        if name.startswith("maxvio_micro"):
            continue  # what a micro-batch is
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_the_balance_bias_moves_by_the_counts_of_all_micro_batches() -> None:
    batch, engine = toy_batch(0), toy_engine()
    output = engine.model(batch.tokens_BT, segments_BT=batch.segments_BT, positions_BT=batch.positions_BT)
    loads_LE = output.counts_LE.double()
    _step(engine, rows=1)
    for (_, layer), loads_E in zip(engine.model.moe_layers(), loads_LE, strict=True):
        expected_E = 0.25 * torch.sign(loads_E.mean() - loads_E).float()
        assert torch.equal(layer.gate.e_score_correction_bias, expected_E)


def test_the_balance_bias_stays_where_the_rule_is_none() -> None:
    engine = toy_engine()
    _step(engine, rows=4, rule=BiasRule.none)
    assert not any(layer.gate.e_score_correction_bias.any() for _, layer in engine.model.moe_layers())


def test_a_gradient_that_is_not_finite_stops_with_the_weights_as_they_were() -> None:
    engine = toy_engine()
    before = engine.gather_state(with_optimizer=False)
    assert before is not None

    def explode(counts: GlobalCounts) -> Objective:
        def objective(model: torch.nn.Module, batch: object) -> ObjectiveResult:
            weight = engine.model.lm_head.weight
            zero = (weight * 0.0).sum()
            return ObjectiveResult(loss=torch.sqrt(zero.abs()), counts_LE=torch.zeros(2, 4, dtype=torch.int64))

        return objective

    with pytest.raises(DivergenceError, match="step 8: the gradient norm is"):
        train_step(engine, explode, micro_batches=[toy_batch(0)], learning_rate=1.0, balance=BalanceConfig(), step=7)
    after = engine.gather_state(with_optimizer=False)
    assert after is not None
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_validation_nats_are_the_sum_over_predicted_tokens_whatever_the_micro_batch() -> None:
    engine, batch = toy_engine(), toy_batch(1)
    flat = replace(batch, columns={})
    counts = GlobalCounts(tokens=1, targets=1, target_weight=1.0)
    expected = language_model_objective(counts, balance=BalanceConfig(sequence_loss=0.0))(
        engine.model, flat
    ).loss.item()
    assert total_nats(engine, batch, rows_per_micro_batch=1) == pytest.approx(expected, rel=1e-5)
    assert total_nats(engine, batch, rows_per_micro_batch=4) == pytest.approx(expected, rel=1e-5)
    assert expected / batch.num_targets == pytest.approx(math.log(67), rel=0.05)

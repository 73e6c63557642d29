"""QK-Clip in a training step: which weights it moves and by how much, and that nothing of the layout shows in it."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import ConfigError
from moetrain.model.attention import Attention, MaxLogits
from moetrain.model.config import BalanceConfig, ModelConfig, YarnConfig
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine, Objective
from moetrain.parallel.state import TensorReader
from moetrain.quant.config import QuantConfig
from moetrain.train.attention_clip import batch_max_logits, clip_attention, row_factors
from moetrain.train.loss import GlobalCounts, language_model_objective
from moetrain.train.rows import split_rows
from moetrain.train.step import train_step
from tests.train.toy import ROWS, one_document_per_row, toy_batch, toy_engine, toy_model

NOPE, ROPE, VALUE, HEADS = 8, 8, 8, 2


def _model(*, q_lora: int | None) -> ModelConfig:
    """Return a shape with YaRN on, in which logits are large."""
    return replace(toy_model(), q_lora_rank=q_lora, yarn=YarnConfig(factor=32.0), initializer_range=0.4)


def _engine(config: ModelConfig, *, name: EngineName = EngineName.torch, quantised: bool = False) -> Engine:
    return build_engine(
        config,
        ParallelConfig(engine=name),
        optim_config=OptimConfig(lr=1e-2),
        quant_config=QuantConfig(enabled=quantised, group_size=32),
        compute_dtype=torch.float32,
        seed=0,
    )


def _measuring(counts: GlobalCounts) -> Objective:
    return language_model_objective(counts, balance=BalanceConfig(), max_logits=MaxLogits.measured)


def _logits(model: Transformer, batch: TokenBatch) -> torch.Tensor:
    output = model(
        batch.tokens_BT,
        segments_BT=batch.segments_BT,
        positions_BT=batch.positions_BT,
        max_logits=MaxLogits.measured,
    )
    assert output.max_logits_AH is not None
    return output.max_logits_AH


def _inputs_of(model: Transformer, batch: TokenBatch) -> dict[str, dict[str, object]]:
    """Return what each layer's attention is called with on this batch."""
    seen: dict[str, dict[str, object]] = {}
    handles = []
    for name, layer in model.attention_layers():

        def keep(module: Attention, args: tuple[torch.Tensor], kwargs: dict[str, object], name: str = name) -> None:
            seen[name] = {"x_BTD": args[0].detach(), **kwargs}

        handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    _logits(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def _again(layer: Attention, inputs: dict[str, object]) -> torch.Tensor:
    with torch.no_grad():
        _, max_logits_H = layer(**inputs)
    assert isinstance(max_logits_H, torch.Tensor)
    return max_logits_H


def _threshold(max_logits_AH: torch.Tensor) -> float:
    """Return a threshold that some heads are above and some are below."""
    return float(max_logits_AH.sort().values.flatten().median()) * 1.01


@pytest.mark.parametrize("q_lora", [None, 12])
@pytest.mark.parametrize("name", list(EngineName))
def test_a_clipped_head_has_the_threshold_as_its_largest_logit_and_nothing_else_moves(
    name: EngineName, q_lora: int | None
) -> None:
    engine, batch = _engine(_model(q_lora=q_lora), name=name), toy_batch(0)
    max_logits_AH, inputs = _logits(engine.model, batch), _inputs_of(engine.model, batch)
    threshold = _threshold(max_logits_AH)
    assert 0 < (max_logits_AH > threshold).sum() < max_logits_AH.numel()
    before = {key: value.clone() for key, value in engine.model.state_dict().items()}
    clip_attention(engine, max_logits_AH, threshold=threshold)
    after = engine.model.state_dict()

    queries = "q_proj" if q_lora is None else "q_b_proj"
    for index, (layer_name, layer) in enumerate(engine.model.attention_layers()):
        largest_H = _again(layer, inputs[layer_name])
        expected_H = max_logits_AH[index].clamp(max=threshold)
        torch.testing.assert_close(largest_H, expected_H, rtol=1e-5, atol=0)
        q, kv = f"{layer_name}.{queries}.weight", f"{layer_name}.kv_b_proj.weight"
        old_q, new_q = (s.pop(q).unflatten(0, (HEADS, NOPE + ROPE)) for s in (before, after))
        old_kv, new_kv = (s.pop(kv).unflatten(0, (HEADS, NOPE + VALUE)) for s in (before, after))
        assert torch.equal(old_kv[:, NOPE:], new_kv[:, NOPE:])
        for head in range(HEADS):
            moved = not torch.equal(old_q[head], new_q[head]) or not torch.equal(old_kv[head], new_kv[head])
            assert moved == bool(max_logits_AH[index, head] > threshold)
            g = min(1.0, threshold / float(max_logits_AH[index, head]))
            torch.testing.assert_close(new_q[head, :NOPE], math.sqrt(g) * old_q[head, :NOPE])
            torch.testing.assert_close(new_q[head, NOPE:], g * old_q[head, NOPE:])
            torch.testing.assert_close(new_kv[head, :NOPE], math.sqrt(g) * old_kv[head, :NOPE])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", list(EngineName))
def test_clipping_again_with_the_same_inputs_changes_nothing_beyond_rounding(name: EngineName) -> None:
    engine, batch = _engine(_model(q_lora=None), name=name), toy_batch(0)
    inputs = _inputs_of(engine.model, batch)

    def measured() -> torch.Tensor:
        return torch.stack([_again(layer, inputs[key]) for key, layer in engine.model.attention_layers()])

    threshold = _threshold(measured())
    clip_attention(engine, measured(), threshold=threshold)
    once = engine.gather_state(with_optimizer=True)
    left = row_factors(engine.model, measured(), threshold=threshold)
    assert all((factor - 1).abs().max() < 1e-6 for factor in left.values())
    clip_attention(engine, measured().clamp(max=threshold), threshold=threshold)
    twice = engine.gather_state(with_optimizer=True)
    assert once is not None and twice is not None
    assert all(torch.equal(once[key], twice[key]) for key in once)


def _step(engine: Engine, batches: list[TokenBatch], *, qk_clip: float | None, rate: float = 1e-2) -> dict[str, float]:
    return train_step(
        engine,
        _measuring,
        micro_batches=batches,
        learning_rate=rate,
        balance=BalanceConfig(),
        step=0,
        qk_clip=qk_clip,
    )


@pytest.mark.parametrize(
    "cut",
    [
        lambda batch: split_rows(batch, rows=1),
        lambda batch: [one_document_per_row(batch)],
        lambda batch: split_rows(one_document_per_row(batch), rows=3),
    ],
    ids=["micro-batches", "packing", "both"],
)
def test_the_clip_does_not_depend_on_how_the_batch_is_cut(cut: Callable[[TokenBatch], list[TokenBatch]]) -> None:
    batch = toy_batch(0)
    whole, pieces = _engine(_model(q_lora=12)), _engine(_model(q_lora=12))
    threshold = _threshold(_logits(whole.model, batch))
    expected = _step(whole, [batch], qk_clip=threshold)
    found = _step(pieces, cut(batch), qk_clip=threshold)
    assert expected["heads_clipped"] > 0
    assert found["heads_clipped"] == expected["heads_clipped"]
    for name in expected:
        if name.startswith("max_logit"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for ours, theirs in zip(pieces.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_the_clip_acts_on_masters_after_the_update_and_leaves_the_optimizer_alone() -> None:
    batch = toy_batch(0)
    clipped, plain = _engine(_model(q_lora=12)), _engine(_model(q_lora=12))
    largest_AH = _logits(plain.model, batch)
    threshold = _threshold(largest_AH)
    _step(clipped, [batch], qk_clip=threshold)
    _step(plain, [batch], qk_clip=math.inf)
    plain.multiply_rows(row_factors(plain.model, largest_AH, threshold=threshold))
    ours, theirs = clipped.gather_state(with_optimizer=True), plain.gather_state(with_optimizer=True)
    assert ours is not None and theirs is not None
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_threshold_of_infinity_measures_and_changes_no_number() -> None:
    batch = toy_batch(0)
    off, measuring = toy_engine(), toy_engine()
    without = train_step(
        off,
        lambda counts: language_model_objective(counts, balance=BalanceConfig()),
        micro_batches=[batch],
        learning_rate=1e-2,
        balance=BalanceConfig(),
        step=0,
    )
    values = _step(measuring, [batch], qk_clip=math.inf)
    assert values["heads_clipped"] == 0
    assert values["max_logit"] == max(values[f"max_logit/{name}"] for name, _ in measuring.model.attention_layers())
    assert values["loss"] == without["loss"]
    assert not any(name.startswith("max_logit") for name in without)
    for ours, theirs in zip(measuring.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_with_int4_experts_the_next_forward_pass_uses_the_clipped_masters() -> None:
    batch = toy_batch(0)
    engine = _engine(_model(q_lora=None), name=EngineName.deepspeed, quantised=True)
    fresh = _engine(_model(q_lora=None), quantised=True)
    threshold = _threshold(_logits(engine.model, batch))
    assert _step(engine, [batch], qk_clip=threshold)["heads_clipped"] > 0
    state = engine.gather_state(with_optimizer=True)
    assert state is not None
    fresh.load_state(TensorReader(state), with_optimizer=True)
    columns = {"segments_BT": batch.segments_BT, "positions_BT": batch.positions_BT}
    with torch.no_grad():
        ours = engine.model(batch.tokens_BT, **columns).hidden_BTD
        theirs = fresh.model(batch.tokens_BT, **columns).hidden_BTD
    assert torch.equal(ours, theirs)


def test_training_with_the_clip_keeps_growing_logits_near_the_threshold() -> None:
    """At a rate far too high the logits grow without end; with the clip only what one step adds is above it."""
    largest = {}
    for qk_clip in (math.inf, 4.0):
        engine = _engine(toy_model())
        values = [_step(engine, [toy_batch(step % 3)], qk_clip=qk_clip, rate=0.4) for step in range(16)]
        largest[qk_clip] = values[-1]["max_logit"]
    assert largest[math.inf] > 100
    assert largest[4.0] < 25


def test_an_objective_that_does_not_measure_is_refused() -> None:
    engine = toy_engine()
    objective = language_model_objective(GlobalCounts(tokens=1, targets=1, target_weight=1.0), balance=BalanceConfig())
    result = objective(engine.model, toy_batch(0, rows=ROWS))
    with pytest.raises(ConfigError, match=r"optim.qk_clip is set, but the objective returns no max_logits_AH"):
        batch_max_logits([result], engine.topology)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_is_not_positive_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"optim.qk_clip is .*: give a positive logit"):
        OptimConfig(qk_clip=threshold)

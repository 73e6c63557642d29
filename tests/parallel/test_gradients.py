"""ZeRO 1 and 2 in one process: gradients reach this rank's vectors whatever their size, and no others do."""

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.model.transformer import Transformer
from moetrain.parallel import deepspeed_engine
from moetrain.parallel.config import EngineName
from moetrain.parallel.deepspeed_engine import DeepSpeedEngine
from moetrain.parallel.engine import Engine, ObjectiveResult
from tests.parallel.nano import LEARNING_RATE, batch_of, build, identical, largest_gap, objective_for, train

STEPS = range(2)
WEIGHTS = 1e-6  # absolute


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _state(engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.gather_state(with_optimizer=True)
    assert state is not None
    return state


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("largest", [1, 700])
def test_a_gradient_is_the_same_in_a_bucket_and_alone(largest: int, zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together = build(zero=zero)
    sizes = [param.numel() for param in together.model.parameters()]
    assert min(sizes) < 700 < max(sizes) < sum(sizes) < deepspeed_engine._LARGEST_BUCKET
    train(together, STEPS)
    monkeypatch.setattr(deepspeed_engine, "_LARGEST_BUCKET", largest)
    apart = build(zero=zero)
    train(apart, STEPS)
    assert identical(_state(apart), _state(together))


def _of_the_head(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
    """Return a loss that reaches nothing but the head."""
    hidden_ND = torch.ones(batch.tokens_BT.numel(), model.config.hidden_size)
    counts_LE = torch.zeros(1, model.config.num_experts, dtype=torch.int64)
    return ObjectiveResult(loss=model.logits(hidden_ND).square().mean(), counts_LE=counts_LE)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_parameter_that_no_micro_batch_reaches_has_no_gradient(zero: int) -> None:
    """Nor one that an earlier step left in the memory."""
    reports, states = [], []
    for engine in (build(EngineName.torch), build(zero=zero)):
        train(engine, STEPS)
        for _ in STEPS:
            engine.accumulate(_of_the_head, batch_of(0), is_last=True)
            reports.append(engine.step(LEARNING_RATE).grad_norm)
        states.append(_state(engine))
    assert reports[:2] == pytest.approx(reports[2:], rel=1e-6)
    assert largest_gap(states[0], states[1]) < WEIGHTS


@pytest.mark.parametrize("zero", [1, 2])
def test_micro_batches_add_up_and_a_dropped_one_leaves_nothing(zero: int) -> None:
    engine, plain = build(zero=zero), build(EngineName.torch)
    for each in (engine, plain):
        batch = batch_of(0)
        for row in range(2):
            each.accumulate(objective_for(batch), batch.rows(row, row + 1), is_last=row == 1)
        each.discard()
        train(each, STEPS)
    assert largest_gap(_state(engine), _state(plain)) < WEIGHTS


@pytest.mark.parametrize("zero", [1, 2])
def test_masters_are_the_weights_themselves(zero: int) -> None:
    engine = build(zero=zero)
    assert isinstance(engine, DeepSpeedEngine)
    held = {param.untyped_storage().data_ptr() for param in engine.model.parameters()}
    assert {vector.untyped_storage().data_ptr() for vector in engine.shards.vectors()} == held
    before = {name: param.detach().clone() for name, param in engine.model.named_parameters()}
    train(engine, range(1))
    assert all(not torch.equal(param, before[name]) for name, param in engine.model.named_parameters())


@pytest.mark.parametrize("zero", [1, 2])
def test_a_gradient_is_let_go_once_the_vector_has_it(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine, "_LARGEST_BUCKET", 700)
    engine = build(zero=zero)
    assert isinstance(engine, DeepSpeedEngine)
    optimizer = engine.engine.optimizer
    held: list[bool] = []
    clear = optimizer._clear_param_grad_only  # what DeepSpeed ends a backward pass with

    def look_and_clear() -> None:
        held.extend(param.grad is not None for param in engine.model.parameters())
        clear()

    monkeypatch.setattr(optimizer, "_clear_param_grad_only", look_and_clear)
    train(engine, range(1))
    assert held and not any(held)

"""Both engines in one process: the same numbers, a state that goes from one to the other, and errors at the door."""

import math
from collections.abc import Iterator

import pytest
import torch

from moetrain.data.batch import TokenBatch
from moetrain.errors import CheckpointError, ConfigError
from moetrain.model.config import Recompute
from moetrain.model.transformer import Transformer
from moetrain.optim.config import OptimizerName
from moetrain.parallel.config import EngineName
from moetrain.parallel.deepspeed_engine import DeepSpeedEngine
from moetrain.parallel.engine import Engine, ObjectiveResult
from moetrain.parallel.state import TensorReader, check
from tests.parallel.nano import LEARNING_RATE, batch_of, build, difference, identical, largest_gap, objective_for, train

FP32_ROUNDING = 1e-6  # relative, on loss, gradient norm and clip factor
STATE_ROUNDING = 5e-5  # absolute, after steps of LEARNING_RATE
ADAMW_ROUNDING = 1e-3  # AdamW divides by its size a gradient that is itself little more than rounding


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _state(engine: Engine, *, with_optimizer: bool = True) -> dict[str, torch.Tensor]:
    state = engine.gather_state(with_optimizer=with_optimizer)
    assert state is not None
    return state


@pytest.mark.parametrize(("optimizer", "zero"), [("muon", 1), ("muon", 2), ("adamw", 1), ("adamw", 2)])
def test_deepspeed_in_one_process_gives_the_numbers_of_the_plain_loop(optimizer: str, zero: int) -> None:
    name = OptimizerName(optimizer)
    plain, sharded = build(EngineName.torch, optimizer=name), build(EngineName.deepspeed, optimizer=name, zero=zero)
    expected, found = train(plain, range(4)), train(sharded, range(4))
    assert all(trace.report.clip_factor < 1 for trace in expected)
    assert difference(found, expected) < FP32_ROUNDING
    bound = STATE_ROUNDING if name == OptimizerName.muon else ADAMW_ROUNDING
    assert largest_gap(_state(sharded), _state(plain)) < bound


@pytest.mark.parametrize("zero", [1, 3])
def test_a_model_without_shared_experts_trains_in_every_engine(zero: int) -> None:
    plain = build(EngineName.torch, quantize=True, num_shared_experts=0)
    sharded = build(EngineName.deepspeed, quantize=True, num_shared_experts=0, zero=zero)
    assert not [name for name in _state(plain) if "shared_experts" in name]
    assert difference(train(sharded, range(3)), train(plain, range(3))) < FP32_ROUNDING


def test_tensors_without_elements_are_no_part_of_a_checkpoint() -> None:
    check({"a": (2,), "shared.weight": (0, 4), "optimizer/muon/shared.weight": (4, 0)}, {"a": (2,)})
    with pytest.raises(CheckpointError, match="b is not in this model"):
        check({"a": (2,), "b": (1, 4)}, {"a": (2,)})


@pytest.mark.parametrize("engine", list(EngineName))
def test_the_number_of_micro_batches_may_change_from_step_to_step_and_changes_nothing(engine: EngineName) -> None:
    once, varied = build(engine), build(engine)
    expected = train(once, range(3), rows_per_micro_batch=4)
    found = [
        *train(varied, range(1), rows_per_micro_batch=1),
        *train(varied, range(1, 2), rows_per_micro_batch=4),
        *train(varied, range(2, 3), rows_per_micro_batch=2),
    ]
    assert difference(found, expected) < 3 * FP32_ROUNDING


@pytest.mark.parametrize(("engine", "zero"), [("torch", 1), ("deepspeed", 1), ("deepspeed", 3)])
def test_recomputed_blocks_give_the_same_bits(engine: str, zero: int) -> None:
    kept = build(EngineName(engine), zero=zero)
    again = build(EngineName(engine), zero=zero, recompute=Recompute.blocks)
    assert train(again, range(3)) == train(kept, range(3))
    assert identical(_state(again), _state(kept))


def test_recomputed_blocks_keep_less_for_the_backward_pass_and_route_once() -> None:
    kept = {recompute: _bytes_kept(build(EngineName.torch, recompute=recompute)) for recompute in Recompute}
    assert kept[Recompute.blocks] < 0.5 * kept[Recompute.none]


def _bytes_kept(engine: Engine) -> int:
    """Return the bytes of all distinct tensors but parameters that a forward pass leaves for its backward pass."""
    whole, num_routed, held = batch_of(0), [0], {}
    for _, layer in engine.model.moe_layers():
        layer.gate.register_forward_hook(lambda *_: num_routed.__setitem__(0, num_routed[0] + 1))
    weights = {param.data_ptr() for param in engine.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = objective_for(whole)(engine.model, whole)
    result.loss.backward()
    assert num_routed == [len(engine.model.moe_layers())]
    return sum(held.values())


def test_a_large_clip_norm_never_clips() -> None:
    (trace,) = train(build(EngineName.torch, clip_norm=1e6), range(1))
    assert trace.report.clip_factor == 1.0


@pytest.mark.parametrize("source", list(EngineName))
@pytest.mark.parametrize("target", list(EngineName))
def test_a_state_goes_bit_for_bit_from_any_engine_to_any(source: EngineName, target: EngineName) -> None:
    first, second = build(source), build(target, seed=2)
    train(first, range(2))
    state = _state(first)
    second.load_state(TensorReader(state), with_optimizer=True)
    assert identical(_state(second), state)
    assert state["optimizer/step"].item() == 2


@pytest.mark.parametrize("engine", list(EngineName))
def test_a_run_goes_on_from_its_state_to_the_same_bits(engine: EngineName) -> None:
    straight, stopped = build(engine), build(engine)
    expected = train(straight, range(4))[2:]
    train(stopped, range(2))
    resumed = build(engine, seed=3)
    resumed.load_state(TensorReader(_state(stopped)), with_optimizer=True)
    assert train(resumed, range(2, 4)) == expected
    assert identical(_state(resumed), _state(straight))


@pytest.mark.parametrize("engine", list(EngineName))
def test_weights_load_without_the_optimizer_which_stays_new(engine: EngineName) -> None:
    trained, fresh = build(engine), build(engine, seed=2)
    train(trained, range(1))
    fresh.load_state(TensorReader(_state(trained)), with_optimizer=False)
    assert identical(_state(fresh, with_optimizer=False), _state(trained, with_optimizer=False))
    assert _state(fresh)["optimizer/step"].item() == 0


def test_a_state_holds_what_its_optimizer_needs_by_name() -> None:
    state = _state(build(EngineName.torch))
    assert state["optimizer/model.layers.1.mlp.experts.gate_up_proj/momentum"].shape == (4, 64, 32)
    assert state["optimizer/model.layers.1.mlp.gate.weight/exp_avg"].shape == (4, 32)
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (4,)
    assert "optimizer/lm_head.weight/momentum" not in state


@pytest.mark.parametrize("engine", list(EngineName))
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(engine: EngineName) -> None:
    loaded = build(engine)
    before = _state(loaded)
    other = _state(build(EngineName.torch, seed=2))
    missing = {name: tensor for name, tensor in other.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"model.norm.weight is missing"):
        loaded.load_state(TensorReader(missing), with_optimizer=True)
    with pytest.raises(CheckpointError, match=r"model.mtp.weight is not in this model"):
        loaded.load_state(TensorReader({**other, "model.mtp.weight": torch.zeros(1)}), with_optimizer=True)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(3,\), but this model requires \(32,\)"):
        loaded.load_state(TensorReader({**other, "model.norm.weight": torch.zeros(3)}), with_optimizer=True)
    adamw = _state(build(EngineName.torch, optimizer=OptimizerName.adamw))
    with pytest.raises(CheckpointError, match=r"momentum .*is missing"):
        loaded.load_state(TensorReader(adamw), with_optimizer=True)
    assert identical(_state(loaded), before)


@pytest.mark.parametrize("engine", list(EngineName))
def test_a_gradient_that_is_not_finite_skips_the_step(engine: EngineName) -> None:
    built = build(engine)
    before = _state(built)
    whole = batch_of(0)

    def explode(model: torch.nn.Module, batch: object) -> ObjectiveResult:
        result = objective_for(whole)(model, batch)  # type: ignore[arg-type]
        return ObjectiveResult(loss=result.loss * math.inf, counts_LE=result.counts_LE)

    built.accumulate(explode, whole, is_last=True)  # type: ignore[arg-type]
    report = built.step(LEARNING_RATE)
    assert (report.grad_norm, report.clip_factor) == (math.inf, 0.0)
    assert identical(_state(built), before)
    assert math.isfinite(train(built, range(1))[0].report.grad_norm)


@pytest.mark.parametrize("engine", list(EngineName))
def test_a_discarded_gradient_leaves_no_trace(engine: EngineName) -> None:
    built, other = build(engine), build(engine)
    before = _state(built)
    built.accumulate(objective_for(batch_of(1)), batch_of(1), is_last=True)
    built.discard()
    assert identical(_state(built), before)
    train(built, range(2))
    train(other, range(2))
    assert identical(_state(built), _state(other))


@pytest.mark.parametrize("engine", list(EngineName))
def test_raw_gradients_are_clipped_before_muon_orthogonalises(engine: EngineName) -> None:
    """The momentum of a first step is the clipped gradient itself."""
    plain, built = build(EngineName.torch), build(engine)
    whole = batch_of(0)
    plain.accumulate(objective_for(whole), whole, is_last=True)
    grads = {name: param.grad.clone() for name, param in plain.model.named_parameters() if param.grad is not None}
    (trace,) = train(built, range(1))
    assert trace.report.clip_factor < 0.9
    state = _state(built)
    momenta = [name for name in state if name.endswith("/momentum")]
    assert momenta
    for name in momenta:
        grad = grads[name.removeprefix("optimizer/").removesuffix("/momentum")]
        torch.testing.assert_close(state[name], trace.report.clip_factor * grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", list(OptimizerName))
@pytest.mark.parametrize("engine", list(EngineName))
def test_weight_decay_is_on_every_parameter_norms_included(engine: EngineName, optimizer: OptimizerName) -> None:
    """Without a gradient a step multiplies each parameter by 1 - lr * decay; the default decay is 0.05."""
    built = build(engine, optimizer=optimizer)
    before = _state(built, with_optimizer=False)

    def flat(model: Transformer, batch: TokenBatch) -> ObjectiveResult:
        result = objective_for(batch_of(0))(model, batch)
        return ObjectiveResult(loss=result.loss * 0.0, counts_LE=result.counts_LE)

    built.accumulate(flat, batch_of(0), is_last=True)
    built.step(LEARNING_RATE)
    after = _state(built, with_optimizer=False)
    for name, _ in built.model.named_parameters():
        torch.testing.assert_close(after[name], (1 - LEARNING_RATE * 0.05) * before[name], rtol=1e-6, atol=0)


def test_zero_3_keeps_one_copy_of_the_weights_in_memory() -> None:
    engine = build(zero=3)
    assert isinstance(engine, DeepSpeedEngine)
    train(engine, range(2))
    zero = engine.engine.optimizer
    pairs = list(zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True))
    assert len(pairs) > 1
    assert all(shard_P.data_ptr() == master_P.data_ptr() for shard_P, master_P in pairs)


@pytest.mark.parametrize("zero", [1, 2])
def test_rows_of_masters_are_multiplied_in_both_engines_alike(zero: int) -> None:
    name = "model.layers.1.self_attn.q_b_proj.weight"
    states = []
    for built in (build(EngineName.torch), build(EngineName.deepspeed, zero=zero)):
        before = _state(built)
        factor_M = torch.ones(before[name].shape[0])
        factor_M[3:5] = 0.25
        built.multiply_rows({name: factor_M})
        after = _state(built)
        assert torch.equal(after[name], before[name] * factor_M[:, None])
        assert torch.equal(built.model.get_parameter(name), after[name])
        del before[name], after[name]
        assert identical(after, before)
        train(built, range(1))
        states.append(_state(built))
    assert largest_gap(states[0], states[1]) < STATE_ROUNDING


@pytest.mark.parametrize("engine", list(EngineName))
def test_quantised_weights_follow_their_masters(engine: EngineName) -> None:
    built = build(engine, quantize=True)
    ((_, layer),) = built.model.moe_layers()
    train(built, range(1))
    in_use, _ = layer.experts.compute_weights()
    layer.experts.fake_quant.invalidate()
    anew, _ = layer.experts.compute_weights()
    assert torch.equal(in_use, anew)
    other = _state(build(EngineName.torch, seed=2))
    built.load_state(TensorReader(other), with_optimizer=True)
    loaded, _ = layer.experts.compute_weights()
    assert not torch.equal(loaded, anew)


def test_layouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.expert is 2: parallel.engine=torch runs in one process"):
        build(EngineName.torch, expert=2)
    for zero in (2, 3):
        with pytest.raises(
            ConfigError, match=rf"parallel.zero is {zero}: parallel.engine=torch runs in one .* give 1, or"
        ):
            build(EngineName.torch, zero=zero)
    with pytest.raises(ConfigError, match=r"parallel.expert is 2: it must divide the number of processes, 1"):
        build(EngineName.deepspeed, expert=2)

"""RL steps on a task that a random model can solve by chance: stop at once, with an answer of even length."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.checkpoint.origin import Origin, continue_state, read_origin
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.errors import ConfigError, RolloutError
from moetrain.inference.mode import Mode
from moetrain.kernels.build import Library, Units, load
from moetrain.log import JsonlMetrics, Metrics, read_metrics
from moetrain.model.config import BalanceConfig, BiasRule
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine
from moetrain.quant.config import QuantConfig
from moetrain.rl.algorithms.k2_5 import K25
from moetrain.rl.config import BalanceLosses, RlConfig
from moetrain.rl.protocol import TokenLoss
from moetrain.rl.stage import RlStage, collection_of, rl_training, take_rl_step
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.sync import sync_weights
from moetrain.rollout.types import Trajectory
from moetrain.run.rl_stage import check_kernels
from moetrain.tasks.protocol import Split
from moetrain.train.config import Continuation, TrainConfig
from moetrain.train.continuation import TASKS_USED, start_point_of
from moetrain.train.identity import identity_of
from moetrain.train.loop import run_training
from tests.distributed import run_ranks
from tests.even_task import MODEL, EvenFamily, EvenTask, even_tokenizer

_QUANT = QuantConfig(enabled=True)
_TRAIN = TrainConfig(steps=4, checkpoint_every=2)


def _stage(engine: Engine, seen: list[Trajectory]) -> RlStage:
    return RlStage(
        engine=engine,
        family=EvenFamily(),
        tokenizer=even_tokenizer(),
        model=MODEL,
        quant=_QUANT,
        balance=BalanceConfig(),
        rl=RlConfig(tasks_per_step=4, group_size=8),
        algorithm=K25(),
        rollout=RolloutConfig(num_slots=32, max_tokens=80, max_turn_tokens=60, max_turns=2),
        declare_tools=False,
        learning_rate=lambda step: 1e-2,
        identity={},
        seed=3,
        first_task=0,
        on_trajectories=lambda step, trajectories: seen.extend(trajectories),
    )


def _engine(
    name: EngineName, *, expert: int = 1, dtype: torch.dtype = torch.bfloat16, library: Library | None = None
) -> Engine:
    kind = {"compute_dtype": dtype, "library": library, "seed": 0}
    parallel = ParallelConfig(engine=name, expert=expert)
    return build_engine(MODEL, parallel, optim_config=OptimConfig(lr=1e-2), quant_config=_QUANT, **kind)  # type: ignore[arg-type]


def _take_steps(stage: RlStage, folder: Path, *, steps: int, metrics: Metrics) -> None:
    config = replace(_TRAIN, steps=steps)
    run_training(
        rl_training(stage, config, collection=collection_of(stage, config)), config, folder=folder, metrics=metrics
    )


def _run(folder: Path, steps: int) -> tuple[Engine, list[Trajectory]]:
    seen: list[Trajectory] = []
    engine = _engine(EngineName.torch)
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    _take_steps(_stage(engine, seen), folder, steps=steps, metrics=metrics)
    metrics.close()
    return engine, seen


def test_a_run_that_was_stopped_goes_on_to_the_same_trajectories_and_weights(tmp_path: Path) -> None:
    whole, all_seen = _run(tmp_path / "whole", 4)
    _, first = _run(tmp_path / "parts", 2)
    resumed, rest = _run(tmp_path / "parts", 4)
    assert any(trajectory.reward for trajectory in all_seen)
    assert [t.segments for t in first + rest] == [t.segments for t in all_seen]
    expected, found = whole.gather_state(with_optimizer=True), resumed.gather_state(with_optimizer=True)
    assert expected is not None and found is not None
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class _Down(EvenFamily):
    """A family whose service is down, except for the tasks in `up`."""

    def __init__(self, *up: int) -> None:
        self.up = up

    def task(self, split: Split, index: int) -> EvenTask:
        if index not in self.up:
            raise ConnectionError("no free container")
        return super().task(split, index)


def test_a_run_whose_environments_fail_in_too_many_steps_ends(tmp_path: Path) -> None:
    def take(family: EvenFamily, folder: Path) -> list[dict[str, float]]:
        stage = replace(_stage(_engine(EngineName.torch), []), family=family)
        config = replace(_TRAIN, steps=4, max_skipped_in_row=2)
        metrics = JsonlMetrics(folder / "metrics.jsonl")
        try:
            training = rl_training(stage, config, collection=collection_of(stage, config))
            run_training(training, config, folder=folder, metrics=metrics)
        finally:
            metrics.close()
        return read_metrics(folder / "metrics.jsonl")

    with pytest.raises(RolloutError, match=r"every environment failed in 3 steps in a row \(train\.max_skipped_in_row"):
        take(_Down(), tmp_path / "down")
    assert len(take(_Down(9), tmp_path / "mostly")) == 4  # a task of the third of four steps can be made


@pytest.mark.parametrize(("continue_as", "steps"), [(Continuation.part, 2), (Continuation.whole, 4)])
def test_two_steps_continued_by_two_equal_four_and_no_task_is_repeated(
    tmp_path: Path, continue_as: Continuation, steps: int
) -> None:
    optim = OptimConfig(lr=1e-2)
    identity = identity_of(
        model=MODEL, quant=_QUANT, optim=optim, train=_TRAIN, seed=3, origin=None, others={"data": {}, "digests": {}}
    )

    def take(folder: Path, *, steps: int, origin: Origin | None = None) -> tuple[Engine, list[Trajectory]]:
        seen: list[Trajectory] = []
        engine = _engine(EngineName.torch)
        train = replace(_TRAIN, steps=steps, continue_as=None if origin is None else continue_as)
        start_point = start_point_of(origin, counted=TASKS_USED, optim=optim, train=train, seed=3)
        if origin is not None:
            continue_state(engine, origin, model=MODEL)
        stage = replace(_stage(engine, seen), identity=identity, start_point=start_point)
        metrics = JsonlMetrics(folder / "metrics.jsonl")
        run_training(
            rl_training(stage, train, collection=collection_of(stage, train)), train, folder=folder, metrics=metrics
        )
        metrics.close()
        return engine, seen

    whole, all_seen = take(tmp_path / "whole", steps=4)
    _, first = take(tmp_path / "first", steps=2)
    continued, rest = take(tmp_path / "second", steps=steps, origin=read_origin(tmp_path / "first"))
    assert not {t.task for t in first} & {t.task for t in rest}
    assert [t.segments for t in first + rest] == [t.segments for t in all_seen]
    expected, found = whole.gather_state(with_optimizer=True), continued.gather_state(with_optimizer=True)
    assert expected is not None and found is not None
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_rl_logs_and_recovers_as_every_stage_does(tmp_path: Path) -> None:
    """The damaged checkpoint is passed over with a metric, only each second step is logged, totals span both starts."""
    stage, config = _stage(_engine(EngineName.torch), []), replace(_TRAIN, steps=2, checkpoint_every=1, log_every=2)
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    run_training(
        rl_training(stage, config, collection=collection_of(stage, config)), config, folder=tmp_path, metrics=metrics
    )
    metrics.close()
    (sampled,) = (row["total/sampled_tokens"] for row in read_metrics(tmp_path / "metrics.jsonl") if "reward" in row)
    shard = tmp_path / CHECKPOINTS / "step_00000002" / "model-r00000-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    outcome = run_training(
        rl_training(stage, config, collection=collection_of(stage, config)), config, folder=tmp_path, metrics=metrics
    )
    metrics.close()
    damaged, last = read_metrics(tmp_path / "metrics.jsonl")
    assert (damaged["step"], damaged["checkpoint/damaged"]) == (1, 1.0)
    assert (last["step"], last["total/sampled_tokens"]) == (2, sampled)
    assert outcome.counters.totals["sampled_tokens"] == sampled > last["sampled_tokens"]


def test_an_rl_step_changes_the_weights_and_the_next_rollouts_use_them(tmp_path: Path) -> None:
    engine, seen = _run(tmp_path, 2)
    before = _engine(EngineName.torch).gather_state(with_optimizer=False)
    after = engine.gather_state(with_optimizer=False)
    assert before is not None and after is not None
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert {version for t in seen for segment in t.segments for version in segment.versions} == {0, 1}


def test_a_sum_with_the_name_of_a_metric_is_refused(tmp_path: Path) -> None:
    class Counting(K25):
        def token_loss(self, *args: Any, **options: Any) -> TokenLoss:
            made = super().token_loss(*args, **options)
            return replace(made, sums={"reward": made.loss_N.detach().sum()})

    stage = replace(_stage(_engine(EngineName.torch), []), algorithm=Counting())
    with pytest.raises(ConfigError, match="has a sum 'reward', the name of a metric of every step: rename it"):
        _take_steps(stage, tmp_path, steps=1, metrics=JsonlMetrics(tmp_path / "metrics.jsonl"))


def test_a_step_without_an_update_names_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NoWorld(EvenFamily):
        def task(self, split: Split, index: int) -> EvenTask:
            raise ConnectionError("no free container")

    engine = _engine(EngineName.torch)
    stage = replace(_stage(engine, []), rl=RlConfig(tasks_per_step=1, group_size=2))
    too_long = replace(stage, rollout=replace(stage.rollout, max_tokens=4, max_turn_tokens=2))
    for changed, reason in [
        (too_long, "no group has two scored trajectories"),
        (replace(stage, family=NoWorld()), "every environment failed"),
    ]:
        assert "loss" not in take_rl_step(changed, _TRAIN, collection=collection_of(changed, _TRAIN), step=0)
        assert f"step 1: {reason}; the weights are not updated" in caplog.text


def _balanced_step(folder: Path, *, losses: BalanceLosses, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    """Return the metrics and the biases of one step with every balance loss given a weight."""
    balance = BalanceConfig(bias_rule=BiasRule.quantile, sequence_loss=0.1, global_loss=0.2, z_loss=0.05)
    model = replace(MODEL, balance=balance)
    engine = build_engine(
        model,
        ParallelConfig(engine=EngineName.torch),
        optim_config=OptimConfig(lr=1e-2),
        quant_config=_QUANT,
        compute_dtype=torch.float32,
        seed=0,
    )
    stage = _stage(engine, [])
    rl = replace(stage.rl, balance_losses=losses, tokens_per_micro_batch=tokens)
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    _take_steps(replace(stage, model=model, balance=balance, rl=rl), folder, steps=1, metrics=metrics)
    metrics.close()
    biases = torch.stack([layer.gate.e_score_correction_bias for _, layer in engine.model.moe_layers()])
    (values,) = (row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row)
    return values, biases


def test_balance_losses_in_rl_are_the_same_for_every_cut_and_off_by_default(tmp_path: Path) -> None:
    whole, whole_biases = _balanced_step(tmp_path / "whole", losses=BalanceLosses.model, tokens=1 << 16)
    parts, biases = _balanced_step(tmp_path / "parts", losses=BalanceLosses.model, tokens=256)
    for name in ("balance_loss", "global_balance_loss", "z_loss", "loss", "grad_norm", "router_entropy", "maxvio"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name
    assert parts["maxvio_micro"] > whole["maxvio_micro"] == pytest.approx(whole["maxvio"])
    torch.testing.assert_close(biases, whole_biases, rtol=0, atol=1e-6)
    assert whole_biases.abs().max() > 0

    off, off_biases = _balanced_step(tmp_path / "off", losses=RlConfig().balance_losses, tokens=1 << 16)
    assert not off.keys() & {"balance_loss", "global_balance_loss", "z_loss"}
    assert off["loss"] == pytest.approx(whole["loss"] - sum(whole[name] for name in whole if name.endswith("_loss")))
    assert torch.equal(off_biases, whole_biases)


def test_the_attention_clip_works_in_rl_and_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    threshold, seen = 1e-3, []
    for tokens in (1 << 16, 256):
        engine = _engine(EngineName.torch, dtype=torch.float32)
        stage = _stage(engine, [])
        rl = replace(stage.rl, tokens_per_micro_batch=tokens)
        folder = tmp_path / str(tokens)
        metrics = JsonlMetrics(folder / "metrics.jsonl")
        _take_steps(replace(stage, rl=rl, qk_clip=threshold), folder, steps=1, metrics=metrics)
        metrics.close()
        (values,) = (row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row)
        seen.append(values)
    whole, parts = seen
    assert 0 < whole["heads_clipped"] == parts["heads_clipped"]
    assert whole["max_logit"] > threshold
    assert parts["max_logit"] == pytest.approx(whole["max_logit"], rel=1e-5)


def _gaps(engine: Engine, *, mode: Mode, steps: int) -> list[float]:
    """Return the logprob gap of RL steps at temperature 0.7, in several micro-batches."""
    stage = _stage(engine, [])
    rollout = replace(stage.rollout, mode=mode, temperature=0.7)
    stage = replace(stage, rollout=rollout, rl=replace(stage.rl, tasks_per_step=8, tokens_per_micro_batch=512))
    collection = collection_of(stage, _TRAIN)
    return [take_rl_step(stage, _TRAIN, collection=collection, step=step)["logprob_gap"] for step in range(steps)]


def test_deterministic_rollouts_have_the_logprobs_of_the_trainer_bit_for_bit() -> None:
    assert _gaps(_engine(EngineName.torch, library=load()), mode=Mode.deterministic, steps=3) == [0.0, 0.0, 0.0]
    assert _gaps(_engine(EngineName.torch, library=load()), mode=Mode.fast, steps=1)[0] > 0


def _on_ranks(expert: int) -> tuple[list[list[int]], list[float]]:
    engine = _engine(EngineName.deepspeed, expert=expert, library=load())
    other = Library(load().path)
    other.units = Units(engine.topology.rank)
    if expert > 1:
        with pytest.raises(ConfigError, match=r"the ranks compute differently .*paired numbers.*widened numbers"):
            check_kernels(other, engine.topology)
    check_kernels(load(), engine.topology)
    return _trajectories(expert), _gaps(engine, mode=Mode.deterministic, steps=2)


def _trajectories(expert: int) -> list[list[int]]:
    engine = _engine(EngineName.deepspeed, expert=expert, dtype=torch.float32)
    model = sync_weights(engine, config=MODEL, quant=_QUANT, dtype=torch.float32)
    groups, generated = collection_of(_stage(engine, []), _TRAIN).groups(model, step=0)
    assert generated["generation/cached_tokens"] > 0
    return [trajectory.segments[0].tokens for group in groups for trajectory in group]


def test_two_ranks_with_split_experts_collect_the_trajectories_of_one_process() -> None:
    (alone,) = run_ranks(_on_ranks, 1, expert=1)
    first, second = run_ranks(_on_ranks, 2, expert=2)
    assert first == second
    assert first[0] == alone[0]
    assert first[1] == alone[1] == [0.0, 0.0], "deterministic rollouts have the trainer's logprobs on both"

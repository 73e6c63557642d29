"""The RL loop on a task that a random model can solve by chance: stop at once, with an answer of even length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from moetrain.chat.messages import Message, Role
from moetrain.chat.template import SPECIAL_TOKENS
from moetrain.chat.tool_schema import ToolSpec
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.errors import ToolError
from moetrain.log import JsonlMetrics, read_metrics
from moetrain.model.config import BalanceConfig, BiasRule, ModelConfig
from moetrain.optim.config import OptimConfig
from moetrain.parallel.config import EngineName, ParallelConfig
from moetrain.parallel.engine import build_engine
from moetrain.parallel.protocol import Engine
from moetrain.quant.config import QuantConfig
from moetrain.rl.config import BalanceLosses, RlConfig
from moetrain.rl.loop import RlTraining, collect_groups, run_rl
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.sync import sync_weights
from moetrain.rollout.types import Trajectory
from moetrain.tasks.protocol import Grade, Observation, Split
from moetrain.train.config import TrainConfig
from tests.distributed import run_ranks

_VOCAB = 256 + len(SPECIAL_TOKENS) + 4
_MODEL = ModelConfig(
    vocab_size=_VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=32,
    num_experts=4,
)
_QUANT = QuantConfig(enabled=True)
_TRAIN = TrainConfig(steps=4, checkpoint_every=2)


class EvenEnvironment:
    def call(self, name: str, arguments: str) -> Observation:
        raise ToolError(f"no tool {name}: {arguments}")

    def grade(self, answer: str) -> Grade:
        return Grade(success=len(answer) % 2 == 0, reason="even")

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, kw_only=True)
class EvenTask:
    index: int

    @property
    def num_calls(self) -> int:
        return 1

    @property
    def prompt(self) -> list[Message]:
        return [Message(role=Role.user, content=str(self.index))]

    def environment(self, stream: int) -> EvenEnvironment:
        return EvenEnvironment()


class EvenFamily:
    @property
    def tools(self) -> Sequence[ToolSpec]:
        return ()

    def task(self, split: Split, index: int, *, num_calls: int | None = None) -> EvenTask:
        return EvenTask(index=index)

    def demonstrate(self, task: object, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        return [], Grade(success=False, reason="none")


def _tokenizer() -> Tokenizer:
    return train_tokenizer(["some words to train a tokenizer on " * 3] * 3, vocab_size=_VOCAB)


def _training(engine: Engine, seen: list[Trajectory]) -> RlTraining:
    return RlTraining(
        engine=engine,
        family=EvenFamily(),
        tokenizer=_tokenizer(),
        model=_MODEL,
        quant=_QUANT,
        balance=BalanceConfig(),
        rl=RlConfig(tasks_per_step=4, group_size=8),
        rollout=RolloutConfig(num_slots=32, max_tokens=80, max_turn_tokens=60, max_turns=2),
        declare_tools=False,
        learning_rate=lambda step: 1e-2,
        identity={},
        seed=3,
        first_task=0,
        on_trajectories=lambda step, trajectories: seen.extend(trajectories),
    )


def _engine(name: EngineName, *, expert: int = 1, dtype: torch.dtype = torch.bfloat16) -> Engine:
    parallel = ParallelConfig(engine=name, expert=expert)
    optim = OptimConfig(lr=1e-2)
    return build_engine(_MODEL, parallel, optim_config=optim, quant_config=_QUANT, compute_dtype=dtype, seed=0)


def _run(folder: Path, steps: int) -> tuple[Engine, list[Trajectory]]:
    seen: list[Trajectory] = []
    engine = _engine(EngineName.torch)
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    run_rl(_training(engine, seen), replace(_TRAIN, steps=steps), folder=folder, metrics=metrics)
    metrics.close()
    return engine, seen


def test_a_run_that_was_stopped_goes_on_to_the_same_trajectories_and_weights(tmp_path: Path) -> None:
    whole, all_seen = _run(tmp_path / "whole", 4)
    _, first = _run(tmp_path / "parts", 2)
    resumed, rest = _run(tmp_path / "parts", 4)
    assert any(trajectory.reward for trajectory in all_seen)
    assert [t.tokens for t in first + rest] == [t.tokens for t in all_seen]
    expected, found = whole.gather_state(with_optimizer=True), resumed.gather_state(with_optimizer=True)
    assert expected is not None and found is not None
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_rl_step_changes_the_weights_and_the_next_rollouts_use_them(tmp_path: Path) -> None:
    engine, seen = _run(tmp_path, 2)
    before = _engine(EngineName.torch).gather_state(with_optimizer=False)
    after = engine.gather_state(with_optimizer=False)
    assert before is not None and after is not None
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert {trajectory.version for trajectory in seen} == {0, 1}


def _balanced_step(folder: Path, *, losses: BalanceLosses, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    """Return the metrics and the biases of one step with every balance loss given a weight."""
    balance = BalanceConfig(bias_rule=BiasRule.quantile, sequence_loss=0.1, global_loss=0.2, z_loss=0.05)
    model = replace(_MODEL, balance=balance)
    engine = build_engine(
        model,
        ParallelConfig(engine=EngineName.torch),
        optim_config=OptimConfig(lr=1e-2),
        quant_config=_QUANT,
        compute_dtype=torch.float32,
        seed=0,
    )
    training = _training(engine, [])
    rl = replace(training.rl, balance_losses=losses, tokens_per_micro_batch=tokens)
    metrics = JsonlMetrics(folder / "metrics.jsonl")
    run_rl(
        replace(training, model=model, balance=balance, rl=rl), replace(_TRAIN, steps=1), folder=folder, metrics=metrics
    )
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
        training = _training(engine, [])
        rl = replace(training.rl, tokens_per_micro_batch=tokens)
        folder = tmp_path / str(tokens)
        metrics = JsonlMetrics(folder / "metrics.jsonl")
        run_rl(replace(training, rl=rl, qk_clip=threshold), replace(_TRAIN, steps=1), folder=folder, metrics=metrics)
        metrics.close()
        (values,) = (row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row)
        seen.append(values)
    whole, parts = seen
    assert 0 < whole["heads_clipped"] == parts["heads_clipped"]
    assert whole["max_logit"] > threshold
    assert parts["max_logit"] == pytest.approx(whole["max_logit"], rel=1e-5)


def _trajectories(expert: int) -> list[list[int]]:
    engine = _engine(EngineName.deepspeed, expert=expert, dtype=torch.float32)
    weights = sync_weights(engine, config=_MODEL, quant=_QUANT, dtype=torch.float32)
    groups = collect_groups(_training(engine, []), weights=weights, step=0)
    return [trajectory.tokens for group in groups for trajectory in group]


def test_two_ranks_with_split_experts_collect_the_trajectories_of_one_process() -> None:
    (alone,) = run_ranks(_trajectories, 1, expert=1)
    first, second = run_ranks(_trajectories, 2, expert=2)
    assert first == second == alone

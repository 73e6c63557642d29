"""The RL loop: collect trajectories with the present weights, turn them into columns, take one step, again.

A step is a function of (weights, seed, step): tasks, sampling and tool failures come from named streams, so a run that
was stopped goes on to the same numbers from a checkpoint of the engine and the number of steps.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.checkpoint.resume import resume, saved_state
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.write import Retention
from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.weights import InferenceWeights
from moetrain.log import TIME_PREFIX, Metrics, progress
from moetrain.model.attention import MaxLogits
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.parallel.engine import Engine
from moetrain.quant.config import QuantConfig
from moetrain.rl.advantage import group_advantages
from moetrain.rl.batch import Scored, micro_batches
from moetrain.rl.config import Algorithm, BalanceLosses, RlConfig
from moetrain.rl.loss import policy_objective
from moetrain.rl.metrics import rollout_metrics
from moetrain.rollout.collect import RolloutRequest, collect
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.sync import sync_weights
from moetrain.rollout.types import Trajectory
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Split, TaskFamily
from moetrain.train.config import TrainConfig
from moetrain.train.interrupt import Status, StopSignals
from moetrain.train.nonfinite import Skips
from moetrain.train.rows import rank_rows
from moetrain.train.step import train_step

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RlTraining:
    """What an RL stage hands to the loop.

    first_task: number of the first task, beyond those of SFT. qk_clip: threshold of QK-Clip, None is off.
    """

    engine: Engine
    family: TaskFamily
    tokenizer: Tokenizer
    model: ModelConfig
    quant: QuantConfig
    balance: BalanceConfig
    rl: RlConfig
    rollout: RolloutConfig
    declare_tools: bool
    learning_rate: Callable[[int], float]
    identity: Mapping[str, Any]
    seed: int
    first_task: int
    on_trajectories: Callable[[int, Sequence[Trajectory]], None]
    qk_clip: float | None = None


@dataclass(kw_only=True)
class RlOutcome:
    """How an RL run ended; `sampled_tokens` counts those of all steps."""

    status: Status
    step: int
    sampled_tokens: int


def run_rl(training: RlTraining, config: TrainConfig, *, folder: Path, metrics: Metrics) -> RlOutcome:
    """Take `config.steps` RL steps, from the last good checkpoint in `folder` if there is one. Collective.

    SIGTERM and SIGUSR1 save at the end of the step and return `Status.interrupted`.
    """
    engine = training.engine
    losses = training.balance
    if training.rl.balance_losses is BalanceLosses.none and (losses.global_loss or losses.z_loss):
        _log.warning("rl.balance_losses is none: model.balance.global_loss and z_loss are no part of the objective")
    checkpoints = folder / CHECKPOINTS
    resumed = resume(engine, checkpoints, identity=training.identity)
    step = resumed.step
    sampled_tokens = int(resumed.state.get("sampled_tokens", 0))
    skips = Skips(**resumed.state.get("skips", {}))
    retention = Retention(newest=config.keep_checkpoints, every=config.keep_every)
    saver = Saver(engine.topology, checkpoints, retention=retention)
    with StopSignals() as signals, progress(config.steps, folder.name, completed=step) as advance, saver:
        while step < config.steps:
            values = _one_step(training, config, balance=training.balance.at(step, steps=config.steps), step=step)
            values = skips.note(values, config, step=step)
            step += 1
            saver.poll()
            values[TIME_PREFIX + "checkpoint_s"] = saver.take_held_s()
            sampled_tokens += int(values["sampled_tokens"])
            if engine.topology.is_main:
                metrics.write(step, values)
            advance(f"reward {values['reward']:.3f}")
            signal_name = signals.requested(engine.topology)
            if step % config.checkpoint_every == 0 or step == config.steps or signal_name:
                loop = {"sampled_tokens": sampled_tokens, "skips": asdict(skips)}
                saver.begin(engine, step=step, state=saved_state(identity=training.identity, loop=loop, rows_read=0))
            if signal_name and step < config.steps:
                _log.warning("stopped by %s at step %d; start again to go on", signal_name, step)
                return RlOutcome(status=Status.interrupted, step=step, sampled_tokens=sampled_tokens)
    return RlOutcome(status=Status.finished, step=step, sampled_tokens=sampled_tokens)


def _one_step(training: RlTraining, config: TrainConfig, *, balance: BalanceConfig, step: int) -> dict[str, float]:
    started = time.perf_counter()
    training.engine.topology.enter_step(step)
    weights = sync_weights(training.engine, config=training.model, quant=training.quant)
    groups = collect_groups(training, weights=weights, step=step)
    collected = time.perf_counter()
    training.on_trajectories(step, [trajectory for group in groups for trajectory in group])
    values = rollout_metrics(groups)
    scored = [
        Scored(trajectory=trajectory, advantage=advantage)
        for group in groups
        for trajectory, advantage in zip(
            group, group_advantages([t.reward for t in group], training.rl.algorithm), strict=True
        )
    ]
    counted = scored if training.rl.algorithm is Algorithm.policy else [s for s in scored if s.advantage]
    num_tokens = sum(sum(s.trajectory.is_sampled) for s in counted)
    batches = micro_batches(scored, max_tokens=training.rl.tokens_per_micro_batch, pad_id=training.tokenizer.pad_id)
    if not batches:
        _log.warning("step %d: every group is all right or all wrong; no update", step + 1)
        return {**values, TIME_PREFIX + "rollout_s": collected - started, TIME_PREFIX + "seconds": collected - started}
    topology = training.engine.topology
    if training.rl.balance_losses is BalanceLosses.none:
        balance = replace(balance, global_loss=0.0)  # nothing asks for its counts
    updated = train_step(
        training.engine,
        lambda counts: policy_objective(
            training.rl,
            num_tokens=num_tokens,
            counts=counts,
            balance=balance,
            max_logits=MaxLogits.needed(training.qk_clip),
        ),
        micro_batches=[rank_rows(b, rank=topology.rank, world_size=topology.world_size) for b in batches],
        learning_rate=training.learning_rate(step),
        balance=balance,
        step=step,
        qk_clip=training.qk_clip,
        on_nonfinite=config.on_nonfinite,
    )
    trained = max(updated.pop("trained_tokens"), 1.0)
    for name in ("logprob_gap", "outside_window", "entropy"):
        updated[name] /= trained
    finished = time.perf_counter()
    times = {TIME_PREFIX + "rollout_s": collected - started, TIME_PREFIX + "update_s": finished - collected}
    return {**updated, **values, "trained_tokens": trained, **times, TIME_PREFIX + "seconds": finished - started}


def collect_groups(training: RlTraining, *, weights: InferenceWeights, step: int) -> list[list[Trajectory]]:
    """Return the step's trajectories by task, the same on every rank; each rank generates those of some tasks."""
    topology, rl = training.engine.topology, training.rl
    first = training.first_task + step * rl.tasks_per_step
    requests = []
    for index in range(first, first + rl.tasks_per_step):
        if index % topology.world_size != topology.rank:
            continue
        task = training.family.task(Split.train, index)
        for sample in range(rl.group_size):
            stream = seed_of(training.seed, "rollout", step, index, sample)
            requests.append(RolloutRequest(task_index=index, task=task, sample=sample, stream=stream))
    mine = collect(
        requests,
        weights=weights,
        family=training.family,
        tokenizer=training.tokenizer,
        config=training.rollout,
        declare_tools=training.declare_tools,
        version=step,
    )
    everyone = topology.broadcast_object(topology.gather_objects(mine))
    assert everyone is not None
    ordered = sorted((t for part in everyone for t in part), key=lambda t: (t.task, t.sample))
    return [ordered[i : i + rl.group_size] for i in range(0, len(ordered), rl.group_size)]

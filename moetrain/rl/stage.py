"""A step of RL: collect trajectories with the present weights, turn them into columns, and update the weights.

A step is a function of (weights, seed, step): tasks, sampling and tool failures come from named streams. `train.loop`
runs the steps.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetrain.chat.context import ContextPolicy
from moetrain.checkpoint.identity import as_stored
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError, RolloutError
from moetrain.files import sha256_of_json
from moetrain.kernels.choice import find_for_generation
from moetrain.log import TIME_PREFIX
from moetrain.model.attention import MaxLogits
from moetrain.model.config import BalanceConfig, ModelConfig
from moetrain.parallel.engine import Engine
from moetrain.quant.config import QuantConfig
from moetrain.rl.collection import Collection, CollectionSetting
from moetrain.rl.columns import micro_batches
from moetrain.rl.config import BalanceLosses, RlConfig
from moetrain.rl.loss import SUM_PREFIX, rl_objective
from moetrain.rl.metrics import rollout_metrics
from moetrain.rl.protocol import Algorithm
from moetrain.rl.score import score
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.sync import sync_weights
from moetrain.rollout.types import Trajectory
from moetrain.tasks.protocol import TaskFamily
from moetrain.train.config import TrainConfig
from moetrain.train.continuation import TASKS_USED, StartPoint
from moetrain.train.loop import Training
from moetrain.train.step import train_step

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RlStage:
    """Inputs of the steps of an RL stage.

    first_task: number of the first task, after those of SFT. learning_rate: learning rate by step. identity and
    start_point: see `train.loop.Training`. collection: folder in which trajectories are kept as they finish, until a
    checkpoint contains their step; None keeps none. on_trajectories: called with each step's number and trajectories.
    qk_clip: threshold of QK-Clip; None is off. context: what the model reads of a long trajectory. plugins: digest of
    the code of plugins.
    """

    engine: Engine
    family: TaskFamily
    tokenizer: Tokenizer
    model: ModelConfig
    quant: QuantConfig
    balance: BalanceConfig
    rl: RlConfig
    algorithm: Algorithm
    rollout: RolloutConfig
    declare_tools: bool
    learning_rate: Callable[[int], float]
    identity: Mapping[str, Any]
    seed: int
    first_task: int
    on_trajectories: Callable[[int, Sequence[Trajectory]], None]
    qk_clip: float | None = None
    collection: Path | None = None
    context: ContextPolicy = field(default_factory=ContextPolicy)
    plugins: str = ""
    start_point: StartPoint = field(default_factory=StartPoint)

    def tasks_before(self, step: int) -> int:
        """Return the number of tasks that the steps of the run before step `step` use."""
        used: int = self.start_point.data[TASKS_USED] if self.start_point.is_part else 0
        return used + (step - self.start_point.first_step) * self.rl.tasks_per_step


def collection_of(stage: RlStage, config: TrainConfig) -> Collection:
    """Return the collection of an RL stage; close it at the end."""
    first = stage.start_point.first_step
    return Collection(
        CollectionSetting(
            topology=stage.engine.topology,
            family=stage.family,
            tokenizer=stage.tokenizer,
            rl=stage.rl,
            rollout=stage.rollout,
            declare_tools=stage.declare_tools,
            context=stage.context,
            seed=stage.seed,
            first_task=stage.first_task,
            tasks_before=stage.tasks_before,
            first_step=first,
            last_step=first + config.steps - 1,
            run=sha256_of_json(as_stored(stage.identity) | ({"plugins": stage.plugins} if stage.plugins else {}))[:16],
            folder=stage.collection,
        )
    )


def rl_training(stage: RlStage, config: TrainConfig, *, collection: Collection) -> Training:
    """Return the training of an RL stage, for `train.loop.run_training`.

    Its `take_step` raises RolloutError when every environment has failed in more than `config.max_skipped_in_row`
    consecutive steps, or in as many as the stage has.
    """
    losses = stage.balance
    if stage.rl.balance_losses is BalanceLosses.none and (losses.global_loss or losses.z_loss):
        _log.warning("rl.balance_losses is none: model.balance.global_loss and z_loss are not part of the objective")
    num_failed, limit = 0, min(config.max_skipped_in_row + 1, config.steps)

    def take_step(step: int) -> dict[str, float]:
        nonlocal num_failed
        values = take_rl_step(stage, config, collection=collection, step=step)
        num_failed = num_failed + 1 if values["ending/environment_failed"] == 1.0 else 0
        if num_failed >= limit:
            raise RolloutError(
                f"every environment failed in {num_failed} steps in a row (train.max_skipped_in_row is "
                f"{config.max_skipped_in_row}, train.steps {config.steps}): fix the environment, whose errors are in "
                "the log, and run the same command again"
            )
        return values

    return Training(
        engine=stage.engine,
        take_step=take_step,
        learning_rate=stage.learning_rate,
        headline="reward",
        totals=("tokens", "sampled_tokens"),
        position=lambda step: {TASKS_USED: stage.tasks_before(step)},
        start_point=stage.start_point,
        identity=stage.identity,
    )


def take_rl_step(stage: RlStage, config: TrainConfig, *, collection: Collection, step: int) -> dict[str, float]:
    """Take step `step` (from 0) and return its metrics, the same on every rank. A collective."""
    started = time.perf_counter()
    balance = stage.balance.at(step - stage.start_point.first_step, steps=config.steps)
    library = find_for_generation(stage.rollout.kernels)
    model = sync_weights(stage.engine, config=stage.model, quant=stage.quant, library=library, mode=stage.rollout.mode)
    groups, generated = collection.groups(model, step=step)
    collected = time.perf_counter()
    stage.on_trajectories(step, [trajectory for group in groups for trajectory in group])
    scored = score(groups, stage.algorithm, malformed_penalty=stage.rl.malformed_penalty)
    values = {**rollout_metrics(groups), **generated, "small_groups": float(scored.num_small_groups)}
    if not scored.rows:
        reason = "no group has a trajectory to learn from"
        if scored.num_small_groups == len(groups):
            reason = "no group has two scored trajectories"
        if values["ending/environment_failed"] == 1.0:
            reason = "every environment failed"
        _log.warning("step %d: %s; the weights are not updated", step + 1, reason)
        return {**values, TIME_PREFIX + "rollout_s": collected - started}
    topology = stage.engine.topology
    if stage.rl.balance_losses is BalanceLosses.none:
        balance = replace(balance, global_loss=0.0)  # its counts are not used
    updated = train_step(
        stage.engine,
        lambda counts: rl_objective(
            stage.algorithm,
            divisor=scored.divisor,
            counts=counts,
            balance=balance,
            balance_losses=stage.rl.balance_losses,
            max_logits=MaxLogits.needed(stage.qk_clip),
            mtp_weight=config.mtp.at(step - stage.start_point.first_step, steps=config.steps),
        ),
        micro_batches=micro_batches(
            scored.rows,
            columns=stage.algorithm.columns,
            max_tokens=stage.rl.tokens_per_micro_batch,
            pad_id=stage.tokenizer.pad_id,
            rank=topology.rank,
            world_size=topology.world_size,
        ),
        learning_rate=stage.learning_rate(step),
        balance=balance,
        step=step,
        qk_clip=stage.qk_clip,
        on_nonfinite=config.on_nonfinite,
    )
    trained = max(updated.pop("trained_tokens"), 1.0)
    sums = {
        name.removeprefix(SUM_PREFIX): updated.pop(name) / trained for name in [*updated] if name.startswith(SUM_PREFIX)
    }
    if taken := sorted(sums.keys() & {*updated, *values, "step", "lr", "trained_tokens"}):
        raise ConfigError(
            f"rl.algorithm={stage.rl.algorithm} has a sum {taken[0]!r}, the name of a metric of every step: rename it"
        )
    finished = time.perf_counter()
    times = {TIME_PREFIX + "rollout_s": collected - started, TIME_PREFIX + "update_s": finished - collected}
    return {**updated, **sums, **values, "trained_tokens": trained, **times}

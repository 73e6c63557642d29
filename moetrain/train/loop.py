"""The training loop of pretraining and SFT: steps, metrics, validation, checkpoints, stopping without loss.

A run is a pure function of its step: the batch, the learning rate and every random draw follow from (seed, step). So a
checkpoint needs the engine's state and the number of steps, and a run that was stopped goes on to the same numbers.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.checkpoint.resume import resume, saved_state
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.write import Retention
from moetrain.data.batch import TokenBatch
from moetrain.log import TIME_PREFIX, Metrics, progress
from moetrain.model.config import BalanceConfig
from moetrain.parallel.protocol import Engine
from moetrain.train.config import TrainConfig
from moetrain.train.interrupt import Status, StopSignals
from moetrain.train.loss import ObjectiveFor
from moetrain.train.nonfinite import Skips
from moetrain.train.rows import micro_batches, rank_rows
from moetrain.train.step import train_step

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Training:
    """What a stage hands to the loop.

    batch_at: the global batch of a step (from 0). learning_rate: the rate of a step. mix_at: the number of the mix of
    sources that a step is of. validate: figures by name, the
    same on every rank (collective). opening: metrics of a run that begins. identity: what must be equal for a stopped
    run to go on (see `checkpoint.resume`). flops_per_token: forward and backward. peak_flops: matmul peak of all ranks
    together, in FLOP/s. qk_clip: threshold of QK-Clip, None is off; otherwise the objective measures the logits.
    """

    engine: Engine
    objective_for: ObjectiveFor
    batch_at: Callable[[int], TokenBatch]
    learning_rate: Callable[[int], float]
    mix_at: Callable[[int], int]
    balance: BalanceConfig
    validate: Callable[[], Mapping[str, float]]
    opening: Mapping[str, float]
    identity: Mapping[str, Any]
    flops_per_token: float
    peak_flops: float
    qk_clip: float | None = None


@dataclass(kw_only=True)
class Counters:
    """What a run has seen up to a step; kept in its checkpoints."""

    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    skips: Skips = field(default_factory=Skips)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Counters":
        """Return what `asdict` made of counters, as counters; an empty state gives zeros."""
        return cls(**{**state, "skips": Skips(**state.get("skips", {}))})


@dataclass(kw_only=True)
class Outcome:
    """How a run ended. validation: the last figures, empty if it was interrupted. checkpoint: the last one written."""

    status: Status
    step: int
    counters: Counters
    validation: Mapping[str, float]
    checkpoint: Path


def run_training(training: Training, config: TrainConfig, *, folder: Path, metrics: Metrics) -> Outcome:
    """Train for `config.steps` steps, from the last good checkpoint in `folder` if there is one. A collective.

    SIGTERM and SIGUSR1 save at the end of the step and return `Status.interrupted`; started again, the run goes on to
    the numbers it would have had. A loss that is not finite raises `DivergenceError`, or leaves the step out
    (`config.on_nonfinite`).
    """
    engine = training.engine
    checkpoints = folder / CHECKPOINTS
    resumed = resume(engine, checkpoints, identity=training.identity)
    counters = Counters.restored(resumed.state)
    is_main = engine.topology.is_main
    record = metrics.write if is_main else _ignore
    if resumed.num_damaged:
        record(resumed.step, {"checkpoint/damaged": float(resumed.num_damaged)})
    step = resumed.step
    if step == 0 and training.opening:
        record(step, training.opening)
    shown = progress(config.steps, folder.name, completed=step) if is_main else nullcontext(_ignore)
    retention = Retention(newest=config.keep_checkpoints, every=config.keep_every)
    saver = Saver(engine.topology, checkpoints, retention=retention)
    with StopSignals() as signals, shown as advance, saver:
        while step < config.steps:
            values = _one_step(training, config, step=step, counters=counters)
            step += 1
            saver.poll()
            values[TIME_PREFIX + "checkpoint_s"] = saver.take_held_s()
            if step % config.log_every == 0 or step == config.steps:
                record(step, values)
            advance(f"loss {values['loss']:.3f}" if "loss" in values else "left out")
            if config.validate_every and step % config.validate_every == 0 and step < config.steps:
                record(step, training.validate())
            signal_name = signals.requested(engine.topology)
            if step % config.checkpoint_every == 0 or step == config.steps or signal_name:
                rows_read = config.rows_before(step)
                state = saved_state(identity=training.identity, loop=asdict(counters), rows_read=rows_read)
                saver.begin(engine, step=step, state=state)
            if signal_name and step < config.steps:
                _log.warning("stopped by %s at step %d; start again to go on", signal_name, step)
                return _outcome(Status.interrupted, step=step, counters=counters, checkpoints=checkpoints)
    validation = training.validate()
    record(step, {**validation, TIME_PREFIX + "checkpoint_s": saver.take_held_s()})
    return _outcome(Status.finished, step=step, counters=counters, checkpoints=checkpoints, validation=validation)


def _one_step(training: Training, config: TrainConfig, *, step: int, counters: Counters) -> dict[str, float]:
    """Take step `step`, add what it saw to `counters`, and return its metrics."""
    start = time.perf_counter()
    topology = training.engine.topology
    topology.enter_step(step)
    batch = training.batch_at(step)
    rows = rank_rows(batch, rank=topology.rank, world_size=topology.world_size)
    balance = training.balance.at(step, steps=config.steps)
    values = train_step(
        training.engine,
        training.objective_for,
        micro_batches=micro_batches(rows, rows=config.rows_per_micro_batch),
        learning_rate=training.learning_rate(step),
        balance=balance,
        step=step,
        qk_clip=training.qk_clip,
        on_nonfinite=config.on_nonfinite,
    )
    values = counters.skips.note(values, config, step=step)
    seconds = time.perf_counter() - start
    counters.tokens += int(values["tokens"])
    counters.targets += int(values["targets"])
    counters.seconds += seconds
    values |= {"rows": len(batch.tokens_BT), "mix": training.mix_at(step), "bias_rate": balance.bias_rate}
    tokens_per_s = values["tokens"] / seconds
    values |= {TIME_PREFIX + "seconds": seconds, TIME_PREFIX + "tokens_per_s": tokens_per_s}
    if math.isfinite(training.peak_flops):
        values[TIME_PREFIX + "mfu"] = training.flops_per_token * tokens_per_s / training.peak_flops
    return values


def _ignore(*values: object) -> None:
    """Take what only the main rank tells."""


def _outcome(
    status: Status,
    *,
    step: int,
    counters: Counters,
    checkpoints: Path,
    validation: Mapping[str, float] | None = None,
) -> Outcome:
    return Outcome(
        status=status,
        step=step,
        counters=counters,
        validation=validation or {},
        checkpoint=checkpoints / f"step_{step:08d}",
    )

"""The training loop of every stage: steps, metrics, validation, checkpoints and resumable stops.

Pretraining, SFT and RL differ in what one step computes, which they pass as `Training.take_step`. Batch, tasks,
learning rate and every random draw of a step are functions of (seed, step). So a checkpoint needs only the engine's
state, the counters and the number of steps, and a stopped run resumes with the same numbers.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.checkpoint.resume import resume, saved_state
from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.write import Retention
from moetrain.log import TIME_PREFIX, Metrics, progress
from moetrain.parallel.protocol import Engine
from moetrain.train.config import TrainConfig
from moetrain.train.continuation import StartPoint
from moetrain.train.interrupt import Status, StopSignals
from moetrain.train.nonfinite import Skips
from moetrain.train.progress_note import ProgressNote

_log = logging.getLogger(__name__)

TOTAL_PREFIX = "total/"
"""Prefix of metrics that are summed over the run so far, such as `total/tokens`."""


def no_validation() -> dict[str, float]:
    """Return no metrics: the validation of a stage without held-out data."""
    return {}


@dataclass(kw_only=True)
class Training:
    """The functions and settings that a stage passes to the loop.

    - take_step: takes step n of the run (from 0) and returns its metrics, the same on every rank. Collective.
    - learning_rate: the learning rate of step n.
    - headline: name of the metric that the progress line shows.
    - totals: names of metrics that are summed over the run.
    - position: the data position that a checkpoint stores after n steps.
    - identity: must be equal for a stopped run to resume (see `checkpoint.resume`).
    - start_point: where the steps begin; the engine must hold the state of that step.
    - validate: metrics of held-out data, the same on every rank. Collective; called every validate_every steps (0: only
      at the end).
    - initial_metrics: metrics that are logged once when a run begins.
    """

    engine: Engine
    take_step: Callable[[int], Mapping[str, float]]
    learning_rate: Callable[[int], float]
    headline: str
    totals: Sequence[str]
    position: Callable[[int], Mapping[str, Any]]
    identity: Mapping[str, Any]
    start_point: StartPoint = field(default_factory=StartPoint)
    validate: Callable[[], Mapping[str, float]] = no_validation
    validate_every: int = 0
    initial_metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Counters:
    """Counters of a run up to a step, stored in its checkpoints. totals: sums of the metrics named in
    `Training.totals`.
    """

    totals: dict[str, int]
    seconds: float = 0.0
    skips: Skips = field(default_factory=Skips)

    @classmethod
    def restored(cls, state: Mapping[str, Any], *, names: Sequence[str]) -> "Counters":
        """Return the counters stored by `asdict`; from an empty state, zeros for `names`."""
        kept = state.get("totals", state)  # older checkpoints store the totals at the top level
        return cls(
            totals={name: int(kept.get(name, 0)) for name in names},
            seconds=state.get("seconds", 0.0),
            skips=Skips(**state.get("skips", {})),
        )


@dataclass(kw_only=True)
class Outcome:
    """How a run ended. validation: the final metrics, empty if interrupted. checkpoint: the last one written."""

    status: Status
    step: int
    counters: Counters
    validation: Mapping[str, float]
    checkpoint: Path


def run_training(training: Training, config: TrainConfig, *, folder: Path, metrics: Metrics) -> Outcome:
    """Train from the last good checkpoint in `folder`, if there is one, to the last step. Collective.

    The last step is `training.start_point.first_step + config.steps`. SIGTERM, SIGUSR1 and Ctrl-C save at the end of
    the current step and return `Status.interrupted`; when started again, the run resumes and computes the same numbers
    as without the stop. A loss that is not finite raises `DivergenceError`, or the step is skipped
    (`config.on_nonfinite`).
    """
    engine = training.engine
    checkpoints = folder / CHECKPOINTS
    resumed = resume(engine, checkpoints, identity=training.identity)
    begins, start_point = resumed.step == 0, training.start_point
    step = start_point.step if begins else resumed.step
    counters = Counters.restored(start_point.loop if begins else resumed.state, names=training.totals)
    is_main = engine.topology.is_main
    record = metrics.write if is_main else _ignore
    if resumed.num_damaged:
        record(resumed.step, {"checkpoint/damaged": float(resumed.num_damaged)})
    start_point.check_place(training.position)
    if begins and training.initial_metrics:
        record(step, training.initial_metrics)
    last = start_point.first_step + config.steps
    shown = progress(last, str(folder), completed=step) if is_main else nullcontext(_ignore)
    retention = Retention(newest=config.keep_checkpoints, every=config.keep_every)
    saver = Saver(engine.topology, checkpoints, retention=retention)
    note = ProgressNote(headline=training.headline, device=engine.topology.device)
    with StopSignals() as signals, shown as advance, saver:
        _log.info("%s: step %d of %d; metrics and checkpoints are in %s", folder.name, step, last, folder)
        while step < last:
            values = _one_step(training, config, step=step, counters=counters)
            step += 1
            saver.poll()
            values[TIME_PREFIX + "checkpoint_s"] = saver.take_waited_s()
            if step % config.log_every == 0 or step == last:
                record(step, values)
            advance(note.of(values))
            if training.validate_every and step % training.validate_every == 0 and step < last:
                note.validation = training.validate()
                record(step, note.validation)
            signal_name = signals.requested(engine.topology)
            if step % config.checkpoint_every == 0 or step == last or signal_name:
                saver.begin(engine, step=step, state=_state(training, counters, step=step))
                note.saved = step
            if signal_name and step < last:
                _log.warning("stopped by %s at step %d; started again, this stage resumes there", signal_name, step)
                return _outcome(Status.interrupted, step=step, counters=counters, checkpoints=checkpoints)
    validation = training.validate()
    if validation:
        record(step, {**validation, TIME_PREFIX + "checkpoint_s": saver.take_waited_s()})
    return _outcome(Status.finished, step=step, counters=counters, checkpoints=checkpoints, validation=validation)


def _state(training: Training, counters: Counters, *, step: int) -> dict[str, Any]:
    """Return the content of state.json after `step` steps."""
    loop = {**asdict(counters), "learning_rate": training.learning_rate(step - 1)}
    return saved_state(training.identity, loop=loop, data=training.position(step))


def _one_step(training: Training, config: TrainConfig, *, step: int, counters: Counters) -> dict[str, float]:
    """Take step `step`, update `counters`, and return its metrics."""
    start = time.perf_counter()
    training.engine.topology.enter_step(step)
    values = counters.skips.note(training.take_step(step), config, step=step)
    for name in counters.totals:
        counters.totals[name] += int(values.get(name, 0))
        values[TOTAL_PREFIX + name] = counters.totals[name]
    seconds = time.perf_counter() - start
    counters.seconds += seconds
    return {**values, TIME_PREFIX + "seconds": seconds}


def _ignore(*values: object) -> None:
    """Do nothing: replaces the recorders of the main rank on all other ranks."""


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

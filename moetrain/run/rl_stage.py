"""RL: passes a run's config to `rl.stage`. Loads torch, so import it after checking the input."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from moetrain.checkpoint import read as checkpoint
from moetrain.checkpoint.origin import TOKENIZER, Origin, continue_state, shared_digest, start_from
from moetrain.checkpoint.read import CHECKPOINTS
from moetrain.commands.training import RlRun
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.files import write_json
from moetrain.inference.mode import Mode
from moetrain.kernels.build import Library
from moetrain.parallel.engine import Engine, build_engine
from moetrain.parallel.topology import Topology, setup
from moetrain.rl.registry import build
from moetrain.rl.stage import RlStage, collection_of, rl_training
from moetrain.rollout.journal import COLLECTION, remove_before
from moetrain.rollout.traces import write_traces
from moetrain.rollout.types import Trajectory
from moetrain.run.plugins import plugins_digest
from moetrain.run.resume_check import own_sections, train_of
from moetrain.run.stage import INTERRUPTED, stage_folder, stage_metrics
from moetrain.run.trained_context import check_context
from moetrain.run.weights import tokenizer_of, training_weights
from moetrain.runtime import rank
from moetrain.stage_files import SUMMARY, TRACES
from moetrain.tasks import registry
from moetrain.tasks.dialogues import RL_FIRST_TASK
from moetrain.train.continuation import TASKS_USED, StartPoint, start_point_of
from moetrain.train.identity import identity_of
from moetrain.train.interrupt import Status
from moetrain.train.loop import run_training
from moetrain.train.precision import DTYPES, resolve_precision

_log = logging.getLogger(__name__)
_FAST = "Give rollout.mode=fast"


def learn(run: RlRun) -> int:
    """Run an RL stage from the weights that the config names; return its exit code."""
    with stage_folder(run) as folder, stage_metrics(run) as metrics:
        origin = training_weights(run)
        start_point = rl_start_point(run, origin)
        tokenizer = tokenizer_of(origin)
        tokenizer.check_chat()
        _compare_context(run, origin)
        topology, is_exact = setup(run.parallel), run.rollout.mode is Mode.deterministic
        cure = _FAST if is_exact else None
        precision = resolve_precision(train_of(run), folder=folder, topology=topology, cure=cure)
        if is_exact:
            check_kernels(precision.library, topology)
        train = precision.train
        engine = build_engine(
            run.model,
            run.parallel,
            optim_config=run.optim,
            quant_config=run.quant,
            compute_dtype=DTYPES[train.compute_dtype],
            seed=run.run.seed,
            library=precision.library,
        )
        start = start_from if run.continue_from is None else continue_state
        start(engine, origin, model=run.model)
        # A stage with checkpoints keeps its tokenizer. Resuming checks that it equals the tokenizer of the weights.
        is_begun = checkpoint.steps(folder / CHECKPOINTS) and (folder / TOKENIZER).is_dir()
        if engine.topology.is_main and not is_begun:
            tokenizer.save(folder / TOKENIZER)
        run = replace(run, train=train)
        stage = _stage(run, engine, origin=origin, start_point=start_point, tokenizer=tokenizer, folder=folder)
        with closing(collection_of(stage, train)) as collection:
            training = rl_training(stage, train, collection=collection)
            outcome = run_training(training, train, folder=folder, metrics=metrics)
        if outcome.status is Status.interrupted:
            return INTERRUPTED
        if engine.topology.is_main:
            shutil.rmtree(folder / COLLECTION, ignore_errors=True)  # the last checkpoint contains all of it
            kernels_and_dtype = {"compute_dtype": train.compute_dtype, "kernels": train.kernels}
            summary = {"stage": folder.name, "steps": outcome.step, **kernels_and_dtype}
            write_json(folder / SUMMARY, summary | outcome.counters.totals | start_point.record())
    return 0


def _compare_context(run: RlRun, origin: Origin) -> None:
    """Warn on the main rank if the weights were trained with another context policy."""
    try:
        check_context(run.task.context, origin)
    except ConfigError as difference:
        if rank() == 0:
            _log.warning("%s, unless RL is meant to teach another one", difference)


def check_kernels(library: Library | None, topology: Topology) -> None:
    """Raise ConfigError where a rank that generates and one that trains could compute other bits. A collective."""
    if library is None:
        raise ConfigError(
            f"rollout.mode is deterministic and this run trains on {topology.device.type}: only the native kernels of "
            f"CPUs give training and generation the same bits. {_FAST}"
        )
    own = f"{library.path.stem} with {library.units.name} numbers"
    kinds = topology.broadcast_object(sorted(set(topology.gather_objects(own) or ())))
    if len(kinds) > 1:
        raise ConfigError(
            f"rollout.mode is deterministic and the ranks compute differently ({', '.join(kinds)}): start all ranks "
            "on CPUs of one kind with the same compiler, or give rollout.mode=fast"
        )


def rl_start_point(run: RlRun, origin: Origin) -> StartPoint:
    """Return the starting point of an RL stage. Raises `CheckpointError` if it cannot continue `origin`."""
    return start_point_of(origin, counted=TASKS_USED, optim=run.optim, train=run.train, seed=run.run.seed)


def _stage(
    run: RlRun, engine: Engine, *, origin: Origin, start_point: StartPoint, tokenizer: Tokenizer, folder: Path
) -> RlStage:
    def keep(step: int, trajectories: Sequence[Trajectory]) -> None:
        """Write the first group of a step's trajectories to a file; remove those that a checkpoint contains."""
        if engine.topology.is_main:
            path = folder / TRACES / f"step_{step + 1:08d}.jsonl"
            write_traces(path, trajectories[: run.rl.group_size], tokenizer=tokenizer)
            saved = max(checkpoint.steps(folder / CHECKPOINTS), default=0)
            remove_before(folder / COLLECTION, step=saved - run.rl.max_staleness)

    return RlStage(
        engine=engine,
        family=registry.build(run.task, run.run.seed),
        tokenizer=tokenizer,
        model=run.model,
        quant=run.quant,
        balance=run.model.balance,
        rl=run.rl,
        algorithm=build(run.rl),
        rollout=run.rollout,
        declare_tools=run.task.declare_tools,
        context=run.task.context,
        plugins=plugins_digest(run.plugins),
        learning_rate=lambda step: start_point.rate(step, optim=run.optim, steps=run.train.steps),
        identity=identity_of(
            model=run.model,
            quant=run.quant,
            optim=run.optim,
            train=run.train,
            seed=run.run.seed,
            origin=shared_digest(origin, engine.topology),
            others={**own_sections(run), "tokenizer": tokenizer.digest},
        ),
        seed=run.run.seed,
        first_task=RL_FIRST_TASK,
        start_point=start_point,
        collection=folder / COLLECTION,
        on_trajectories=keep,
        qk_clip=run.optim.qk_clip,
    )

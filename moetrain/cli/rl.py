"""`moetrain rl`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moetrain.cli.stage import INTERRUPTED, stage_folder, stage_metrics, write_json
from moetrain.config import RlRun
from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.rollout.types import Trajectory


def main(run: RlRun) -> int:
    """Run the stage; return its exit code."""
    if run.init_from is None:
        raise ConfigError("init_from is null: RL begins with weights that solve some tasks, give those of an SFT stage")
    # These bring torch in, so only now.
    from moetrain.cli.traces import write_traces
    from moetrain.cli.weights import read_weights, tokenizer_of
    from moetrain.optim.schedule import learning_rate
    from moetrain.parallel.engine import build_engine
    from moetrain.rl.loop import RlTraining, run_rl
    from moetrain.tasks import registry
    from moetrain.tasks.dialogues import RL_FIRST_TASK
    from moetrain.train.identity import identity_of
    from moetrain.train.interrupt import Status
    from moetrain.train.origin import TOKENIZER, start_from
    from moetrain.train.stages import DTYPES, SUMMARY

    with stage_folder(run) as folder, stage_metrics(run) as metrics:
        origin = read_weights(run.init_from)
        tokenizer = tokenizer_of(origin)
        engine = build_engine(
            run.model,
            run.parallel,
            optim_config=run.optim,
            quant_config=run.quant,
            compute_dtype=DTYPES[run.train.compute_dtype],
            seed=run.run.seed,
        )
        start_from(engine, origin, model=run.model)
        is_main = engine.topology.is_main
        if is_main:
            tokenizer.save(folder / TOKENIZER)

        def keep(step: int, trajectories: Sequence["Trajectory"]) -> None:
            if is_main:
                path = folder / "traces" / f"step_{step + 1:08d}.jsonl"
                write_traces(path, trajectories[: run.rl.group_size], tokenizer=tokenizer)

        sections = {"task": asdict(run.task), "rollout": asdict(run.rollout), "rl": asdict(run.rl)}
        training = RlTraining(
            engine=engine,
            family=registry.build(run.task, run.run.seed),
            tokenizer=tokenizer,
            model=run.model,
            quant=run.quant,
            balance=run.model.balance,
            rl=run.rl,
            rollout=run.rollout,
            declare_tools=run.task.declare_tools,
            learning_rate=lambda step: learning_rate(
                step, run.train.steps, lr=run.optim.lr, schedule=run.optim.schedule
            ),
            identity=identity_of(
                model=run.model,
                quant=run.quant,
                optim=run.optim,
                train=run.train,
                seed=run.run.seed,
                origin=origin.digest,
                others={**sections, "tokenizer": tokenizer.digest},
            ),
            seed=run.run.seed,
            first_task=RL_FIRST_TASK,
            on_trajectories=keep,
        )
        outcome = run_rl(training, run.train, folder=folder, metrics=metrics)
        if outcome.status is Status.interrupted:
            return INTERRUPTED
        if is_main:
            write_json(
                folder / SUMMARY, {"stage": "rl", "steps": outcome.step, "sampled_tokens": outcome.sampled_tokens}
            )
    return 0

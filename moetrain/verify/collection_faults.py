"""Kills RL runs in the middle of collecting trajectories, and compares them with an undisturbed run.

A rank stops itself after it has finished a chosen trajectory of a step, and is killed there while others are in
progress. The next attempt must go on with the trajectories that are left: none is collected twice and none is missing,
and metrics and weights are bit-identical to those of the undisturbed run.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moetrain.errors import ConfigError
from moetrain.runtime import python_stream
from moetrain.tasks.dialogues import RL_FIRST_TASK
from moetrain.verify import fault_runs
from moetrain.verify.fault_runs import Attempt, FaultSetup, begin
from moetrain.verify.injection import COLLECTED
from moetrain.verify.table import Row

_TASKS, _GROUP = 4, 4


def collection_rows(setup: FaultSetup, *, kills: int, seed: int, advance: Callable[[str], None]) -> list[Row]:
    """Return the rows of one RL run that is killed `kills` times. `setup` is that of a finished pretraining run."""
    rl = replace(
        setup,
        folder=setup.folder / "rl",
        stage_name="rl",
        steps=2 * kills + 2,
        weights=setup.stage("whole"),
        overrides=(),
        more=(
            f"rl.tasks_per_step={_TASKS}",
            f"rl.group_size={_GROUP}",
            "rl.malformed_penalty=1",  # a nearly random model solves nothing, and still has advantages
            "train.checkpoint_every=2",
            "rollout.num_slots=6",
            "rollout.max_turn_tokens=60",
            "rollout.max_turns=4",
        ),
    )
    rl.folder.mkdir(parents=True, exist_ok=True)
    whole = begin(rl, "whole", plan={})
    if whole.wait() != 0:
        raise ConfigError(f"the undisturbed RL run failed: {whole.output().splitlines()[-1]} (log: {whole.log})")
    stream = python_stream(seed, "verify.faults.collection", setup.ranks)
    busy = sorted({task % setup.ranks for task in range(RL_FIRST_TASK, RL_FIRST_TASK + _TASKS)})  # ranks with tasks
    num_landed, unexpected, attempts = 0, [], []
    for _ in range(kills):
        rank = stream.choice(busy)
        own = _GROUP * sum(task % setup.ranks == rank for task in range(RL_FIRST_TASK, RL_FIRST_TASK + _TASKS))
        number = stream.choice([place for place in range(1, 2 * own) if place % own])  # not after a step's last one
        attempt = begin(rl, "killed", plan={"moment": "trajectory", "number": number, "rank": rank})
        attempts.append(attempt)
        while not attempt.is_over() and not attempt.gate(rank):
            fault_runs.pause()
        if attempt.is_over():
            unexpected.append(f"{attempt.log}: ended with {attempt.process.returncode} before it was killed")
        else:
            num_landed += attempt.gate(rank).startswith("trajectory")
            attempt.kill_all()
        attempt.wait()
        advance("killed while collecting")
    attempts.append(begin(rl, "killed", plan={}))
    if attempts[-1].wait() != 0:
        unexpected.append(f"{attempts[-1].log}: exit code {attempts[-1].process.returncode}")
    return _rows(rl, whole, attempts, kills=kills, num_landed=num_landed, unexpected=unexpected)


def _rows(
    rl: FaultSetup, whole: Attempt, attempts: list[Attempt], *, kills: int, num_landed: int, unexpected: list[str]
) -> list[Row]:
    ranks = "1 process" if rl.ranks == 1 else f"{rl.ranks} ranks"
    wanted = Counter(_collected(whole.report_folder))
    found = Counter(name for attempt in attempts for name in _collected(attempt.report_folder))
    note = f"{num_landed} landed, each after a trajectory that is not the last of its step"
    rows = [
        Row(name=f"{ranks}: kills while collecting that did not land", value=kills - num_landed, bound=0, note=note),
        Row(
            name=f"{ranks}: RL attempts that ended unexpectedly",
            value=len(unexpected),
            bound=0,
            note="; ".join(unexpected[:3]),
        ),
        Row(
            name=f"{ranks}: trajectories lost or collected twice",
            value=sum(((found - wanted) + (wanted - found)).values()),
            bound=0,
            note=f"of {sum(wanted.values())} that the undisturbed run collects",
        ),
    ]
    return [*rows, *fault_runs.comparison_rows(f"{ranks}, RL", whole=rl.stage("whole"), other=rl.stage("killed"))]


def _collected(report_folder: Path) -> list[str]:
    """Return the tasks and samples of the trajectories that an attempt finished."""
    return [
        line for path in report_folder.glob(f"{COLLECTED}_*") for line in path.read_text(encoding="utf-8").splitlines()
    ]

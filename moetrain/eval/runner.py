"""Runs held-out tasks on one set of weights, mode by mode: each temperature, longer chains, tools that never fail.

Tasks and tool failures depend on the seed and the task only, so that two evaluations run the same ones and can be
paired. The caller reads the weights.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError, described
from moetrain.eval.config import EvalConfig
from moetrain.inference.protocol import Generation
from moetrain.log import progress
from moetrain.parallel.topology import Topology
from moetrain.rollout.collect import RolloutRequest, collect
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.making import make_task
from moetrain.rollout.types import Trajectory
from moetrain.rollout.voting import VotingGeneration
from moetrain.rollout.world import EnvironmentFailure, grade_in_new_environment
from moetrain.runtime import seed_of
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.dialogues import demonstration
from moetrain.tasks.protocol import Demonstrates, Grade, MakesLongerTasks, Split, Task, TaskFamily

_log = logging.getLogger(__name__)

_MAX_FAILED = 5
"""Tasks in a row that may fail in the check of the graders."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of running tasks: a name, a temperature, which tasks, and whether tools may fail."""

    name: str
    temperature: float
    tasks: list[tuple[int, int | None]]
    """(number of the task, its number of calls or None for the family's choice)."""
    tools_fail: bool = True
    vote_lead: int = 0
    """Votes by which a turn must lead (see `rollout.voting`); 0 is no vote."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """The trajectories of a mode in the order of its tasks.

    samples_per_turn: mean number of samples that a vote on a turn took; None without votes.
    """

    trajectories: list[Trajectory]
    samples_per_turn: float | None


def modes(config: EvalConfig, family: TaskFamily) -> Iterator[Mode]:
    """Yield the modes of an evaluation; longer tasks only if the family makes tasks of a given length."""
    first = config.first_task
    tasks: list[tuple[int, int | None]] = [(index, None) for index in range(first, first + config.num_tasks)]
    for temperature in config.temperatures:
        yield Mode(name=mode_name(temperature), temperature=temperature, tasks=tasks)
    if config.error_free:
        yield Mode(name="greedy_error_free", temperature=0.0, tasks=tasks, tools_fail=False)
    longer: list[tuple[int, int | None]] = [
        (index, calls) for calls in config.longer_calls for index in range(first, first + config.longer_tasks)
    ]
    if longer and not isinstance(family, MakesLongerTasks):
        _log.info(
            "eval.longer_calls is %s: skipped, because the task family makes no tasks of a given length",
            config.longer_calls,
        )
    elif longer:
        yield Mode(name="greedy_longer", temperature=0.0, tasks=longer)
        if config.vote_lead:
            yield Mode(
                name="voted_longer", temperature=config.vote_temperature, tasks=longer, vote_lead=config.vote_lead
            )


def mode_name(temperature: float) -> str:
    """Return the name of the mode that samples at `temperature`."""
    return "greedy" if temperature == 0 else f"sampled_t{temperature:g}"


def run_mode(
    mode: Mode,
    *,
    make_generation: Callable[[int], Generation],
    family_of: Callable[[TaskConfig], TaskFamily],
    task_config: TaskConfig,
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    vote_samples: int,
    seed: int,
    topology: Topology,
) -> Played:
    """Run one trajectory per task of the mode. A collective: ranks share the tasks.

    make_generation: returns a generation for at most this number of sequences at the same time. vote_samples: largest
    number of samples of a turn where the mode votes.
    """
    config = task_config if mode.tools_fail else replace(task_config, tool_failure=0.0)
    family = family_of(config)
    requests = [
        RolloutRequest(
            task_index=index,
            task=make_task(partial(_task, family, index, calls), limit_s=rollout.environment_deadline_s),
            sample=0,
            stream=seed_of(seed, "eval", index, calls or 0),
        )
        for index, calls in mode.tasks[topology.rank :: topology.world_size]
    ]
    generation = make_generation(len(requests) * max(mode.vote_lead, 1))
    votes = VotingGeneration(generation, lead=mode.vote_lead, max_samples=vote_samples) if mode.vote_lead else None
    with progress(len(requests), mode.name) as advance:
        own_trajectories = collect(
            requests,
            generation=votes or generation,
            family=family,
            tokenizer=tokenizer,
            config=replace(rollout, temperature=mode.temperature),
            declare_tools=task_config.declare_tools,
            policy=task_config.context,
            on_finished=lambda request, trajectory: advance(""),
        )
    own = (own_trajectories, votes.num_samples if votes else 0, votes.num_turns if votes else 0)
    by_rank = topology.broadcast_object(topology.gather_objects(own))
    assert by_rank is not None
    num_samples, num_turns = sum(part[1] for part in by_rank), sum(part[2] for part in by_rank)
    size = topology.world_size
    trajectories = [by_rank[position % size][0][position // size] for position in range(len(mode.tasks))]
    return Played(
        trajectories=[
            replace(trajectory, num_calls_needed=calls) if trajectory.num_calls_needed is None else trajectory
            for trajectory, (_, calls) in zip(trajectories, mode.tasks, strict=True)
        ],
        samples_per_turn=num_samples / num_turns if num_turns else None,
    )


def _task(family: TaskFamily, index: int, calls: int | None) -> Task:
    if calls is None:
        return family.task(Split.held_out, index)
    assert isinstance(family, MakesLongerTasks)  # see `modes`
    return family.task_of_length(Split.held_out, index, num_calls=calls)


def check_graders(
    family: TaskFamily, *, first_task: int, num_tasks: int, seed: int, config: RolloutConfig
) -> dict[str, Any]:
    """Return the success rate of an empty answer, and of the demonstrator without mistakes if the family has one.

    Tasks whose environment or demonstrator fails are left out of the rate in question. After some tasks in a row
    that fail, the others are not tried. config: has the deadlines of environments.
    """
    if num_tasks < 1:
        raise ConfigError(f"eval.num_tasks is {num_tasks}: give at least 1")
    indices = range(first_task, first_task + num_tasks)
    limit_s = config.environment_deadline_s
    tasks = [make_task(partial(family.task, Split.held_out, index), limit_s=limit_s) for index in indices]
    with_streams = [(task, seed_of(seed, "graders", index)) for task, index in zip(tasks, indices, strict=True)]
    null = _successes(_null_policy_grade(task, stream, config=config) for task, stream in with_streams)
    rates = {"null_policy": sum(null) / max(len(null), 1), "num_tasks": len(null)}
    if isinstance(family, Demonstrates):
        graded = _successes(_demonstration_grade(family, task, stream=stream) for task, stream in with_streams)
        if graded:
            rates["perfect_demonstrator"] = sum(graded) / len(graded)
    if rates["null_policy"]:
        share = 100 * rates["null_policy"]
        _log.warning("graders: an empty answer solves %.3g %% of %d tasks; success means little", share, len(null))
    if rates.get("perfect_demonstrator", 1.0) < 1.0:
        share = 100 * rates["perfect_demonstrator"]
        _log.warning(
            "graders: the demonstrator without mistakes solves only %.3g %% of the tasks: fix it or the grader", share
        )
    return rates


def _successes(grades: Iterable[Grade | None]) -> list[bool]:
    """Return the successes of the grades, until several in a row are missing."""
    found: list[bool] = []
    num_failed = 0  # in a row
    for grade in grades:
        num_failed = 0 if grade is not None else num_failed + 1
        if grade is not None:
            found.append(grade.success)
        elif num_failed == _MAX_FAILED:
            _log.warning("graders: %d tasks in a row failed: the others are not tried", num_failed)
            break
    return found


def _demonstration_grade(family: Demonstrates, task: Task, *, stream: int) -> Grade | None:
    """Return the grade of a demonstration without mistakes; None when the demonstration fails."""
    try:
        return demonstration(family, task, stream=stream, perfect=True)[1]
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything
        _log.warning("graders: the demonstrator failed: %s", described(error))
        return None


def _null_policy_grade(task: Task, stream: int, *, config: RolloutConfig) -> Grade | None:
    """Return the grade of an empty answer in a fresh environment; None when the environment fails."""
    try:
        return grade_in_new_environment(task, stream, answer="", config=config)
    except EnvironmentFailure as error:
        _log.warning("graders: the environment failed: %s", error)
        return None

"""Runs held-out tasks on one set of weights, mode by mode: each temperature, longer chains, tools that never fail.

Tasks and tool failures are functions of the seed and the task alone, so two evaluations meet the same ones and can be
paired. Knows no files of weights: they are handed in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.eval.config import EvalConfig
from moetrain.inference.weights import InferenceWeights
from moetrain.log import progress
from moetrain.parallel.topology import Topology
from moetrain.rollout.collect import RolloutRequest, collect
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.types import Trajectory
from moetrain.runtime import seed_of
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.protocol import Split, Task, TaskFamily


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of running tasks: a name, a temperature, which tasks, and whether tools may fail."""

    name: str
    temperature: float
    tasks: list[tuple[int, int | None]]
    """Number of each task, and its length where that is fixed."""
    tools_fail: bool = True


def modes(config: EvalConfig) -> Iterator[Mode]:
    """Yield the modes of an evaluation."""
    tasks: list[tuple[int, int | None]] = [
        (index, None) for index in range(config.first_task, config.first_task + config.num_tasks)
    ]
    for temperature in config.temperatures:
        yield Mode(name=mode_name(temperature), temperature=temperature, tasks=tasks)
    if config.error_free:
        yield Mode(name="greedy_error_free", temperature=0.0, tasks=tasks, tools_fail=False)
    longer: list[tuple[int, int | None]] = [
        (index, calls) for calls in config.longer_calls for index in range(config.longer_tasks)
    ]
    if longer:
        yield Mode(name="greedy_longer", temperature=0.0, tasks=longer)


def mode_name(temperature: float) -> str:
    """Return the name of the mode that samples at `temperature`."""
    return "greedy" if temperature == 0 else f"sampled_t{temperature:g}"


def run_mode(
    mode: Mode,
    *,
    weights: InferenceWeights,
    family_of: Callable[[TaskConfig], TaskFamily],
    task_config: TaskConfig,
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    seed: int,
    topology: Topology,
) -> list[Trajectory]:
    """Return one trajectory a task of the mode, in the order of its tasks. A collective: the ranks share the tasks."""
    config = task_config if mode.tools_fail else replace(task_config, tool_failure=0.0)
    family = family_of(config)
    requests = [
        RolloutRequest(
            task_index=index,
            task=_task(family, index, calls),
            sample=0,
            stream=seed_of(seed, "eval", index, calls or 0),
        )
        for index, calls in mode.tasks[topology.rank :: topology.world_size]
    ]
    with progress(len(requests), mode.name) as advance:
        mine = collect(
            requests,
            weights=weights,
            family=family,
            tokenizer=tokenizer,
            config=replace(rollout, temperature=mode.temperature),
            declare_tools=task_config.declare_tools,
            on_finished=lambda trajectory: advance(""),
        )
    shares = topology.broadcast_object(topology.gather_objects(mine))
    assert shares is not None
    return [shares[place % topology.world_size][place // topology.world_size] for place in range(len(mode.tasks))]


def _task(family: TaskFamily, index: int, calls: int | None) -> Task:
    return family.task(Split.held_out, index, num_calls=calls)


def check_graders(family: TaskFamily, *, num_tasks: int) -> dict[str, Any]:
    """Return the success of a policy that only answers nothing, and of the expert that makes no slips and retries."""
    if num_tasks < 1:
        raise ConfigError(f"eval.num_tasks is {num_tasks}: give at least 1")
    null = expert = 0
    for index in range(num_tasks):
        task = family.task(Split.held_out, index)
        environment = task.environment(index)
        null += environment.grade("").success
        environment.close()
        expert += family.demonstrate(task, index, perfect=True)[1].success
    return {"null_policy": null / num_tasks, "perfect_expert": expert / num_tasks, "num_tasks": num_tasks}

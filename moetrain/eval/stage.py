"""A whole evaluation: modes on the export, the same modes on the masters, their divergence, and paired differences.

Weights, tokenizer and the earlier evaluation are handed in; what comes back is plain numbers and the trajectories.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from moetrain.data.tokenizer import Tokenizer
from moetrain.eval.config import EvalConfig
from moetrain.eval.divergence import divergence
from moetrain.eval.runner import check_graders, mode_name, modes, run_mode
from moetrain.eval.summary import paired, summarize
from moetrain.inference.weights import InferenceWeights
from moetrain.parallel.topology import Topology
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.types import Trajectory
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.protocol import TaskFamily

EVAL = "eval.json"
"""What an evaluation stage writes."""
_GRADER_TASKS = 200


@dataclass(kw_only=True)
class Evaluation:
    """Numbers for `eval.json`, and the export's trajectories by mode."""

    numbers: dict[str, Any]
    trajectories: dict[str, list[Trajectory]]


def evaluate(
    config: EvalConfig,
    *,
    weights: InferenceWeights,
    masters: InferenceWeights | None,
    family_of: Callable[[TaskConfig], TaskFamily],
    task: TaskConfig,
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    seed: int,
    before: Mapping[str, Any] | None,
    topology: Topology,
) -> Evaluation | None:
    """Run every mode; the main rank returns what was found. `masters`: bf16 masters beside the export; `before`: an
    earlier `eval.json`.

    A collective: the ranks of `topology` share the tasks.
    """
    run_one = partial(
        run_mode,
        family_of=family_of,
        task_config=task,
        tokenizer=tokenizer,
        rollout=rollout,
        seed=seed,
        topology=topology,
    )
    results = {mode.name: run_one(mode, weights=weights) for mode in modes(config)}
    beside = [mode for mode in modes(config) if mode.name in map(mode_name, config.temperatures)]
    of_masters = {mode.name: run_one(mode, weights=masters) for mode in beside} if masters is not None else {}
    if not topology.is_main:
        return None
    numbers: dict[str, Any] = {
        "modes": {name: summarize(trajectories) for name, trajectories in results.items()},
        "graders": check_graders(family_of(task), num_tasks=min(config.num_tasks, _GRADER_TASKS)),
        "trained_calls": [task.min_calls, task.max_calls],
    }
    if masters is not None:
        numbers["masters"] = {name: summarize(trajectories) for name, trajectories in of_masters.items()}
        sample = next(iter(results.values()))[: config.kl_tasks]
        numbers["divergence"] = asdict(divergence(masters, weights, trajectories=sample))
    if before is not None:
        numbers["paired"] = {
            name: asdict(difference)
            for name, summary in numbers["modes"].items()
            if name in before["modes"]
            and (difference := paired(before["modes"][name]["outcomes"], summary["outcomes"])) is not None
        }
    return Evaluation(numbers=numbers, trajectories=results)

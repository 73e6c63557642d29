"""A whole evaluation: modes on the export, the same modes on the masters, their divergence, and paired differences.

The caller provides weights, tokenizer and the earlier evaluation. The result is plain numbers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moetrain.chat.context import described
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.eval.config import EvalConfig
from moetrain.eval.divergence import divergence
from moetrain.eval.finished import FinishedModes
from moetrain.eval.runner import Mode, check_graders, mode_name, modes, run_mode
from moetrain.eval.summary import paired, summarize
from moetrain.inference.protocol import Model
from moetrain.parallel.topology import Topology
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.engine import make_generation
from moetrain.rollout.types import Trajectory
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.protocol import MakesLongerTasks, TaskFamily

_log = logging.getLogger(__name__)

_GRADER_TASKS = 200


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Weights to evaluate, and the digest of the files that they were read from."""

    model: Model
    digest: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Inputs that all modes of an evaluation share.

    plugins: digest of the code of plugins. finished: stores the result of each mode when it ends. on_finished: called
    on the main rank for each mode that was run on the export, with "<mode>.<key of its result>" and its trajectories.
    """

    config: EvalConfig
    family_of: Callable[[TaskConfig], TaskFamily]
    task: TaskConfig
    tokenizer: Tokenizer
    rollout: RolloutConfig
    seed: int
    plugins: str
    finished: FinishedModes
    on_finished: Callable[[str, list[Trajectory]], None]
    topology: Topology


def evaluate(
    setting: Setting, *, export: Contestant, masters: Contestant | None, before: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Run every mode that is not finished; the main rank returns the numbers for `eval.json`.

    masters: bf16 masters to compare with the export. before: an earlier `eval.json`. A collective: the ranks share the
    tasks.
    """
    config, task = setting.config, setting.task
    family = setting.family_of(task)
    all_modes = list(modes(config, family))
    if before is not None:
        _check_before(before, [mode.name for mode in all_modes], context=described(asdict(task.context)))
    results = {
        mode.name: _result(setting, mode, export=export, masters=masters if mode is all_modes[0] else None)
        for mode in all_modes
    }
    beside = [mode for mode in all_modes if mode.name in map(mode_name, config.temperatures)]
    of_masters = {mode.name: _result(setting, mode, export=None, masters=masters) for mode in beside if masters}
    if not setting.topology.is_main:
        return None
    numbers: dict[str, Any] = {
        "modes": {name: result["summary"] for name, result in results.items()},
        "graders": check_graders(
            family,
            first_task=config.first_task,
            num_tasks=min(config.num_tasks, _GRADER_TASKS),
            seed=setting.seed,
            config=setting.rollout,
        ),
        "task": {
            "name": task.name,
            "context": described(asdict(task.context)),
            "tools": {tool.name: tool.description for tool in family.tools},
        },
    }
    if isinstance(family, MakesLongerTasks):
        numbers["trained_calls"] = list(family.trained_calls)
    if masters is not None:
        numbers["masters"] = {name: result["summary"] for name, result in of_masters.items()}
        if "divergence" in results[all_modes[0].name]:
            numbers["divergence"] = results[all_modes[0].name]["divergence"]
    if before is not None:
        numbers["paired"] = _differences(before, numbers["modes"])
    return numbers


def _check_before(before: Mapping[str, Any], names: Sequence[str], *, context: Mapping[str, Any]) -> None:
    """Raise ConfigError if an earlier evaluation has none of the modes `names`; say if its context policy differs."""
    if not before["modes"].keys() & set(names):
        raise ConfigError(
            f"eval.before has the modes {', '.join(before['modes'])}, and this evaluation {', '.join(names)}: nothing "
            "can be compared, give the same eval.temperatures or leave eval.before out"
        )
    if (other := before.get("task", {}).get("context", context)) != context:
        _log.info("eval.before had another context policy (%s): the differences include its effect", other)


def _differences(before: Mapping[str, Any], by_mode: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the paired differences of the modes that both evaluations have; warn of one without a common task."""
    found = {}
    for name in [name for name in by_mode if name in before["modes"]]:
        difference = paired(before["modes"][name]["outcomes"], by_mode[name]["outcomes"])
        if difference is None:
            _log.warning("eval.before has no result of a task of the mode %s: it is not compared", name)
        else:
            found[name] = asdict(difference)
    return found


def _result(setting: Setting, mode: Mode, *, export: Contestant | None, masters: Contestant | None) -> dict[str, Any]:
    """Return the result of a mode: the stored one if it is finished, else that of running it.

    The mode runs on the export if it is given, else on the masters. With both, the result includes the divergence
    between them on the trajectories of the export.
    """
    config, task, topology = setting.config, setting.task, setting.topology
    contestant = export or masters
    assert contestant is not None
    depends_on = [
        asdict(mode),
        asdict(task),
        asdict(setting.rollout),
        setting.seed,
        contestant.digest,
        config.vote_samples,
    ]
    if setting.plugins:
        depends_on.append(setting.plugins)
    if export is not None and masters is not None:
        depends_on += [masters.digest, config.kl_tasks]
    key = setting.finished.key_of(depends_on)
    saved = topology.broadcast_object(setting.finished.get(key) if topology.is_main else None)
    if saved is not None:
        _log.info("%s was finished before the evaluation stopped and is not run again", mode.name)
        return saved
    played = run_mode(
        mode,
        make_generation=lambda number: make_generation(contestant.model, setting.rollout, num_sequences=number),
        family_of=setting.family_of,
        task_config=task,
        tokenizer=setting.tokenizer,
        rollout=setting.rollout,
        vote_samples=config.vote_samples,
        seed=setting.seed,
        topology=topology,
    )
    trajectories = played.trajectories
    result: dict[str, Any] = {"summary": summarize(trajectories)}
    if played.samples_per_turn is not None:
        result["summary"]["samples_per_turn"] = played.samples_per_turn
    if topology.is_main:
        if export is not None and masters is not None:
            sample = [trajectory for trajectory in trajectories if trajectory.num_sampled][: config.kl_tasks]
            if sample:
                result["divergence"] = asdict(divergence(masters.model, export.model, trajectories=sample))
        if export is not None:
            setting.on_finished(f"{mode.name}.{key}", trajectories)
        setting.finished.add(key, result)
    return result

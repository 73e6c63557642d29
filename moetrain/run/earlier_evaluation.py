"""Reads the earlier evaluation (`eval.before`) with which an evaluation is compared task by task."""

from collections.abc import Mapping
from typing import Any

from moetrain.commands.weights import EvalRun
from moetrain.compose import read_yaml, to_mapping
from moetrain.errors import CheckpointError
from moetrain.files import user_path
from moetrain.report.shapes import CONFIG_SHAPE, EVALUATION_SHAPE, validated
from moetrain.run.record import flattened
from moetrain.stage_files import CONFIG, EVALUATION
from moetrain.tasks.config import TaskConfig

_OF_TASKS = ("run.seed", "eval.num_tasks", "eval.first_task", "task.")
_NOT_OF_TASKS = (
    *("task.context.", "task.declare_tools"),
    *("task.database.demonstrator.", "task.database.deadline_s", "task.ledger.misspell", "task.ledger.deadline_s"),
)
"""Beginnings of the keys that determine the tasks of an evaluation, and of those among them that do not."""


def read_before(run: EvalRun) -> dict[str, Any] | None:
    """Return the content of `eval.json` of the evaluation that `eval.before` names, or None if it is null.

    Raises `CheckpointError` if the file is missing or invalid, or if the evaluation used other tasks.
    """
    if run.eval.before is None:
        return None
    from moetrain.checkpoint.identity import differences
    from moetrain.checkpoint.read import read_json

    folder = user_path(run.eval.before)
    path = folder / EVALUATION
    if not path.is_file():
        raise CheckpointError(f"eval.before: there is no {path}; give the folder of a finished evaluation")
    numbers = validated(read_json(path), EVALUATION_SHAPE, place=f"eval.before: {path}")
    if not numbers["modes"] or not all("outcomes" in mode for mode in numbers["modes"].values()):
        raise CheckpointError(f"eval.before: {path} contains no outcomes; run that evaluation again")
    config = validated(read_yaml(folder / CONFIG), CONFIG_SHAPE, place=f"eval.before: {folder / CONFIG}")
    changed = differences(_tasks_of(config), _tasks_of(to_mapping(run)))
    if changed:
        raise CheckpointError(f"eval.before: {folder} evaluated other tasks ({'; '.join(changed)}); give the same ones")
    return numbers


def _tasks_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config values that determine the tasks of an evaluation, by key; what is missing has its default."""
    values = flattened({"task": to_mapping(TaskConfig())}) | flattened(config)
    return {
        key: value for key, value in values.items() if key.startswith(_OF_TASKS) and not key.startswith(_NOT_OF_TASKS)
    }

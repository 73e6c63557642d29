"""The shape of stored weights, read without torch: from state.json of a checkpoint, or from config.json.

A stage that starts from weights takes its model's shape from here while its config is composed.
"""

from pathlib import Path

from moetrain.checkpoint.folders import CHECKPOINTS, STATE_FILE, folder_of, is_checkpoint, read_json, steps
from moetrain.checkpoint.identity import differences, model_of
from moetrain.errors import CheckpointError
from moetrain.files import user_path
from moetrain.hf.mtp_modules import with_held_modules
from moetrain.hf.shape import from_hf_config
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor
from moetrain.stage_files import EXPORT_RECORD

CONFIG_FILE = "config.json"
"""File of an export with its shape, as transformers reads it."""
EXPORT = "model"
"""Name of the folder of the export within the folder of an export stage."""
FREE_FIELDS = ("balance.", "yarn.", "max_position_embeddings")
"""Fields of the model config that a stage may change although it starts from existing weights."""


def stored_shape(weights: str) -> ModelConfig | None:
    """Return the shape of the weights in a stage's folder, a checkpoint, an export or a Hugging Face folder.

    Returns None if there are no weights; loading them later raises the error. Raises `CheckpointError` if the file with
    the shape is damaged.
    """
    path = user_path(weights)
    try:
        if (path / EXPORT / EXPORT_RECORD).is_file():
            path = path / EXPORT
        if is_checkpoint(path):
            return _of_checkpoint(path) if path.is_dir() else None
        if all_steps := steps(path / CHECKPOINTS):
            return _of_newest(path / CHECKPOINTS, all_steps)
        if not (path / CONFIG_FILE).is_file():
            return None
        return with_held_modules(from_hf_config(read_json(path / CONFIG_FILE)), path)
    except CheckpointError as error:
        if str(error).startswith(f"{CONFIG_FILE}: "):
            raise CheckpointError(f"{weights}: {error}") from error
        raise


def shape_changes(before: ModelConfig, now: ModelConfig) -> list[str]:
    """Return the fields in which two shapes differ, as "field: before -> now"."""
    return differences(_fields(before), _fields(now))


def mismatched_fields(before: ModelConfig, now: ModelConfig) -> list[str]:
    """Return the differing fields that must be equal, because the meaning of the weights depends on them.

    Modules of multi-token prediction may be left out (model.num_mtp_layers), but not added.
    """
    free = FREE_FIELDS if now.num_mtp_layers > before.num_mtp_layers else (*FREE_FIELDS, "num_mtp_layers")
    return [line for line in shape_changes(before, now) if not line.startswith(free)]


def _of_newest(folder: Path, all_steps: list[int]) -> ModelConfig:
    """Return the shape in the newest readable checkpoint; all checkpoints of a stage have the same shape."""
    for step in reversed(all_steps):
        try:
            return _of_checkpoint(folder_of(folder, step))
        except CheckpointError:
            if step == all_steps[0]:
                raise
    raise AssertionError("there is a checkpoint")


def _of_checkpoint(path: Path) -> ModelConfig:
    state = read_json(path / STATE_FILE)
    try:
        return model_of(state["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / STATE_FILE}: contains no model shape that this version can read ({error}); "
            "name another checkpoint, or give the shape as model="
        ) from error


def _fields(model: ModelConfig) -> dict[str, object]:
    """Return the fields of a shape as a nested mapping, with `routed_scaling_factor` derived if it is null."""
    sections = {"yarn": vars(model.yarn), "balance": vars(model.balance)}
    return {**vars(model), **sections, "routed_scaling_factor": routed_scaling_factor(model)}

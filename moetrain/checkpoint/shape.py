"""The shape of stored weights, read without torch: from state.json of a checkpoint, or from config.json.

A stage that starts from weights takes its model's shape from here while its config is composed.
"""

from pathlib import Path

from moetrain.checkpoint.folders import CHECKPOINTS, STATE_FILE, folder_of, is_checkpoint, read_json, steps
from moetrain.checkpoint.identity import differences, model_of
from moetrain.errors import CheckpointError
from moetrain.files import user_path
from moetrain.hf.shape import from_hf_config
from moetrain.model.config import ModelConfig
from moetrain.model.gate_scale import routed_scaling_factor

CONFIG_FILE, RECORD_FILE = "config.json", "moetrain.json"
"""Files of an export: the shape in the form of transformers, and what moetrain says of it."""
EXPORT = "model"
"""Folder of the export in the folder of an export stage."""
FREE_FIELDS = ("balance.", "yarn.", "max_position_embeddings")
"""Fields of the model that a stage may change without changing what the weights mean."""


def stored_shape(weights: str) -> ModelConfig | None:
    """Return the shape of the weights in a stage's folder, a checkpoint, an export or a Hugging Face folder.

    None where there are no weights: whoever loads them says what is missing. Raises `CheckpointError` when the file
    that holds the shape is damaged.
    """
    path = user_path(weights)
    try:
        if (path / EXPORT / RECORD_FILE).is_file():
            path = path / EXPORT
        if is_checkpoint(path):
            return _of_checkpoint(path) if path.is_dir() else None
        if found := steps(path / CHECKPOINTS):
            return _of_newest(path / CHECKPOINTS, found)
        return from_hf_config(read_json(path / CONFIG_FILE)) if (path / CONFIG_FILE).is_file() else None
    except CheckpointError as error:
        if str(error).startswith(f"{CONFIG_FILE}: "):
            raise CheckpointError(f"{weights}: {error}") from error
        raise


def shape_changes(before: ModelConfig, now: ModelConfig) -> list[str]:
    """Return the fields in which two shapes differ, as "field: before -> now"."""
    return differences(_fields(before), _fields(now))


def mismatched_fields(before: ModelConfig, now: ModelConfig) -> list[str]:
    """Return the fields that differ and must not: the meaning of the weights depends on them."""
    return [line for line in shape_changes(before, now) if not line.startswith(FREE_FIELDS)]


def _of_newest(folder: Path, found: list[int]) -> ModelConfig:
    """Return the shape that the newest readable checkpoint states; all checkpoints of a stage have the same."""
    for step in reversed(found):
        try:
            return _of_checkpoint(folder_of(folder, step))
        except CheckpointError:
            if step == found[0]:
                raise
    raise AssertionError("there is a checkpoint")


def _of_checkpoint(path: Path) -> ModelConfig:
    state = read_json(path / STATE_FILE)
    try:
        return model_of(state["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / STATE_FILE}: holds no shape of a model that this version reads ({error}); "
            "name another checkpoint, or give the shape as model="
        ) from error


def _fields(model: ModelConfig) -> dict[str, object]:
    """Return the fields of a shape as a nested mapping; a factor that is left open as the one derived."""
    sections = {"yarn": vars(model.yarn), "balance": vars(model.balance)}
    return {**vars(model), **sections, "routed_scaling_factor": routed_scaling_factor(model)}

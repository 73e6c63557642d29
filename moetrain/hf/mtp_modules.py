"""Finds the modules of multi-token prediction that a folder holds, by the names of its tensors. No torch.

Programs that do not compute the modules save a folder without them and leave their number in config.json, so the number
alone does not say whether they are there.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moetrain.files import read_json_or_empty
from moetrain.model.config import ModelConfig

_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def with_held_modules(model: ModelConfig, path: Path) -> ModelConfig:
    """Return the shape with the number of modules that the folder `path` holds, at most the number that `model` states.

    A module of which there is any tensor is held; reading it raises an error if others are missing. Files that cannot
    be read hold nothing here; reading the weights raises the error.
    """
    if not model.num_mtp_layers:
        return model
    layers = {int(found[1]) for found in map(_LAYER.search, _names(path)) if found is not None}
    held = 0
    while held < model.num_mtp_layers and model.num_layers + held in layers:
        held += 1
    return replace(model, num_mtp_layers=held)


def _names(path: Path) -> Iterator[str]:
    weight_map = read_json_or_empty(path / _INDEX).get("weight_map")
    if isinstance(weight_map, dict):
        yield from weight_map
        return
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as opened:
                yield from opened.keys()
        except (OSError, SafetensorError):
            continue

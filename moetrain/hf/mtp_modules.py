"""Finds the modules of multi-token prediction that a folder holds, by the names of its tensors. No torch.

Programs that do not compute the modules save a folder without them and leave their number in config.json, so the number
alone does not say whether they are there.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain.model.config import ModelConfig

_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LARGEST_HEADER = 1 << 27  # bytes


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
    index = _object(path / _INDEX)
    if index is not None:
        weight_map = index.get("weight_map")
        yield from weight_map if isinstance(weight_map, dict) else ()
        return
    for file in sorted(path.glob("*.safetensors")):
        yield from _header(file)


def _object(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: eight bytes of length, then JSON; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            values = json.loads(file.read(length)) if length <= _LARGEST_HEADER else {}
    except (OSError, ValueError, struct.error):
        return {}
    return values if isinstance(values, dict) else {}

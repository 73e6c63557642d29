"""Names of checkpoint folders and of the files in them. No torch: a config is composed before torch is imported."""

import json
import re
from pathlib import Path
from typing import Any

from moetrain.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""Name of the checkpoints folder in a stage's folder."""
STATE_FILE, INDEX_FILE = "state.json", "index.json"
REPAIR = "use another checkpoint, or copy this one again from an intact copy"
_STEP_FOLDER = re.compile(r"^step_(\d{8})$")


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, ascending, including damaged ones."""
    if not folder.is_dir():
        return []
    found = (_STEP_FOLDER.match(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def folder_of(folder: Path, step: int) -> Path:
    """Return the folder of checkpoint `step`."""
    return folder / f"step_{step:08d}"


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` looks like a checkpoint folder, intact or not."""
    return _STEP_FOLDER.match(path.name) is not None or (path / INDEX_FILE).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises `CheckpointError` if it is missing, truncated or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing; {REPAIR}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); {REPAIR}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: contains a {type(value).__name__} instead of a JSON object; {REPAIR}")
    return value

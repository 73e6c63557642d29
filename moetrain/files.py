"""Writes files atomically, and JSON that every parser accepts.

A file is written under a temporary name in the same folder, synced to disk, and renamed. JSON has no NaN and no
infinity: both become null.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def user_path(text: str) -> Path:
    """Return a path that a user typed, with `~` and `~name` replaced; those that name no user are text."""
    return Path(os.path.expanduser(text))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically; create the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # ranks may write the same file at the same time
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any], *, indent: int = 1) -> None:
    """Write a JSON object, indented, atomically."""
    write_text(path, to_json(content, indent=indent) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or contains no JSON object.

    For files that can be recreated, such as caches: a machine that crashes may leave such a file truncated.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def to_json(value: object, *, indent: int | None = None) -> str:
    """Return `value` as JSON, with null for NaN and the infinities, which JSON cannot express."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

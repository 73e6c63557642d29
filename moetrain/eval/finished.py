"""The modes that an evaluation has finished, kept in a file so that a stop in a later mode does not lose them.

An entry stands under a digest of all that its numbers depend on: mode, tasks, rollout, seed and weights.
"""

import hashlib
from pathlib import Path
from typing import Any

from moetrain.files import read_json_or_empty, to_json, write_json


class FinishedModes:
    """Results by digest in a JSON file. Only the main rank reads and writes it."""

    def __init__(self, path: Path) -> None:
        """Read what an evaluation that was stopped left in `path`."""
        self._path = path
        self._found = read_json_or_empty(path)

    def get(self, depends_on: Any) -> dict[str, Any] | None:
        """Return the result that was kept for these inputs, None if there is none."""
        return self._found.get(_digest(depends_on))

    def add(self, depends_on: Any, result: dict[str, Any]) -> None:
        """Keep a result for these inputs."""
        self._found[_digest(depends_on)] = result
        write_json(self._path, self._found)

    def remove(self) -> None:
        """Remove the file: the evaluation is complete and its results stand elsewhere."""
        self._path.unlink(missing_ok=True)


def _digest(depends_on: Any) -> str:
    return hashlib.sha256(to_json(depends_on).encode()).hexdigest()

"""Stores the results of finished modes in a file, so that an evaluation that stops in a later mode keeps them.

The key of an entry is a digest of all inputs that its numbers depend on: mode, tasks, rollout, seed and weights.
"""

from pathlib import Path
from typing import Any

from moetrain.files import read_json_or_empty, sha256_of_json, write_json


class FinishedModes:
    """Results by digest in a JSON file. Only the main rank reads and writes it."""

    def __init__(self, path: Path) -> None:
        """Read the results that a stopped evaluation stored in `path`."""
        self._path = path
        self._found = read_json_or_empty(path)

    def get(self, depends_on: Any) -> dict[str, Any] | None:
        """Return the stored result for these inputs, None if there is none."""
        return self._found.get(sha256_of_json(depends_on))

    def add(self, depends_on: Any, result: dict[str, Any]) -> None:
        """Store a result for these inputs."""
        self._found[sha256_of_json(depends_on)] = result
        write_json(self._path, self._found)

    def remove(self) -> None:
        """Remove the file, when the evaluation is complete and its results are in another file."""
        self._path.unlink(missing_ok=True)

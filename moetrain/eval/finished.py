"""Stores the results of finished modes in a file, so that an evaluation that stops in a later mode keeps them.

The key of a result is a digest of all inputs that its numbers depend on: mode, tasks, rollout, seed and weights.
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
        self.used: set[str] = set()
        """Keys of the results that were found or added."""

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the stored result with this key, None if there is none."""
        result = self._found.get(key)
        if result is not None:
            self.used.add(key)
        return result

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Store a result with this key."""
        self.used.add(key)
        self._found[key] = result
        write_json(self._path, self._found)

    @staticmethod
    def key_of(depends_on: Any) -> str:
        """Return the key of a result that depends on these inputs."""
        return sha256_of_json(depends_on)

    def remove(self) -> None:
        """Remove the file, when the evaluation is complete and its results are in another file."""
        self._path.unlink(missing_ok=True)

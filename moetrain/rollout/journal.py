"""Keeps the trajectories of a step as they finish, so that a process that is killed while it collects loses none.

A trajectory is a function of the weights and of its request's stream, so that one that was finished before the run
stopped is the one that the resumed run would collect, and is not collected again. There is one file per step and rank,
with one JSON object per line; a line that was cut off when the run was killed is left out.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.errors import DataError
from moetrain.files import to_json
from moetrain.rollout.collect import RolloutRequest
from moetrain.rollout.types import REPLACED, Ending, Segment, Trajectory
from moetrain.tasks.protocol import Grade

_log = logging.getLogger(__name__)

COLLECTION = "collection"
"""Folder of these files in a stage folder."""


class Journal:
    """The finished trajectories of one step, by their requests."""

    def __init__(self, folder: Path, *, step: int, rank: int, run: str) -> None:
        """Read what all ranks stored for `step` in `folder`; further trajectories are added to the file of `rank`.

        run: a digest of what the run's trajectories depend on; those of other runs are not found.
        """
        self._run = run
        self._path = _path(folder, step, rank)
        self._found: dict[str, Trajectory] = {}
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder} is a file, and trajectories are kept in a folder of this name: remove it")
        for path in sorted(folder.glob(f"step_{step:08d}.rank_*.jsonl")):
            self._found |= dict(_read(path))
        self._found = {key: kept for key, kept in self._found.items() if key.startswith(f"{run}/")}
        if self._found:
            _log.info("step %d: %d trajectories were collected before the run stopped", step + 1, len(self._found))

    def find(self, request: RolloutRequest) -> Trajectory | None:
        """Return the finished trajectory of a request, None if there is none."""
        return self._found.get(self._key(request))

    def add(self, request: RolloutRequest, trajectory: Trajectory) -> None:
        """Append a finished trajectory to the file, unless a new attempt at it may have another ending."""
        if trajectory.ending in REPLACED:
            return
        append_line(self._path, to_json({"key": self._key(request), "trajectory": _to_row(trajectory)}))

    def _key(self, request: RolloutRequest) -> str:
        return f"{self._run}/{request.task_index}/{request.sample}/{request.stream}"


def append_line(path: Path, text: str) -> None:
    """Append a line of text, with its digest, to a file whose last line may have been cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:  # the line break in front ends a line that was cut off
        file.write(f"\n{_digest(text.encode())} {text}\n".encode())


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number and text of each line of `append_line`; None for one that was cut off or damaged."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        digest, _, text = line.partition(b" ")
        if line:
            yield number, text if digest == _digest(text).encode() else None


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def remove_before(folder: Path, *, step: int) -> None:
    """Remove the files of all steps before `step`, which a checkpoint contains."""
    for path in folder.glob("step_*.rank_*.jsonl"):
        if path.name < _path(folder, step, 0).name[: len("step_00000000")]:
            path.unlink(missing_ok=True)


def _path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step_{step:08d}.rank_{rank}.jsonl"


def _read(path: Path) -> Iterator[tuple[str, Trajectory]]:
    for number, text in read_lines(path):
        if text is None:
            _log.info("%s line %d is damaged, or was not written to its end: collected again", path, number)
            continue
        try:
            row = json.loads(text)
            yield row["key"], _from_row(row["trajectory"])
        except (KeyError, TypeError, ValueError):  # written by another version
            _log.info("%s line %d has other fields: its trajectory is collected again", path, number)


def _to_row(trajectory: Trajectory) -> dict[str, Any]:
    grade = trajectory.grade
    return {
        **vars(trajectory),
        "ending": trajectory.ending.value,
        "segments": [vars(segment) for segment in trajectory.segments],
        "grade": {
            "reward": grade.reward,
            "reason": grade.reason,
            "parts": dict(grade.parts),
            "threshold": grade.threshold,
        },
    }


def _from_row(row: dict[str, Any]) -> Trajectory:
    return Trajectory(
        **{
            **row,
            "ending": Ending(row["ending"]),
            "segments": [Segment(**segment) for segment in row["segments"]],
            "grade": Grade(**row["grade"]),
        }
    )

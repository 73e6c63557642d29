"""Whole trajectories as JSON lines, for reading."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moetrain.data.tokenizer import Tokenizer
from moetrain.files import write_json_lines
from moetrain.rollout.types import Trajectory


def write_traces(path: Path, trajectories: Sequence[Trajectory], *, tokenizer: Tokenizer) -> None:
    """Write trajectories with their text, one per line; replace an earlier file."""
    write_json_lines(path, [{"text": tokenizer.decode(item.tokens), **asdict(item)} for item in trajectories])

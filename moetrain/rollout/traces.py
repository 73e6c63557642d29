"""Whole trajectories as JSON lines, for reading."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moetrain.data.tokenizer import Tokenizer
from moetrain.rollout.types import Trajectory


def write_traces(path: Path, trajectories: Sequence[Trajectory], *, tokenizer: Tokenizer) -> None:
    """Write trajectories with their text, one a line, in place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    lines = [json.dumps({"text": tokenizer.decode(item.tokens), **asdict(item)}) + "\n" for item in trajectories]
    scratch.write_text("".join(lines), encoding="utf-8")
    os.replace(scratch, path)

"""Writes complete trajectories as JSON lines, for inspection."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.data.tokenizer import Tokenizer
from moetrain.files import write_json_lines
from moetrain.report.trace_page import CONTEXT_BREAK
from moetrain.rollout.types import Trajectory


def write_traces(path: Path, trajectories: Sequence[Trajectory], *, tokenizer: Tokenizer) -> None:
    """Write trajectories with their text, one per line. An existing file is replaced."""
    write_json_lines(path, [trace(item, decode=tokenizer.decode) for item in trajectories])


def trace(trajectory: Trajectory, *, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """Return a trajectory as JSON: its fields, the text of its segments, and whether it solved the task."""
    content = asdict(trajectory)
    content["grade"]["success"] = trajectory.grade.success
    return {
        "text": CONTEXT_BREAK.join(
            decode(segment.tokens).replace(CONTEXT_BREAK, "␌") for segment in trajectory.segments
        ),
        **content,
    }

"""Writes complete trajectories as JSON lines, for inspection."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.data.tokenizer import Tokenizer
from moetrain.files import write_json_lines
from moetrain.report.trace_page import CONTEXT_BREAK
from moetrain.rollout.types import Trajectory

_WORD_JOINER = "\u2060"


def write_traces(path: Path, trajectories: Sequence[Trajectory], *, tokenizer: Tokenizer) -> None:
    """Write trajectories with their text, one per line. An existing file is replaced."""
    write_json_lines(path, [trace(item, decode=lambda tokens: _shown(tokens, tokenizer)) for item in trajectories])


def _shown(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of tokens. Where text imitates a marker, an invisible character separates it from a real one."""
    names, found, run = tokenizer.special_names, [], []
    for token in [*tokens, None]:
        if token is not None and token not in names:
            run.append(token)
            continue
        text = tokenizer.decode(run) if run else ""
        for name in names.values():
            text = text.replace(name, name[0] + _WORD_JOINER + name[1:])
        found.append(text if token is None else text + names[token])
        run = []
    return "".join(found)


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

"""What a rollout brings back: trajectories as token columns, with their grade and how they ended."""

from dataclasses import dataclass
from enum import StrEnum

from moetrain.tasks.protocol import Grade


class Ending(StrEnum):
    """Why a trajectory ended. Only `answered` can be graded right."""

    answered = "answered"
    invalid_turn = "invalid_turn"
    turn_too_long = "turn_too_long"
    max_turns = "max_turns"
    max_tokens = "max_tokens"
    stalled = "stalled"
    max_seconds = "max_seconds"
    environment_failed = "environment_failed"


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One finished trajectory. `tokens`, `is_sampled` and `logprobs` have one entry a token; tool results and the
    prompt are not sampled. `version` is that of the weights that sampled it."""

    task: int
    sample: int
    num_calls_needed: int
    tokens: list[int]
    is_sampled: list[bool]
    logprobs: list[float]
    grade: Grade
    ending: Ending
    num_turns: int
    num_calls: int
    num_errors: int
    num_transient_errors: int
    version: int

    @property
    def reward(self) -> float:
        """1 for a right trajectory, 0 for any other."""
        return float(self.grade.success)

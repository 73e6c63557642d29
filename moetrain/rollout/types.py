"""Results of a rollout: trajectories as segments of tokens, with their grade and their ending."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moetrain.tasks.protocol import Grade


class Ending(StrEnum):
    """Why a trajectory ended. Only `answered` is graded. Other endings have reward 0, or are in `UNSCORED`."""

    answered = "answered"
    invalid_turn = "invalid_turn"
    turn_too_long = "turn_too_long"
    thought_too_long = "thought_too_long"
    max_turns = "max_turns"
    max_tokens = "max_tokens"
    max_sampled_tokens = "max_sampled_tokens"
    stalled = "stalled"
    max_seconds = "max_seconds"
    environment_failed = "environment_failed"
    prompt_too_long = "prompt_too_long"


UNSCORED = frozenset({Ending.max_seconds, Ending.environment_failed, Ending.prompt_too_long})
"""Endings that the model did not cause: such trajectories are excluded from rewards, baselines and updates."""
REPLACED = frozenset({Ending.max_seconds, Ending.environment_failed})
"""Endings after which a new attempt at the same task may succeed."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that the model read as one context. The lists have one entry per token.

    is_sampled: whether the model produced the token; prompts and tool results are given. logprobs: natural log of the
    probability with which the token was sampled; 0.0 for given tokens. versions: version of the weights that sampled
    the token, or that were loaded when it was given. temperature: sampling temperature; 0 is greedy, with the logprobs
    of temperature 1.
    """

    tokens: list[int]
    is_sampled: list[bool]
    logprobs: list[float]
    versions: list[int]
    temperature: float

    @property
    def num_sampled(self) -> int:
        """Tokens that the model produced."""
        return sum(self.is_sampled)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One finished trajectory. Its segments share its reward.

    num_calls_needed: tool calls of the known solution; None when the task does not provide it. num_cut_outputs: tool
    results that were cut to `rollout.max_output_tokens`. num_replaced: earlier attempts that this one replaces, because
    their environment failed or they reached `rollout.max_seconds`. progress: share of the solution before the first
    error; None where the environment does not measure it. has_erred: whether there was an error, as far as the
    environment says.
    """

    task: int
    sample: int
    num_calls_needed: int | None
    segments: Sequence[Segment]
    grade: Grade
    ending: Ending
    num_turns: int
    num_calls: int
    num_errors: int
    num_transient_errors: int
    num_cut_outputs: int = 0
    num_replaced: int = 0
    progress: float | None = None
    has_erred: bool = False

    @property
    def reward(self) -> float:
        """Reward of the grade; 0 when the trajectory ended before it was graded."""
        return self.grade.reward

    @property
    def is_scored(self) -> bool:
        """Whether the trajectory counts in rewards, baselines and updates."""
        return self.ending not in UNSCORED

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def num_sampled(self) -> int:
        """Tokens of all segments that the model produced."""
        return sum(segment.num_sampled for segment in self.segments)

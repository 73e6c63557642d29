"""What a rollout brings back: trajectories as segments of tokens, with their grade and how they ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moetrain.tasks.protocol import Grade


class Ending(StrEnum):
    """Why a trajectory ended. Only `answered` is graded; other endings of the agent's own making have reward 0."""

    answered = "answered"
    invalid_turn = "invalid_turn"
    turn_too_long = "turn_too_long"
    max_turns = "max_turns"
    max_tokens = "max_tokens"
    stalled = "stalled"
    max_seconds = "max_seconds"
    environment_failed = "environment_failed"
    prompt_too_long = "prompt_too_long"


UNSCORED = frozenset({Ending.max_seconds, Ending.environment_failed, Ending.prompt_too_long})
"""Endings that say nothing about the agent: such trajectories are left out of rewards, baselines and updates."""
REPLACED = frozenset({Ending.max_seconds, Ending.environment_failed})
"""Endings after which another attempt at the same task can go better."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of tokens that the model saw as one context. The lists have one entry per token.

    is_sampled: whether the model produced the token; prompts and tool results are given. logprobs: natural log of the
    probability that the token was sampled with; 0.0 for given tokens. versions: of the weights that sampled the token,
    or that were present when it was given. temperature: of the sampling; 0 is greedy, whose logprobs are those of
    temperature 1.
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

    num_calls_needed: tool calls of the shortest solution; None where the task family does not say. num_cut_outputs:
    tool results that were cut to `rollout.max_output_tokens`. num_replaced: earlier attempts that this one replaces,
    since the environment or the clock ended them.
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

    @property
    def reward(self) -> float:
        """What the grader gave; 0 where the agent ended before it could be graded."""
        return self.grade.reward

    @property
    def is_scored(self) -> bool:
        """Whether the reward says something about the agent."""
        return self.ending not in UNSCORED

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def num_sampled(self) -> int:
        """Tokens of all segments that the model produced."""
        return sum(segment.num_sampled for segment in self.segments)

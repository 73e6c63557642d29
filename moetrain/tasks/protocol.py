"""What a task family is: tasks, the environment a trajectory acts in, its grader, and demonstrations.

A plugin that offers these three protocols and calls `tasks.registry.register` is all that a new environment needs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from moetrain.chat.messages import Message
from moetrain.chat.tool_schema import ToolSpec


class Split(StrEnum):
    """train and held_out share no database, name or phrasing."""

    train = "train"
    held_out = "held_out"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a tool call brought back; `is_transient` marks a failure that was no fault of the caller."""

    text: str
    is_error: bool = False
    is_transient: bool = False


@dataclass(frozen=True, kw_only=True)
class Grade:
    """Verdict on a finished trajectory, from the environment's final state and the answer.

    reward: any finite number; what RL learns from. reason: one word. parts: what the reward is made of, by name, for
    the metrics. threshold: a reward from which on the task counts as solved.
    """

    reward: float
    reason: str
    parts: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a reward that is not a finite number: it would spoil the advantages of its whole group."""
        if not all(math.isfinite(value) for value in (self.reward, *self.parts.values())):
            raise ValueError(f"reward {self.reward} with parts {dict(self.parts)}: give finite numbers")

    @property
    def success(self) -> bool:
        """Whether the task is solved."""
        return self.reward >= self.threshold


class Environment(Protocol):
    """The world of one trajectory, freshly made; used once."""

    def call(self, name: str, arguments: str) -> Observation:
        """Carry out one tool call; a bad call is an observation too."""
        ...

    def grade(self, answer: str) -> Grade:
        """Judge the final state and the answer."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...


class Task(Protocol):
    """One question."""

    @property
    def num_calls(self) -> int:
        """Tool calls that the shortest right solution takes."""
        ...

    @property
    def prompt(self) -> list[Message]:
        """Messages that the model is given."""
        ...

    def environment(self, stream: int) -> Environment:
        """Return a fresh world; `stream` seeds what is random in it (tool failures)."""
        ...


class TaskFamily(Protocol):
    """Tasks by number, and a scripted expert."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """Tools that the environments offer."""
        ...

    def task(self, split: Split, index: int, *, num_calls: int | None = None) -> Task:
        """Return task `index` of `split`, a function of (seed, split, index); `num_calls` fixes its length."""
        ...

    def demonstrate(self, task: Task, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        """Return the scripted expert's conversation in a fresh world, and its grade."""
        ...

"""What a task family is: tasks, and the environment that a trajectory acts in and that grades it.

A plugin that offers `TaskFamily`, `Task` and `Environment` and calls `tasks.registry.register` is all that a new
environment needs. Demonstrations and lengths are optional.
"""

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

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


@dataclass(frozen=True, kw_only=True, init=False)
class Grade:
    """Verdict on a finished trajectory, from the environment's final state and the answer.

    reward: any finite number; what RL learns from. reason: one word. parts: what the reward is made of, by name, for
    the metrics. threshold: the task counts as solved when the reward is at least this.
    """

    reward: float
    reason: str
    parts: Mapping[str, float]
    threshold: float

    def __init__(
        self,
        *,
        reason: str,
        reward: float | None = None,
        success: bool | None = None,
        parts: Mapping[str, float] | None = None,
        threshold: float = 1.0,
    ) -> None:
        """Take a reward, or `success` for graders that only say yes (reward 1) or no (reward 0).

        Raises ValueError for both or neither, and for a number that is not finite: it would spoil the advantages of
        the whole group.
        """
        if (reward is None) == (success is None):
            raise ValueError(f"reward is {reward} and success is {success}: give one of the two")
        found = float(bool(success)) if reward is None else reward
        if not all(math.isfinite(value) for value in (found, *(parts or {}).values())):
            raise ValueError(f"reward {found} with parts {dict(parts or {})}: give finite numbers")
        for name, value in (("reward", found), ("reason", reason), ("parts", parts or {}), ("threshold", threshold)):
            object.__setattr__(self, name, value)

    @property
    def success(self) -> bool:
        """Whether the task is solved."""
        return self.reward >= self.threshold


class Environment(Protocol):
    """The world of one trajectory, freshly made; used once.

    Each method may be a coroutine function or a plain one. Plain ones run on a thread of their own, unless the task is
    an `InlineTask`. `ToolError` is what the caller did wrong: its text is the observation. `TransientError` is
    repeated. Any other exception is a failure of the environment, and the trajectory is not scored.
    """

    def call(self, name: str, arguments: str) -> Observation | Awaitable[Observation]:
        """Carry out one tool call; a bad call is an observation too."""
        ...

    def grade(self, answer: str) -> Grade | Awaitable[Grade]:
        """Judge the final state and the answer."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Free what the environment holds."""
        ...


class Task(Protocol):
    """One question."""

    @property
    def prompt(self) -> list[Message]:
        """Messages that the model is given."""
        ...

    def environment(self, stream: int) -> Environment | Awaitable[Environment]:
        """Return a fresh world; `stream` seeds what is random in it (tool failures)."""
        ...


class InlineTask:
    """Base class that marks tasks whose environments answer within a millisecond and wait for nothing.

    They are called in the thread that decodes, which saves two changes of threads per call. Deadlines do not hold for
    them, since nothing can interrupt them.
    """


@runtime_checkable
class KnowsCalls(Protocol):
    """A task that knows how long its shortest solution is; success is then also shown by length."""

    @property
    def num_calls(self) -> int:
        """Tool calls that the shortest right solution takes."""
        ...


class TaskFamily(Protocol):
    """Tasks by number. With `Demonstrates` it also has SFT data, with `MakesLengths` tasks of any length."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """Tools that the environments offer."""
        ...

    def task(self, split: Split, index: int) -> Task:
        """Return task `index` of `split`, a function of (seed, split, index)."""
        ...


@runtime_checkable
class Demonstrates(Protocol):
    """A task family with a scripted demonstrator, whose conversations are SFT data."""

    def demonstrate(self, task: Any, stream: int, *, perfect: bool = False) -> tuple[list[Message], Grade]:
        """Return the demonstrator's conversation in a fresh world, and its grade; `perfect` makes no mistakes."""
        ...


@runtime_checkable
class MakesLengths(Protocol):
    """A task family that makes tasks of a length that is asked for."""

    @property
    def trained_calls(self) -> tuple[int, int]:
        """Fewest and most calls of the tasks that `task` returns."""
        ...

    def task_of_length(self, split: Split, index: int, *, num_calls: int) -> Task:
        """Return task `index` among those of `split` that need `num_calls` calls."""
        ...

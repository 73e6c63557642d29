"""Protocols of a task family: tasks, and the environments that trajectories act in and that grade them.

To add an environment, a plugin implements `TaskFamily`, `Task` and `Environment`, and calls `tasks.registry.register`.
Demonstrations and tasks of a given length are optional.
"""

import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from moetrain.chat.messages import Message, valid_text
from moetrain.chat.tool_schema import ToolSpec

_LARGEST_REWARD = 1e9


class Split(StrEnum):
    """Splits of tasks. Those of the family `database` share no database, name or phrasing."""

    train = "train"
    held_out = "held_out"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Result of a tool call. is_error: the call failed. is_transient: it failed through no fault of the caller."""

    text: str
    is_error: bool = False
    is_transient: bool = False


@dataclass(frozen=True, kw_only=True, init=False)
class Grade:
    """Verdict on a finished trajectory, from the environment's final state and the answer.

    reward: any finite number; RL maximises it. reason: one word. parts: components of the reward by name, for the
    metrics. threshold: the task counts as solved when the reward is at least this.
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
        """Set the reward from `reward`, or from `success`: 1 if True, 0 if False.

        Numbers may be of any type that `float` takes, such as those of numpy. Raises ValueError for both or neither,
        and for a number that is not finite or beyond 1e9, because all advantages of its group would then be wrong.
        """
        if (reward is None) == (success is None):
            raise ValueError(f"reward is {reward} and success is {success}: give one of the two")
        values = {
            "reward": float(bool(success)) if reward is None else _number(reward, name="reward"),
            "reason": valid_text(reason, field="reason of a Grade"),
            "parts": {
                valid_text(part, field="name of a part of a Grade"): _number(value, name=f"part {part}")
                for part, value in (parts or {}).items()
            },
            "threshold": _number(threshold, name="threshold"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def success(self) -> bool:
        """Whether the task is solved."""
        return self.reward >= self.threshold


def _number(value: object, *, name: str) -> float:
    """Return a number of a Grade as a float. Raises ValueError for anything else."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is that of a tensor with several elements
        number = math.nan
    if not abs(number) <= _LARGEST_REWARD:
        raise ValueError(f"{name} of a Grade is {value!r}: give a number from -1e9 to 1e9")
    return number


def has_method(value: object, name: str) -> bool:
    """Return whether an object of a plugin has a method of this name."""
    try:
        return callable(getattr(value, name))
    except AttributeError:
        return False


class Environment(Protocol):
    """The environment of one trajectory. Each trajectory gets a new one.

    Each method may be a coroutine function or a plain function. Plain functions run on a separate thread, unless the
    task is an `InlineTask`. `call` raises `ToolError` for a mistake of the caller: its text becomes the observation.
    After `TransientError` the method is called again. Any other exception is a failure of the environment, and the
    trajectory is not scored.
    """

    def call(self, name: str, arguments: str) -> Observation | Awaitable[Observation]:
        """Carry out one tool call. A bad call returns an observation with `is_error`, or raises `ToolError`."""
        ...

    def grade(self, answer: str) -> Grade | Awaitable[Grade]:
        """Return the grade of the final state and the answer."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Release all resources."""
        ...


@runtime_checkable
class MeasuresProgress(Protocol):
    """An environment that knows how far a trajectory came. It is asked before `close`, however the trajectory ended."""

    def progress(self) -> float:
        """Return the share of the correct solution, from 0 to 1, that was carried out before the first error."""
        ...


@runtime_checkable
class NoticesErrors(Protocol):
    """An environment that knows whether a trajectory has deviated from the correct solution.

    It is asked together with progress.
    Without it, a trajectory that a limit ends counts as one without an error in the hazard of an evaluation.
    """

    def has_erred(self) -> bool:
        """Return whether something was done that is not part of the right solution."""
        ...


class Task(Protocol):
    """One question."""

    @property
    def prompt(self) -> list[Message]:
        """Messages that precede the model's first turn."""
        ...

    def environment(self, stream: int) -> Environment | Awaitable[Environment]:
        """Return a new environment; `stream` seeds its randomness, such as tool failures."""
        ...


class InlineTask:
    """Base class of tasks whose environments answer within a millisecond and never wait.

    Their environments run in the decoding thread, which saves two thread switches per call. Deadlines do not apply to
    them, because nothing can interrupt them.
    """


@runtime_checkable
class CountsCalls(Protocol):
    """A task whose solution has a known length. Success is then also reported by number of calls."""

    @property
    def num_calls(self) -> int:
        """Tool calls of the known solution, as a demonstrator carries it out; there may be shorter ones."""
        ...


class TaskFamily(Protocol):
    """Tasks by number. `Demonstrates` adds SFT data, `MakesLongerTasks` adds tasks of a given length."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """Tools of the environments."""
        ...

    def task(self, split: Split, index: int) -> Task:
        """Return task `index` of `split`, a function of (seed, split, index)."""
        ...


@runtime_checkable
class Demonstrates(Protocol):
    """A task family with a scripted demonstrator, whose conversations are SFT data.

    The method may be a coroutine function or a plain function.
    """

    def demonstrate(
        self, task: Any, stream: int, *, perfect: bool = False
    ) -> tuple[list[Message], Grade] | Awaitable[tuple[list[Message], Grade]]:
        """Return the demonstrator's conversation in a new environment, and its grade. perfect: without mistakes."""
        ...


@runtime_checkable
class MakesLongerTasks(Protocol):
    """A task family that makes tasks of a given length."""

    @property
    def trained_calls(self) -> tuple[int, int]:
        """Smallest and largest number of calls of the tasks that `task` returns."""
        ...

    def task_of_length(self, split: Split, index: int, *, num_calls: int) -> Task:
        """Return task `index` among those of `split` that require `num_calls` calls."""
        ...

"""Makes the tasks of a family. A plugin's code that fails or hangs costs the trajectories of its task, and no more."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from types import FrameType

from moetrain.chat.messages import Message
from moetrain.errors import ConfigError, described
from moetrain.rollout.process_state import ProcessState
from moetrain.rollout.world import EnvironmentFailure
from moetrain.tasks.protocol import CountsCalls, Environment, Task

_SHORTEST_S, _LONGEST_S = 1e-3, 1e9
"""Shortest and longest time of an alarm: the next one must not ring before it was dealt with, and the system has to be
able to represent it."""


class FailedTask:
    """Stands for a task that could not be made: its trajectories end because their environment failed."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @property
    def prompt(self) -> list[Message]:
        """Raise `EnvironmentFailure`."""
        raise EnvironmentFailure(self.reason)

    def environment(self, stream: int) -> Environment:
        """Raise `EnvironmentFailure`."""
        raise EnvironmentFailure(self.reason)


def make_task(make: Callable[[], Task], *, limit_s: float) -> Task:
    """Return the task that `make` returns, or a `FailedTask` when it raises anything but `ConfigError`.

    limit_s: seconds after which it is interrupted, in the main thread of a process; other threads have no limit. What
    it changes of the process is put back.
    """
    process = ProcessState()
    try:
        with _deadline(limit_s):
            return make()
    except (ConfigError, KeyboardInterrupt):
        raise
    except _OverdueError as error:
        return FailedTask(f"making the task: {error}")
    except BaseException as error:  # a plugin's code may raise anything
        return FailedTask(f"making the task: {described(error)}")
    finally:
        process.repair()  # environments of other tasks may be at work


class _OverdueError(BaseException):
    """The deadline passed. It is no `Exception`, which code that tries again would catch."""


@contextmanager
def _deadline(limit_s: float) -> Iterator[None]:
    """Raise _OverdueError in the block after `limit_s`, and again later if it is caught there.

    The alarm of the process is used, which interrupts Python code in the main thread. One that was set before rings
    after the block, when its time has passed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise _OverdueError(f"no result after {limit_s:g} s")

    first_s = min(max(limit_s, _SHORTEST_S), _LONGEST_S)
    handler, started = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    left_s, interval_s = signal.setitimer(signal.ITIMER_REAL, first_s, max(first_s, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - (time.monotonic() - started), 1e-6), interval_s)


def calls_needed(task: Task) -> int | None:
    """Return the number of calls that a task states, or None. Raises EnvironmentFailure if it is not a whole number."""
    try:
        value = task.num_calls if isinstance(task, CountsCalls) else None
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything
        raise EnvironmentFailure(f"num_calls of the task: {described(error)}") from error
    if value is None or (isinstance(value, Integral) and value >= 0):
        return None if value is None else int(value)
    raise EnvironmentFailure(f"num_calls of the task is {value!r}: return a whole number of 0 or more")

"""Asynchronous interface to the environment of one trajectory, with deadlines, retries and typed failures.

The methods of an environment may be coroutines or plain functions. Plain functions run on a thread of the environment,
so that a slow tool does not block other trajectories. The environments of an `InlineTask` run in the calling thread.
"""

import asyncio
import inspect
import logging
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from moetrain.errors import ConfigError, RolloutError, ToolError, TransientError, described, line_of, text_of
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.reactor import call_task, run_inline
from moetrain.tasks.protocol import (
    Environment,
    Grade,
    InlineTask,
    MeasuresProgress,
    NoticesErrors,
    Observation,
    Task,
    has_method,
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

_POLL_S = 0.005
_GRACE_S = 0.5
"""Time in which a coroutine that was cancelled at its deadline has to end."""
_BUSY = "the environment is still busy with a call that missed its deadline"


class EnvironmentFailure(RolloutError):  # noqa: N818  names what failed
    """An environment could not be made, called, graded or closed, through no fault of the model."""


class EnvironmentClient:
    """One environment. Await `open` first and `close` last, and one method at a time."""

    def __init__(self, task: Task, stream: int, *, config: RolloutConfig) -> None:
        """Prepare the environment that `task` makes from `stream`."""
        self._task = task
        self._stream = stream
        self._config = config
        self._thread = None if isinstance(task, InlineTask) else _Thread()
        self._late: asyncio.Future[Any] | None = None  # the last call, which may go on after its deadline
        self._closing: asyncio.Future[None] | None = None
        self._environment: Environment | None = None

    async def run(self, act: Callable[[], T], what: str) -> T:
        """Return the result of a plain function of the task. Raises EnvironmentFailure; `what` names it there."""
        return await self._act(act, what, limit_s=self._config.environment_deadline_s)

    async def open(self) -> None:
        """Make the environment."""
        limit = self._config.environment_deadline_s
        environment = await self._act(self._make, "creating the environment", limit_s=limit)
        if environment is None:
            raise EnvironmentFailure("creating the environment returned None")
        for name in ("call", "grade", "close"):
            if not has_method(environment, name):
                self._environment = None
                raise ConfigError(f"the environment {type(environment).__name__} has no method {name}: add it")
        self._environment = environment

    def _make(self) -> Environment | Awaitable[Environment]:
        """Make the environment, and keep it even if the deadline was missed, so that `close` closes it."""
        made: Environment | Awaitable[Environment] = self._task.environment(self._stream)
        if inspect.isawaitable(made):
            return self._made_later(made)
        self._environment = made
        return made

    async def _made_later(self, made: Awaitable[Environment]) -> Environment:
        self._environment = await made
        return self._environment

    async def call(self, name: str, arguments: str) -> Observation:
        """Return the observation of a tool call; also for a mistake of the caller or a missed deadline."""
        assert self._environment is not None
        call, limit = self._environment.call, self._config.call_deadline_s
        try:
            observation = await self._act(lambda: call(name, arguments), f"a call of {name[:40]}", limit_s=limit)
        except _DeadlineMissed:
            return Observation(text=f"error: timeout after {limit:g} s", is_error=True, is_transient=True)
        except EnvironmentFailure as error:
            if isinstance(error.__cause__, ToolError):
                return Observation(text=f"error: {text_of(error.__cause__)}", is_error=True)
            raise
        if not isinstance(observation, Observation):
            raise EnvironmentFailure(f"a call of {name[:40]} returned {type(observation).__name__}, not Observation")
        if not isinstance(observation.text, str):
            kind = type(observation.text).__name__
            raise EnvironmentFailure(f"a call of {name[:40]} returned an Observation whose text is {kind}, not str")
        for flag in (observation.is_error, observation.is_transient):
            if not isinstance(flag, bool):
                raise EnvironmentFailure(
                    f"a call of {name[:40]} returned an Observation with {flag!r}: give True or False"
                )
        return observation

    async def grade(self, answer: str) -> Grade:
        """Return the grade of the final state and the answer."""
        assert self._environment is not None
        grade, limit = self._environment.grade, self._config.environment_deadline_s
        verdict = await self._act(lambda: grade(answer), "grading", limit_s=limit)
        if not isinstance(verdict, Grade):
            raise EnvironmentFailure(f"grading returned {type(verdict).__name__}, not Grade")
        return verdict

    async def progress(self) -> float | None:
        """Return how far the trajectory came, from 0 to 1; None where the environment does not measure it."""
        value = await self._asked("progress", MeasuresProgress)
        if value is None:
            return None
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = -1.0
        if not 0 <= share <= 1:
            raise EnvironmentFailure(f"progress returned {value!r}: return a number from 0 to 1")
        return share

    async def has_erred(self) -> bool:
        """Return whether the trajectory left the right solution; False where the environment does not know."""
        value = await self._asked("has_erred", NoticesErrors)
        if value is not None and not isinstance(value, bool | np.bool_):
            raise EnvironmentFailure(f"has_erred returned {type(value).__name__}: return True or False")
        return bool(value)

    async def _asked(self, name: str, protocol: type) -> Any:
        """Return what an optional method returns; None if the environment lacks it."""
        try:
            method = getattr(self._environment, name) if isinstance(self._environment, protocol) else None
        except (Exception, SystemExit) as error:  # a property of a plugin may raise anything
            raise EnvironmentFailure(f"{name}: {described(error)}") from error
        return await self._act(method, name, limit_s=self._config.call_deadline_s) if callable(method) else None

    async def close(self) -> None:
        """Close the environment. Does nothing when it was never made or is already closed.

        An environment that is busy with a call that missed its deadline is closed when the call returns.
        """
        if self._thread is not None and self._thread.is_busy:
            self._thread.submit(self._close_in_thread)
            self._thread.stop()
            return
        if self._late is not None and not self._late.done():
            self._late.add_done_callback(self._close_at_last)
            return
        try:
            if self._environment is not None:
                await self._close(self._environment)
        finally:
            if self._thread is not None and self._environment is None:  # else it was interrupted, and is closed again
                self._thread.stop()

    async def _close(self, environment: Environment) -> None:
        def close() -> Awaitable[None] | None:
            self._environment = None
            return environment.close()

        try:
            await self._act(close, "closing the environment", limit_s=self._config.environment_deadline_s)
        except asyncio.CancelledError:
            is_interrupted = self._late is None or self._late.cancelled()
            if inspect.iscoroutinefunction(environment.close) and is_interrupted:  # a plain function is not
                self._environment = environment
            raise

    @property
    def _is_busy(self) -> bool:
        """Whether a call that missed its deadline has not ended."""
        assert self._thread is not None
        return self._thread.is_busy or (self._late is not None and not self._late.done())

    def _close_at_last(self, late: asyncio.Future[Any]) -> None:
        self._closing = call_task(self.close())  # the event loop itself keeps no reference
        self._closing.add_done_callback(_log_failure)

    def _close_in_thread(self) -> None:
        environment, self._environment = self._environment, None
        if environment is not None and inspect.iscoroutine(closing := environment.close()):
            asyncio.run(closing)  # the event loop of the collection may have ended

    async def _act(self, act: Callable[[], T | Awaitable[T]], what: str, *, limit_s: float) -> T:
        """Return the result of `act`, awaited if necessary; call it again after a `TransientError`."""
        for attempt in range(self._config.max_retries + 1):
            try:
                return await self._once(act, what, limit_s=limit_s)
            except TransientError as error:
                if attempt == self._config.max_retries:
                    raise EnvironmentFailure(f"{what}: {line_of(error)} ({attempt + 1} attempts)") from error
            except _DeadlineMissed as error:
                raise _DeadlineMissed(f"{what}: {error}") from error
            except EnvironmentFailure:
                raise
            except BaseException as error:  # a plugin's code may raise anything
                if isinstance(error, KeyboardInterrupt | GeneratorExit) or _is_cancelled():
                    raise
                raise EnvironmentFailure(f"{what}: {described(error)}") from error
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, act: Callable[[], T | Awaitable[T]], what: str, *, limit_s: float) -> T:
        if self._thread is None:  # no deadline, because nothing can interrupt a plain function in this thread
            result = act()
            return await result if inspect.isawaitable(result) else result
        try:
            async with asyncio.timeout(limit_s):
                while self._is_busy:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise EnvironmentFailure(f"{what}: {_BUSY}") from error
        started = time.monotonic()
        result = await self._in_time(asyncio.wrap_future(self._thread.submit(act)), started=started, limit_s=limit_s)
        if not inspect.isawaitable(result):
            return result
        return await self._in_time(call_task(result), started=started, limit_s=limit_s)

    async def _in_time(self, future: asyncio.Future[T], *, started: float, limit_s: float) -> T:
        """Return the result of a future. At the deadline it is cancelled; what ignores that is left to itself."""
        future.add_done_callback(_retrieve)
        self._late = future
        try:
            await asyncio.wait({future}, timeout=max(started + limit_s - time.monotonic(), 0.0))
        finally:
            if is_late := not future.done():
                future.cancel()
                await asyncio.wait({future}, timeout=_GRACE_S)
        if is_late:
            raise _DeadlineMissed(f"no result after {limit_s:g} s")
        try:
            return future.result()
        except GeneratorExit as error:  # of the plugin, because nothing is awaited here
            raise RuntimeError(described(error)) from error


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Read the error of a future that nobody awaits, so that asyncio does not log it."""
    if not future.cancelled():
        future.exception()


def _log_failure(closing: asyncio.Future[None]) -> None:
    """Log why an environment was not closed, because nobody awaits it."""
    if not closing.cancelled() and (error := closing.exception()) is not None:
        _log.warning("%s", error)


def _is_cancelled() -> bool:
    """Return whether the present asyncio task was asked to end, and not only one that it awaits."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop: `run_inline`
        return False
    return task is not None and task.cancelling() > 0


class _DeadlineMissed(EnvironmentFailure):
    """A deadline was missed."""


class _Thread:
    """A daemon thread that runs jobs in order. A `ThreadPoolExecutor` would wait for a stuck tool at exit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._process = os.getpid()
        self.is_busy = False
        threading.Thread(target=self._run, daemon=True, name="environment").start()

    def submit(self, act: Callable[[], T]) -> Future[T]:
        """Queue `act` and return the future of its result."""
        future: Future[T] = Future()
        self.is_busy = True
        self._jobs.put((act, future))
        return future

    def stop(self) -> None:
        """End the thread after its queued jobs."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            act, future = job
            try:
                result, error = act(), None
            except BaseException as caught:  # it is raised where the result is awaited
                result, error = None, caught
            if os.getpid() != self._process:  # a process that the plugin forked ends where its function does
                os._exit(0 if error is None else 1)
            self.is_busy = False
            if not future.set_running_or_notify_cancel():
                continue  # the caller no longer waits
            if error is None:
                future.set_result(result)
            elif isinstance(error, Exception) and not isinstance(error, StopIteration):
                future.set_exception(error)
            else:  # SystemExit and KeyboardInterrupt would end the event loop; its futures refuse StopIteration
                future.set_exception(RuntimeError(described(error)))


def grade_in_new_environment(task: Task, stream: int, *, answer: str, config: RolloutConfig) -> Grade:
    """Return the grade of `answer` in a new environment without any call."""

    async def act() -> Grade:
        world = EnvironmentClient(task, stream, config=config)
        try:
            await world.open()
            return await world.grade(answer)
        finally:
            await world.close()

    return run_inline(act()) if isinstance(task, InlineTask) else asyncio.run(act())

"""Asynchronous interface to the environment of one trajectory, with deadlines, retries and typed failures.

The methods of an environment may be coroutines or plain functions. Plain functions run on a thread of the environment,
so that a slow tool does not block other trajectories. The environments of an `InlineTask` run in the calling thread.
"""

import asyncio
import inspect
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from numbers import Integral
from typing import Any, Self, TypeVar

from moetrain.chat.messages import Message
from moetrain.errors import ConfigError, RolloutError, ToolError, TransientError, described, text_of
from moetrain.rollout.config import RolloutConfig
from moetrain.tasks.protocol import (
    CountsCalls,
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

_POLL_S = 0.005
_BUSY = "the environment is still busy with a call that missed its deadline"


class EnvironmentFailure(RolloutError):  # noqa: N818  names what failed
    """An environment could not be made, called, graded or closed, through no fault of the model."""


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


def make_task(make: Callable[[], Task]) -> Task:
    """Return the task that `make` returns, or a `FailedTask` when it raises anything but `ConfigError`."""
    try:
        return make()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything
        return FailedTask(f"making the task: {described(error)}")


def calls_needed(task: Task) -> int | None:
    """Return the number of calls that a task states, or None. Raises EnvironmentFailure if it is no whole number."""
    try:
        value = task.num_calls if isinstance(task, CountsCalls) else None
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything
        raise EnvironmentFailure(f"num_calls of the task: {described(error)}") from error
    if value is None or (isinstance(value, Integral) and value >= 0):
        return None if value is None else int(value)
    raise EnvironmentFailure(f"num_calls of the task is {value!r}: return a whole number of 0 or more")


class EnvironmentClient:
    """One environment. Await `open` first and `close` last, and one method at a time."""

    def __init__(self, task: Task, stream: int, *, config: RolloutConfig) -> None:
        """Prepare the environment that `task` makes from `stream`."""
        self._task = task
        self._stream = stream
        self._config = config
        self._thread = None if isinstance(task, InlineTask) else _Thread()
        self._environment: Environment | None = None

    async def open(self) -> None:
        """Make the environment."""
        limit = self._config.environment_deadline_s
        environment = await self._act(self._make, "making it", limit_s=limit)
        for name in ("call", "grade", "close"):
            if not has_method(environment, name):
                self._environment = None
                raise ConfigError(f"the environment {type(environment).__name__} has no method {name}: add it")
        self._environment = environment

    def _make(self) -> Environment | Awaitable[Environment]:
        """Make the environment, and keep it even if the deadline was missed, so that `close` closes it."""
        made: Environment | Awaitable[Environment] = self._task.environment(self._stream)
        if not inspect.isawaitable(made):
            self._environment = made
        return made

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
        if value not in (None, True, False):
            raise EnvironmentFailure(f"has_erred returned {value!r}: return True or False")
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

        An environment that is busy with a call that missed its deadline is closed by its thread when the call returns.
        """
        try:
            if self._thread is not None and self._thread.is_busy:
                self._thread.submit(self._close_in_thread)
                self._thread.stop()
                return
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
            await self._act(close, "closing it", limit_s=self._config.environment_deadline_s)
        except asyncio.CancelledError:
            if inspect.iscoroutinefunction(environment.close):  # it was interrupted; a plain function was not
                self._environment = environment
            raise

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
                    raise EnvironmentFailure(f"{what}: {text_of(error)} ({attempt + 1} attempts)") from error
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
                while self._thread.is_busy:  # with a call that missed its deadline
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise EnvironmentFailure(f"{what}: {_BUSY}") from error
        try:
            async with asyncio.timeout(limit_s) as deadline:
                result = await asyncio.wrap_future(self._thread.submit(act))
                return await result if inspect.isawaitable(result) else result
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise _DeadlineMissed(f"{what}: no result after {limit_s:g} s") from error


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
            self.is_busy = False
            if not future.set_running_or_notify_cancel():
                continue  # the caller no longer waits
            if error is None:
                future.set_result(result)
            elif isinstance(error, Exception) and not isinstance(error, StopIteration):
                future.set_exception(error)
            else:  # SystemExit and KeyboardInterrupt would end the event loop; its futures refuse StopIteration
                future.set_exception(RuntimeError(described(error)))


class Reactor:
    """Runs coroutines on an event loop in a separate thread, so that the calling thread can decode.

    `start` takes an object with each coroutine, and `finished` returns the objects of completed coroutines. The thread
    starts with the first coroutine.
    """

    def __init__(self, *, end_limit_s: float) -> None:
        """Create the reactor without starting its thread. end_limit_s: longest time that ending it takes."""
        self._end_limit_s = end_limit_s
        self._end: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pending: set[Future[None]] = set()
        self._done: queue.SimpleQueue[tuple[Any, Future[None]]] = queue.SimpleQueue()
        self._num_pending = 0

    def __enter__(self) -> Self:
        """Return this reactor."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the coroutines that have not completed, and end the event loop and its thread."""
        if self._loop is None or self._thread is None:
            return
        wait(self._pending, timeout=self._time_left())
        self.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._time_left())
        if not self._thread.is_alive():
            self._loop.close()

    def cancel(self) -> None:
        """Cancel the coroutines that have not completed, and return when they have ended."""
        if self._loop is not None and self._pending:
            ending = asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop)
            wait([ending], timeout=self._time_left())

    def _time_left(self) -> float:
        """Return the seconds that are left for ending; the first call starts the clock."""
        if self._end is None:
            self._end = time.monotonic() + self._end_limit_s
        return max(self._end - time.monotonic(), 0.0)

    def start(self, coroutine: Coroutine[Any, Any, None], *, tag: object) -> None:
        """Start a coroutine on the event loop. tag: object that `finished` returns when it has completed."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="environments")
            self._thread.start()
        self._num_pending += 1
        future = asyncio.run_coroutine_threadsafe(_contained(coroutine), self._loop)
        self._pending.add(future)
        future.add_done_callback(lambda done: self._done.put((tag, done)))

    def finished(self, *, wait_for_one: bool) -> list[Any]:
        """Return the objects of completed coroutines, and raise what a coroutine raised.

        wait_for_one: if none has completed and some are pending, wait for the first.
        """
        completed: list[Any] = []
        while self._num_pending and (not self._done.empty() or (wait_for_one and not completed)):
            tag, future = self._done.get()
            self._num_pending -= 1
            self._pending.discard(future)
            future.result()
            completed.append(tag)
        return completed


async def _contained(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await a coroutine, and raise RolloutError for what would end the event loop."""
    try:
        await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RolloutError(f"a plugin raised {described(error)}") from error


async def _cancel_others() -> None:
    """Cancel all other tasks of the running event loop, and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def run_inline(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends and return its result. Raises RolloutError when it suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RolloutError("the environment of an InlineTask awaits something: do not derive its task from InlineTask")


def grade_in_new_environment(task: Task, stream: int, *, answer: str) -> Grade:
    """Return the grade of `answer` in a new environment without any call."""

    async def act() -> Grade:
        world = EnvironmentClient(task, stream, config=RolloutConfig())
        try:
            await world.open()
            return await world.grade(answer)
        finally:
            await world.close()

    return run_inline(act()) if isinstance(task, InlineTask) else asyncio.run(act())

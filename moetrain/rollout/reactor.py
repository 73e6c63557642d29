"""Runs the coroutines of environments on an event loop in a separate thread, while the calling thread decodes."""

import asyncio
import inspect
import logging
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

from moetrain.errors import RolloutError, described

T = TypeVar("T")

_log = logging.getLogger(__name__)

_ENDED = "a task of an environment ended the event loop of all environments: do not raise SystemExit there"
_CANCELLED = "it was cancelled by an environment, such as by one that cancels all tasks of the event loop"
_CALL = "call of an environment"
"""Name of the tasks that `call_task` starts."""
_CALLERS: WeakKeyDictionary[asyncio.Task[Any], asyncio.Task[Any]] = WeakKeyDictionary()
"""The tasks that started these, by `call_task`."""
_LOOK_S = 1.0
"""Time between two looks at an event loop that is waited for."""


class Reactor:
    """Runs coroutines on an event loop in a separate thread.

    `start` takes an object with each coroutine, and `finished` returns the objects of completed coroutines. The thread
    starts with the first coroutine.

    A coroutine that computes or waits without `await` blocks the event loop and so all others. After `stuck_s` seconds
    the loop is abandoned: `on_stuck` is called with each unfinished object, the reason, and whether the coroutine of
    the object is the cause (also where the cause is not known). `finished` returns these
    objects, and the next coroutine starts a new loop. If the abandoned loop continues later, it cancels its coroutines,
    runs those that `on_stuck` returned, and ends. A loop that a plugin ended is abandoned, too.
    """

    def __init__(
        self,
        *,
        end_limit_s: float,
        stuck_s: float,
        on_stuck: Callable[[Any, str, bool], Callable[[], Coroutine[Any, Any, None]]],
    ) -> None:
        """Create the reactor without starting its thread. end_limit_s: longest time that ending it takes."""
        self._end_limit_s = end_limit_s
        self._stuck_s = stuck_s
        self._on_stuck = on_stuck
        self._end: float | None = None
        self._loop: _Loop | None = None
        self._pending: dict[Future[None], Any] = {}
        self._abandoned: list[Any] = []
        self._done: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        """Return this reactor."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what has not completed, and end the event loop and its thread."""
        if self._loop is not None and self._loop.is_alive:
            wait(self._pending, timeout=self._time_left())
            self.cancel()
            wait([self._loop.start(_settle(self._time_left()))], timeout=self._time_left() + _LOOK_S)
            self._loop.end(self._time_left())

    def cancel(self) -> None:
        """Cancel the coroutines that have not completed, and return when they have ended."""
        if self._loop is not None and self._loop.is_alive and self._pending:
            wait([self._loop.start(self._loop.cancel(self._time_left()))], timeout=self._time_left())

    def _time_left(self) -> float:
        """Return the seconds that are left for ending; the first call starts the clock."""
        if self._end is None:
            self._end = time.monotonic() + self._end_limit_s
        return max(self._end - time.monotonic(), 0.0)

    def start(self, coroutine: Coroutine[Any, Any, None], *, tag: object) -> None:
        """Start a coroutine on the event loop. tag: object that `finished` returns when it has completed."""
        if self._loop is not None and not self._loop.is_alive:
            self._abandon(_ENDED)
        if self._loop is None:
            self._loop = _Loop()
        future = self._loop.start(self._loop.tracked(coroutine, tag=tag))
        self._pending[future] = tag
        future.add_done_callback(self._done.put)

    def finished(self, *, wait_for_one: bool) -> list[Any]:
        """Return the objects of completed coroutines, and raise what a coroutine raised.

        wait_for_one: if none has completed and some are pending, wait for the first.
        """
        completed, self._abandoned = self._abandoned, []
        while self._pending and (not self._done.empty() or (wait_for_one and not completed)):
            try:
                future = self._done.get(timeout=min(_LOOK_S, self._stuck_s))
            except queue.Empty:
                if reason := self._blocked():
                    self._abandon(reason)
                    completed, self._abandoned = completed + self._abandoned, []
                continue
            if future in self._pending:  # else its loop was abandoned
                completed.append(tag := self._pending.pop(future))
                if future.cancelled():
                    self._leave(tag)
                else:
                    future.result()
        return completed

    def _leave(self, tag: object) -> None:
        """Leave a coroutine that a plugin cancelled, and close what it had."""
        ending = self._on_stuck(tag, _CANCELLED, True)
        if self._loop is not None and self._loop.is_alive:
            self._loop.start(contained(ending()))

    def _blocked(self) -> str:
        """Return what blocks the event loop, where it has not run for `stuck_s`; else an empty text."""
        assert self._loop is not None
        if not self._loop.is_alive:
            return _ENDED
        if self._loop.seconds_blocked() < self._stuck_s:
            return ""
        return (
            f"{self._loop.place()} has blocked the event loop of all environments for {self._stuck_s:g} s: use await "
            "there, or make the method a plain function, which runs in a thread"
        )

    def _abandon(self, reason: str) -> None:
        """Leave the event loop with its coroutines."""
        assert self._loop is not None
        _log.warning("%s", reason)
        tags, loop = [*self._pending.values()], self._loop
        cause = loop.running()
        is_known = any(tag is cause for tag in tags)
        self._abandoned += tags
        self._pending, self._loop = {}, None
        endings = [self._on_stuck(tag, reason, tag is cause or not is_known) for tag in tags]

        async def end(loop: _Loop) -> None:
            await loop.cancel(self._end_limit_s)
            await asyncio.gather(*(contained(ending()) for ending in endings), return_exceptions=True)
            await _settle(self._end_limit_s)
            asyncio.get_running_loop().stop()

        loop = loop if loop.is_alive else _Loop()
        loop.start(end(loop))


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[asyncio.Task[Any], Any] = {}  # with the object of each
        self._asked = 0.0
        self._answered = threading.Event()
        self._answered.set()
        self._thread = threading.Thread(target=self._run, daemon=True, name="environments")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            _log.warning("a task of an environment raised %s", described(error))
        finally:
            self._loop.close()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs. A task of a plugin can end it by SystemExit."""
        return self._thread.is_alive()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Run a coroutine, and return the future of its end."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def tracked(self, coroutine: Coroutine[Any, Any, None], *, tag: object) -> None:
        """Await a coroutine so that `cancel` can cancel it. Raises RolloutError for what would end the event loop."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = tag
        try:
            await contained(coroutine)
        finally:
            self._tasks.pop(task, None)

    async def cancel(self, limit_s: float) -> None:
        """Cancel the tracked coroutines, and wait until they have ended. What environments do besides goes on."""
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=limit_s)

    def running(self) -> Any:
        """Return the object of the coroutine that runs now; None where it is none, or the task of a plugin."""
        task = asyncio.current_task(self._loop)
        while task is not None and task in _CALLERS:
            task = _CALLERS[task]
        return None if task is None else self._tasks.get(task)

    def seconds_blocked(self) -> float:
        """Return for how long the loop has not run; 0 at the first call and after each sign of life."""
        if self._answered.is_set():
            self._answered.clear()
            self._asked = time.monotonic()
            self._loop.call_soon_threadsafe(self._answered.set)
        return time.monotonic() - self._asked

    def place(self) -> str:
        """Return the function in which the thread is, the innermost coroutine if there is one, with file and line."""
        innermost = frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None and (not frame.f_code.co_flags & inspect.CO_COROUTINE or _is_own(frame)):
            frame = frame.f_back
        return _text_of(frame or innermost)

    def end(self, limit_s: float) -> None:
        """Stop the loop, and wait for its thread for at most `limit_s` seconds."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(limit_s)


def _is_own(frame: FrameType) -> bool:
    """Return whether a frame is one of this package, which calls the plugin."""
    return Path(__file__).parent in Path(frame.f_code.co_filename).parents


def _text_of(frame: FrameType | None) -> str:
    if frame is None:
        return "a plugin"
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"


async def contained(awaitable: Awaitable[T]) -> T:
    """Return what `awaitable` returns, and raise RolloutError for what would end the event loop."""
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:
        raise RolloutError(f"a plugin raised {described(error)}") from error


def call_task(awaitable: Awaitable[T]) -> asyncio.Task[T]:
    """Start a task for a call of an environment, or its end; the end of a `Reactor` waits for it."""
    task = asyncio.create_task(contained(awaitable), name=_CALL)
    if (caller := asyncio.current_task()) is not None:
        _CALLERS[task] = caller
    return task


def _others() -> set[asyncio.Task[Any]]:
    """Return the tasks of this event loop that have not ended, without the present one."""
    return asyncio.all_tasks() - {asyncio.current_task()}


async def _settle(limit_s: float) -> None:
    """Wait for calls of environments that end after their deadline, and cancel what else runs on the event loop."""
    end, left = time.monotonic() + limit_s, set[asyncio.Task[Any]]()
    while not left and (calls := {task for task in _others() if task.get_name() == _CALL}):
        _, left = await asyncio.wait(calls, timeout=max(end - time.monotonic(), 0.0))
        await asyncio.sleep(0)  # the end of a call may start another one, which closes its environment
    if left:
        _log.warning("%d calls of environments did not end within %.3g s and are left behind", len(left), limit_s)
    if rest := {task for task in _others() - left if task.cancel()}:  # tasks that plugins started
        await asyncio.wait(rest, timeout=limit_s)


def run_inline(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends and return its result. Raises RolloutError when it suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RolloutError("the environment of an InlineTask awaits something: do not derive its task from InlineTask")

"""Collecting trajectories: failures of environments, slow tools, deadlines, caps."""

import asyncio
import io
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.chat.messages import Message, Role
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ToolError, TransientError
from moetrain.rl.metrics import rollout_metrics
from moetrain.rollout.collect import Collector, RolloutRequest
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.making import make_task
from moetrain.rollout.reactor import Reactor
from moetrain.rollout.types import Ending
from moetrain.rollout.world import EnvironmentClient
from moetrain.tasks.protocol import Grade, InlineTask, Observation
from tests.cli.command import ROOT
from tests.rollout.scripted import (
    ANSWER,
    CALL,
    ScriptedGeneration,
    SlowWorld,
    World,
    WorldFamily,
    WorldTask,
    play,
    script_of,
    words_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return words_tokenizer()


class InlineWorldTask(WorldTask, InlineTask):
    """The same, called in the thread that decodes."""


class AsyncWorld(World):
    """The same, as coroutines."""

    async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
        await asyncio.sleep(0.2)
        return Observation(text="a stone")

    async def grade(self, answer: str) -> Grade:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().grade(answer)

    async def close(self) -> None:  # type: ignore[override]
        self.is_closed = True


class Unmade(World):
    """Cannot be made."""

    def __init__(self, stream: int) -> None:
        raise ConnectionError("sandbox: no free container")


class Uncalled(World):
    """Fails when it is called."""

    def call(self, name: str, arguments: str) -> Observation:
        raise KeyError(name)


class Ungraded(World):
    """Has a judge that times out."""

    def grade(self, answer: str) -> Grade:
        raise TimeoutError("judge")


class Misgraded(World):
    """Raises in its grader what is meant for mistakes of the model."""

    def grade(self, answer: str) -> Grade:
        raise ToolError("no such file")


class Unclosed(World):
    """Fails when it is closed."""

    def close(self) -> None:
        raise ConnectionError("sandbox: container is gone")


class Exiting(World):
    """Ends the process, it thinks."""

    def call(self, name: str, arguments: str) -> Observation:
        sys.exit(1)


class Searching(World):
    """Looks for what is not there."""

    def call(self, name: str, arguments: str) -> Observation:
        return next(Observation(text=each) for each in ("stone", "sand") if each == name)


class Lost(World):
    """Awaits a connection that the other side has closed."""

    async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
        raise asyncio.CancelledError("connection closed")


class Panic(BaseException):
    """As of a library that is written in Rust."""


class Panicking(World):
    """Has a library that panics."""

    async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
        raise Panic("index out of bounds")


class Interrupting(World):
    """Raises what a terminal raises."""

    async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
        raise KeyboardInterrupt


class Generating(World):
    """Raises what ends generators."""

    async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
        await asyncio.sleep(0)
        raise GeneratorExit("done")


class UnspeakableError(Exception):
    """Fails while its text is made."""

    def __str__(self) -> str:
        raise ValueError("no text")


class Speechless(World):
    """Raises an error that cannot be shown."""

    def call(self, name: str, arguments: str) -> Observation:
        raise UnspeakableError


class PromptThatExits(WorldTask):
    """Ends the process while its prompt is made."""

    @property
    def prompt(self) -> list[Message]:
        """Exit."""
        sys.exit(3)


class Mistyped(World):
    """Returns text where an observation is asked for."""

    def call(self, name: str, arguments: str) -> Observation:
        return "a stone"  # type: ignore[return-value]


class Counting(World):
    """Returns a number where text is asked for."""

    def call(self, name: str, arguments: str) -> Observation:
        return Observation(text=5)  # type: ignore[arg-type]


class Saying(World):
    """Says in words whether a call failed."""

    def call(self, name: str, arguments: str) -> Observation:
        return Observation(text="a stone", is_error="no")  # type: ignore[arg-type]


class Infinite(World):
    """Gives a reward whose group would have no finite advantage."""

    def grade(self, answer: str) -> Grade:
        return Grade(reward=1e300, reason="right")


class Explaining(World):
    """Gives its reasons as a list."""

    def grade(self, answer: str) -> Grade:
        return Grade(reward=1.0, reason=["right"])  # type: ignore[arg-type]


def test_a_task_that_cannot_be_made_is_not_scored_and_ends_nothing_else(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> WorldTask:
        raise FileNotFoundError("question 1")

    good, broken = play([WorldTask(make=World), make_task(fail, limit_s=60)], tokenizer, max_replacements=1)
    assert good.is_scored and good.reward == 1.0
    assert broken.ending is Ending.environment_failed and not broken.is_scored
    assert "making the task: FileNotFoundError: question 1" in caplog.text


@pytest.mark.parametrize("catches", [False, True])
def test_a_task_that_is_never_made_is_given_up_at_the_deadline(
    catches: bool, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    def hang() -> WorldTask:
        while catches and time.monotonic() < started + 0.5:  # as code that tries a connection again
            try:
                time.sleep(60)
            except Exception:
                continue
        time.sleep(60)
        raise AssertionError

    handler, (left_s, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    started = time.monotonic()
    task = make_task(hang, limit_s=0.2)
    assert time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGALRM) is handler
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (left_s > 0)
    good, broken = play([WorldTask(make=World), task], tokenizer, max_replacements=0)
    assert good.is_scored and broken.ending is Ending.environment_failed
    assert "making the task: no result after 0.2 s" in caplog.text


def test_the_deadline_of_a_task_leaves_other_threads_and_an_alarm_that_was_set_alone() -> None:
    def slow() -> WorldTask:
        time.sleep(0.2)
        return WorldTask(make=World)

    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(make_task, slow, limit_s=0.05).result(), WorldTask)
    rang: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0.1)  # those of the test's own limit of time
    try:
        assert isinstance(make_task(slow, limit_s=5), WorldTask)
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left_s)
    assert rang == [signal.SIGALRM]


def test_a_prompt_that_exits_ends_nothing_else(tokenizer: Tokenizer) -> None:
    good, broken = play([WorldTask(make=World), PromptThatExits(make=World)], tokenizer, max_replacements=0)
    assert good.is_scored and broken.ending is Ending.environment_failed
    assert broken.grade.reason == "making the prompt: SystemExit: 3"


class WithoutPrompt(WorldTask):
    """Has nothing to say to the model."""

    @property
    def prompt(self) -> list[Message]:
        """Return no message."""
        return []


def test_an_empty_prompt_is_a_failure_of_the_environment(tokenizer: Tokenizer) -> None:
    good, broken = play([WorldTask(make=World), WithoutPrompt(make=World)], tokenizer, max_replacements=0)
    assert good.is_scored and broken.ending is Ending.environment_failed
    assert broken.grade.reason == "the prompt of the task is empty: return at least one message"


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (Searching, "a call of look: RuntimeError: StopIteration"),
        (Lost, "a call of look: CancelledError: connection closed"),
        (Panicking, "a call of look: Panic: index out of bounds"),
        (Interrupting, "a call of look: RolloutError: a plugin raised KeyboardInterrupt"),
        (Generating, "a call of look: RuntimeError: GeneratorExit: done"),
        (Speechless, "a call of look: UnspeakableError: its message cannot be formatted"),
    ],
)
def test_a_tool_that_raises_what_ends_coroutines_fails_at_once(
    tokenizer: Tokenizer, world: type[World], reason: str
) -> None:
    started = time.perf_counter()
    good, broken = play([WorldTask(make=World), WorldTask(make=world)], tokenizer, max_replacements=0)
    assert time.perf_counter() - started < 10  # and not after its deadline
    assert good.is_scored and broken.ending is Ending.environment_failed
    assert broken.grade.reason.startswith(reason)


@pytest.mark.parametrize("kind", [WorldTask, InlineWorldTask])
@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (Unmade, "creating the environment: ConnectionError: sandbox: no free container"),
        (Uncalled, "a call of look: KeyError"),
        (Ungraded, "grading: TimeoutError: judge"),
        (Misgraded, "grading: ToolError: no such file"),
        (Unclosed, "closing the environment: ConnectionError"),
        (Exiting, "a call of look: "),
        (Mistyped, "a call of look returned str, not Observation"),
        (Counting, "a call of look returned an Observation whose text is int, not str"),
        (Saying, "a call of look returned an Observation with 'no': give True or False"),
        (Infinite, "grading: ValueError: reward of a Grade is 1e+300: give a number from -1e9 to 1e9"),
        (Explaining, "grading: DataError: reason of a Grade is list"),
    ],
)
def test_an_environment_that_fails_is_not_scored_and_ends_nothing_else(
    tokenizer: Tokenizer, kind: type[WorldTask], world: type[World], reason: str
) -> None:
    good, broken = play([kind(make=World), kind(make=world)], tokenizer, max_replacements=1)
    assert good.ending is Ending.answered and good.is_scored and good.reward == 1.0 and good.num_replaced == 0
    assert broken.ending is Ending.environment_failed and not broken.is_scored and broken.num_replaced == 1
    assert broken.grade.reason.startswith(reason)
    metrics = rollout_metrics([[good, broken]])
    assert metrics["reward"] == 1.0 and metrics["unscored"] == metrics["ending/environment_failed"] == 0.5
    assert metrics["replaced"] == 0.5


def test_a_trajectory_that_the_environment_ended_is_replaced_by_one_with_other_streams(tokenizer: Tokenizer) -> None:
    streams: list[int] = []

    class FailsOnce(World):
        def __init__(self, stream: int) -> None:
            super().__init__(stream)
            streams.append(stream)

        def grade(self, answer: str) -> Grade:
            if len(streams) == 1:
                raise TimeoutError("judge")
            return super().grade(answer)

    (trajectory,) = play([WorldTask(make=FailsOnce)], tokenizer)
    assert trajectory.is_scored and trajectory.num_replaced == 1
    assert len(set(streams)) == 2


def test_every_environment_that_was_made_is_closed(tokenizer: Tokenizer) -> None:
    for task in (WorldTask(make=World), WorldTask(make=Uncalled), InlineWorldTask(make=Ungraded)):
        play([task, task], tokenizer)
        assert len(task.made) >= 2
        assert all(world.is_closed for world in task.made)  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_coroutine", [False, True])
def test_a_slow_tool_stops_no_other_trajectory(tokenizer: Tokenizer, is_coroutine: bool) -> None:
    """The slow tool returns when the other trajectories are graded, which a tool that stops them would never see."""
    graded: list[int] = []

    def is_done() -> bool:
        return len(graded) == 2

    class Slow(World):
        def call(self, name: str, arguments: str) -> Observation:
            limit = time.monotonic() + 10
            while not is_done() and time.monotonic() < limit:
                time.sleep(0.005)
            return Observation(text="a stone", is_error=not is_done())

    class SlowCoroutine(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            limit = time.monotonic() + 10
            while not is_done() and time.monotonic() < limit:
                await asyncio.sleep(0.005)
            return Observation(text="a stone", is_error=not is_done())

    class Quick(World):
        def grade(self, answer: str) -> Grade:
            graded.append(self.stream)
            return super().grade(answer)

    slow = SlowCoroutine if is_coroutine else Slow
    tasks = [*(WorldTask(make=slow) for _ in range(4)), *(WorldTask(make=Quick) for _ in range(2))]
    trajectories = play(tasks, tokenizer, script=script_of(CALL, CALL, ANSWER))
    assert all(trajectory.reward == 1.0 and trajectory.num_calls == 2 for trajectory in trajectories)
    assert sum(trajectory.num_errors for trajectory in trajectories) == 0


class SlowlyClosed(World):
    """Takes a moment to close."""

    def close(self) -> None:
        time.sleep(0.02)
        super().close()


class SlowlyClosedCoroutine(World):
    """The same, as a coroutine."""

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0.02)
        self.is_closed = True


class Stuck(World):
    """Has a tool that takes longer than anybody waits."""

    def call(self, name: str, arguments: str) -> Observation:
        time.sleep(0.1)
        return super().call(name, arguments)


@pytest.mark.parametrize("kind", [World, SlowlyClosed, SlowlyClosedCoroutine, AsyncWorld, Stuck])
def test_the_environments_of_unfinished_trajectories_are_closed_and_their_threads_end(
    tokenizer: Tokenizer, kind: type[World]
) -> None:
    threads = set(threading.enumerate())
    tasks = [WorldTask(make=kind) for _ in range(4)]
    with Collector(
        generation=ScriptedGeneration(script_of(CALL), tokenizer),
        family=WorldFamily(kind),
        tokenizer=tokenizer,
        config=RolloutConfig(max_tokens=4000, max_turn_tokens=500, max_turns=1000, max_repeats=1000),
        on_finished=lambda request, trajectory: pytest.fail("the script never answers"),
    ) as collector:
        collector.submit(
            [RolloutRequest(task_index=index, task=task, sample=0, stream=index) for index, task in enumerate(tasks)]
        )
        looks = iter(range(8))
        collector.run(lambda: next(looks) == 7)
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive()
    made = [world for task in tasks for world in task.made]
    assert len(made) == 4
    assert all(world.is_closed for world in made)  # type: ignore[attr-defined]


def test_a_close_that_is_interrupted_is_repeated(tokenizer: Tokenizer) -> None:
    closings: list[str] = []

    class Closing(World):
        async def close(self) -> None:  # type: ignore[override]
            closings.append("began")
            await asyncio.sleep(0.05 if len(closings) == 1 else 0)
            closings.append("ended")

    async def act() -> None:
        world = EnvironmentClient(WorldTask(make=Closing), 1, config=RolloutConfig())
        await world.open()
        first = asyncio.create_task(world.close())
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert closings == ["began"]
        await world.close()
        await world.close()

    asyncio.run(act())
    assert closings == ["began", "began", "ended"]


def test_the_end_does_not_wait_for_an_event_loop_that_a_plugin_blocks() -> None:
    released, ended = threading.Event(), threading.Event()

    async def block() -> None:
        released.wait(20)
        ended.set()

    with Reactor(end_limit_s=0.1, stuck_s=60, on_stuck=lambda tag, reason, is_cause: pytest.fail(reason)) as reactor:
        reactor.start(block(), tag="blocking")
        reactor.cancel()
    assert not ended.is_set()
    released.set()
    assert ended.wait(10)


def test_an_environment_that_is_made_too_late_is_closed(tokenizer: Tokenizer) -> None:
    class Late(World):
        def __init__(self, stream: int) -> None:
            time.sleep(0.1)
            super().__init__(stream)

    threads = set(threading.enumerate())
    task = WorldTask(make=Late)
    (trajectory,) = play([task], tokenizer, environment_deadline_s=0.02, max_replacements=0)
    assert trajectory.ending is Ending.environment_failed
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    assert [world.is_closed for world in task.made] == [True]  # type: ignore[attr-defined]


def test_results_do_not_depend_on_the_order_of_arrival(tokenizer: Tokenizer) -> None:
    class Jittery(World):
        def call(self, name: str, arguments: str) -> Observation:
            time.sleep(0.05 * (self.stream % 3))
            return Observation(text=f"stone {self.stream % 1000}")

    class Steady(Jittery):
        def call(self, name: str, arguments: str) -> Observation:
            return Observation(text=f"stone {self.stream % 1000}")

    kinds = [[WorldTask(make=Jittery)] * 5, [WorldTask(make=Steady)] * 5, [InlineWorldTask(make=Steady)] * 5]
    first, *others = [play(tasks, tokenizer, num_slots=2 + len(tasks[0].text) % 2) for tasks in kinds]
    assert all(other == first for other in others)


def test_a_call_that_misses_its_deadline_is_an_observation(tokenizer: Tokenizer) -> None:
    (trajectory,) = play([WorldTask(make=AsyncWorld)], tokenizer, call_deadline_s=0.02)
    assert trajectory.reward == 1.0 and trajectory.num_transient_errors == 1
    assert "error: timeout after 0.02 s" in tokenizer.decode(trajectory.segments[0].tokens)


def test_a_plain_tool_that_misses_its_deadline_is_an_observation_too(tokenizer: Tokenizer) -> None:
    trajectories = play([WorldTask(make=Stuck)], tokenizer, script=script_of(CALL, ANSWER), call_deadline_s=0.02)
    assert [(each.ending, each.reward, each.num_transient_errors) for each in trajectories] == [
        (Ending.answered, 1.0, 1)  # the grader waits for the call to return
    ]
    assert "error: timeout after 0.02 s" in tokenizer.decode(trajectories[0].segments[0].tokens)


def test_a_plain_tool_that_never_returns_ends_its_trajectory_and_not_the_run(tokenizer: Tokenizer) -> None:
    released = threading.Event()

    class Hung(World):
        def call(self, name: str, arguments: str) -> Observation:
            released.wait(10)
            return super().call(name, arguments)

    script = script_of(CALL, CALL, ANSWER)
    (trajectory,) = play([WorldTask(make=Hung)], tokenizer, script=script, call_deadline_s=0.02, max_replacements=0)
    released.set()
    assert trajectory.ending is Ending.environment_failed
    assert "still busy with a call that missed its deadline" in trajectory.grade.reason


def _wait_for(is_true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not is_true() and time.monotonic() < limit:
        time.sleep(0.01)
    assert is_true()


def test_a_coroutine_that_ignores_its_end_ends_its_trajectory_and_not_the_run(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    released: list[bool] = []

    class Deaf(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            while not released:
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    continue
            return Observation(text="a stone")

    class Other(World):
        def grade(self, answer: str) -> Grade:
            _wait_for(lambda: "still busy with a call that missed its deadline" in caplog.text)
            released.append(True)
            _wait_for(lambda: deaf.made[0].is_closed)  # type: ignore[attr-defined]
            return super().grade(answer)

    deaf, other = WorldTask(make=Deaf), WorldTask(make=Other)
    first, second = play(
        [deaf, other],
        tokenizer,
        script=script_of(CALL, CALL, ANSWER),
        call_deadline_s=0.2,
        max_replacements=0,
    )
    assert first.ending is Ending.environment_failed and second.reward == 1.0


def test_a_call_that_cleans_up_for_long_is_closed_at_the_end(tokenizer: Tokenizer) -> None:
    class CleaningUp(World):
        has_cleaned_up = False

        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            try:
                await asyncio.sleep(20)
            finally:
                await asyncio.sleep(1)
                self.has_cleaned_up = True
            return Observation(text="a stone")

    task = WorldTask(make=CleaningUp)
    (trajectory,) = play([task], tokenizer, call_deadline_s=0.05, max_turns=1)
    assert trajectory.ending is Ending.max_turns
    (world,) = task.made
    assert isinstance(world, CleaningUp) and world.has_cleaned_up and world.is_closed


def test_the_end_does_not_wait_for_tasks_that_a_plugin_started(tokenizer: Tokenizer) -> None:
    class Beating(World):
        is_cancelled = False

        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            self.task = asyncio.create_task(self._beat())
            await asyncio.sleep(0)
            return Observation(text="a stone")

        async def _beat(self) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.is_cancelled = True
                raise

    task = WorldTask(make=Beating)
    started = time.perf_counter()
    (trajectory,) = play([task], tokenizer)
    assert time.perf_counter() - started < 5 and trajectory.reward == 1.0
    (world,) = task.made
    assert isinstance(world, Beating) and world.is_cancelled


def test_a_close_that_ends_while_it_is_interrupted_is_not_repeated() -> None:
    closings: list[str] = []

    class Closing(World):
        async def close(self) -> None:  # type: ignore[override]
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                closings.append("closed")

    async def act() -> None:
        world = EnvironmentClient(WorldTask(make=Closing), 1, config=RolloutConfig())
        await world.open()
        first = asyncio.create_task(world.close())
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await world.close()

    asyncio.run(act())
    assert closings == ["closed"]


def test_a_slow_prompt_ends_its_trajectory_alone(tokenizer: Tokenizer) -> None:
    class Slow(WorldTask):
        @property
        def prompt(self) -> list[Message]:
            time.sleep(1)
            return super().prompt

    tasks = [Slow(make=World), WorldTask(make=World)]
    slow, other = play(tasks, tokenizer, environment_deadline_s=0.3, max_replacements=0)
    assert slow.ending is Ending.environment_failed and other.reward == 1.0
    assert slow.grade.reason == "making the prompt: no result after 0.3 s"


def test_an_event_loop_that_a_task_of_a_plugin_ends_is_replaced(tokenizer: Tokenizer) -> None:
    class Exiting(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            self.task = asyncio.create_task(self._exit())
            await asyncio.sleep(20)
            return Observation(text="a stone")

        async def _exit(self) -> None:
            sys.exit(1)

    tasks = [WorldTask(make=Exiting), WorldTask(make=World)]
    first, second = play(tasks, tokenizer, num_slots=1, max_replacements=0)
    assert first.ending is Ending.environment_failed and second.reward == 1.0
    assert "a task of an environment ended the event loop" in first.grade.reason


def test_a_plugin_that_cancels_all_tasks_ends_their_trajectories_and_not_the_run(tokenizer: Tokenizer) -> None:
    class Cancelling(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(20)
            return Observation(text="a stone")

    cancelling, other = WorldTask(make=Cancelling), WorldTask(make=AsyncWorld)
    first, second = play([cancelling, other], tokenizer, num_slots=1, max_replacements=0)
    assert first.ending is Ending.environment_failed and second.reward == 1.0
    assert first.grade.reason
    _wait_for(lambda: cancelling.made[0].is_closed)  # type: ignore[attr-defined]


def test_an_environment_that_is_none_ends_its_trajectory_alone(tokenizer: Tokenizer) -> None:
    tasks = [WorldTask(make=lambda stream: None), WorldTask(make=World)]  # type: ignore[arg-type, return-value]
    first, second = play(tasks, tokenizer, max_replacements=0)
    assert first.ending is Ending.environment_failed and second.reward == 1.0
    assert first.grade.reason == "creating the environment returned None"


def test_a_process_that_a_tool_forks_ends_with_its_function(tokenizer: Tokenizer) -> None:
    children: list[int] = []

    class Forking(World):
        def call(self, name: str, arguments: str) -> Observation:
            child = os.fork()
            if child:
                children.append(child)
            return super().call(name, arguments)

    (trajectory,) = play([WorldTask(make=Forking)], tokenizer)
    assert trajectory.reward == 1.0
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0]


def test_the_working_directory_is_the_one_before(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Moving(World):
        def call(self, name: str, arguments: str) -> Observation:
            os.chdir(tmp_path)
            return super().call(name, arguments)

    before = os.getcwd()
    (trajectory,) = play([WorldTask(make=Moving)], tokenizer)
    assert trajectory.reward == 1.0 and os.getcwd() == before
    assert "changed the working directory" in caplog.text


@pytest.mark.parametrize("where", ["task", "call"])
def test_what_a_plugin_changes_of_the_process_is_put_back(
    where: str, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change() -> None:
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)  # this thread's, so that of the run only where tasks are made
        sys.stdout = io.StringIO()

    class Changing(World):
        def call(self, name: str, arguments: str) -> Observation:
            change()
            return super().call(name, arguments)

    def make() -> WorldTask:
        if where == "task":
            change()
        return WorldTask(make=Changing if where == "call" else World)

    before, stdout = os.getcwd(), sys.stdout
    tasks = [make_task(make, limit_s=60)]
    assert os.getcwd() == before and torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
    sys.stdout = stdout
    (trajectory,) = play(tasks, tokenizer)
    assert trajectory.reward == 1.0
    assert os.getcwd() == before and torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
    assert sys.stdout is stdout
    for said in ("changed the working directory", "changed torch's default dtype"):
        assert said in caplog.text
    assert ("replaced sys.stdout" in caplog.text) == (where == "call")


def test_an_inference_mode_that_a_task_leaves_is_ended() -> None:
    left: list[torch.inference_mode] = []

    def make() -> WorldTask:
        left.append(torch.inference_mode())
        left[-1].__enter__()
        return WorldTask(make=World)

    with ThreadPoolExecutor(1) as pool:  # the mode is that of a thread
        pool.submit(make_task, make, limit_s=60).result()
        assert left and pool.submit(torch.is_inference_mode_enabled).result() is False
        assert pool.submit(torch.is_grad_enabled).result() is True


def test_a_deadline_beyond_what_an_alarm_can_hold_is_possible() -> None:
    assert isinstance(make_task(lambda: WorldTask(make=World), limit_s=9e18), WorldTask)


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, BaseException, SystemExit, MemoryError])
def test_a_task_may_raise_anything(error: type[BaseException], tokenizer: Tokenizer) -> None:
    def fail() -> WorldTask:
        raise error

    good, broken = play([WorldTask(make=World), make_task(fail, limit_s=60)], tokenizer, max_replacements=0)
    assert good.is_scored and broken.ending is Ending.environment_failed
    assert broken.grade.reason.startswith(f"making the task: {error.__name__}")


def test_a_stream_that_a_plugin_closes_is_opened_again() -> None:
    code = (
        "import sys\n"
        "from moetrain.log import setup_logging\n"
        "from moetrain.rollout.process_state import ProcessState\n"
        "setup_logging()\n"
        "state = ProcessState()\n"
        "sys.stdout.close()\nsys.stderr.close()\n"
        "state.repair()\n"
        "print('written')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "written\n")
    assert "a plugin closed sys.stdout; it was opened again" in done.stderr
    assert "a plugin closed sys.stderr; it was opened again" in done.stderr


def test_an_event_loop_that_a_tool_blocks_is_replaced(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    class Blocking(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            if not released.is_set():
                released.wait(20)
            return super().call(name, arguments)

    class Freeing(World):
        def __init__(self, stream: int) -> None:
            if blocked.made:
                released.set()
            super().__init__(stream)

    blocked, other = WorldTask(make=Blocking), WorldTask(make=Freeing)
    trajectories = play([blocked, other], tokenizer, num_slots=1, environment_deadline_s=1, max_replacements=0)
    assert [each.ending for each in trajectories] == [Ending.environment_failed, Ending.answered]
    assert "has blocked the event loop of all environments for 1 s: use await" in trajectories[0].grade.reason
    assert f"Blocking.call ({__file__}:" in caplog.text
    _wait_for(lambda: blocked.made[0].is_closed)  # type: ignore[attr-defined]


def test_a_blocked_event_loop_costs_no_attempt_of_other_trajectories(tokenizer: Tokenizer) -> None:
    released = threading.Event()

    class Blocking(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            released.wait(30)
            return super().call(name, arguments)

    class Waiting(World):
        async def call(self, name: str, arguments: str) -> Observation:  # type: ignore[override]
            await asyncio.sleep(0.01)
            return super().call(name, arguments)

    others = [WorldTask(make=kind) for kind in (World, Waiting, World, Waiting)]
    try:
        trajectories = play(
            [others[0], others[1], WorldTask(make=Blocking), *others[2:]],
            tokenizer, num_slots=5, environment_deadline_s=1, max_replacements=1,
        )  # fmt: skip
    finally:
        released.set()
    assert [each.reward for each in trajectories] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert [each.num_replaced for each in trajectories] == [0, 0, 1, 0, 0]
    assert "Blocking.call" in trajectories[2].grade.reason


def test_an_environment_that_asks_for_it_is_tried_again(tokenizer: Tokenizer) -> None:
    class Shaky(World):
        tries = 0

        def call(self, name: str, arguments: str) -> Observation:
            self.tries += 1
            if self.tries < 3:
                raise TransientError("503")
            return super().call(name, arguments)

    (trajectory,) = play([WorldTask(make=Shaky)], tokenizer)
    assert trajectory.reward == 1.0 and trajectory.num_calls == 1 and trajectory.num_replaced == 0
    (trajectory,) = play([WorldTask(make=Shaky)], tokenizer, max_retries=1, max_replacements=0)
    assert trajectory.ending is Ending.environment_failed
    assert trajectory.grade.reason == "a call of look: 503 (2 attempts)"


def test_what_a_plain_environment_made_is_used_in_the_thread_that_made_it(tokenizer: Tokenizer) -> None:
    class Sqlite(World):
        def __init__(self, stream: int) -> None:
            super().__init__(stream)
            self.connection = sqlite3.connect(":memory:")

        def call(self, name: str, arguments: str) -> Observation:
            return Observation(text=str(self.connection.execute("SELECT 41 + 1").fetchone()[0]))

        def close(self) -> None:
            self.connection.close()

    (trajectory,) = play([WorldTask(make=Sqlite)], tokenizer)
    assert trajectory.reward == 1.0
    assert "\n42<|im_end|>" in tokenizer.decode(trajectory.segments[0].tokens)


def test_a_tool_error_is_an_observation(tokenizer: Tokenizer) -> None:
    class Refusing(World):
        def call(self, name: str, arguments: str) -> Observation:
            raise ToolError("not now")

    (trajectory,) = play([WorldTask(make=Refusing)], tokenizer)
    assert trajectory.reward == 1.0 and trajectory.num_errors == 1 and trajectory.num_transient_errors == 0
    assert "error: not now" in tokenizer.decode(trajectory.segments[0].tokens)


def test_a_lone_surrogate_in_a_result_is_replaced(tokenizer: Tokenizer) -> None:
    class Half(World):
        def call(self, name: str, arguments: str) -> Observation:
            return Observation(text="a \ud83d stone")

    (trajectory,) = play([WorldTask(make=Half)], tokenizer)
    assert trajectory.reward == 1.0
    assert "\na \ufffd stone<|im_end|>" in tokenizer.decode(trajectory.segments[0].tokens)


def test_a_long_result_is_cut_in_tokens_and_the_model_is_told(tokenizer: Tokenizer) -> None:
    class Huge(World):
        def call(self, name: str, arguments: str) -> Observation:
            return Observation(text="first " + "x y " * 200_000 + "last")

    (trajectory,) = play([WorldTask(make=Huge)], tokenizer, max_output_tokens=20)
    (segment,) = trajectory.segments
    text = tokenizer.decode(segment.tokens)
    assert trajectory.num_cut_outputs == 1 and len(segment.tokens) < 300
    assert "\nfirst x y" in text and "y last<|im_end|>" in text
    shown = text.split("\nfirst")[1].split("last<|im_end|>")[0]
    note = shown.split(" ... ")[1]
    assert note.endswith(" characters left out")
    left_out, kept = int(note.split()[0]), sum(map(len, shown.split(f" ... {note} ... ")))
    assert left_out + kept + len("first" + "last") == len("first " + "x y " * 200_000 + "last")
    (whole,) = play([WorldTask(make=World)], tokenizer, max_output_tokens=20)
    assert whole.num_cut_outputs == 0


def test_one_prompt_that_is_too_long_ends_its_trajectory_alone(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = WorldTask(make=World, text="please " * 4000)
    good, ended = play([WorldTask(make=World), long], tokenizer)
    assert good.reward == 1.0
    assert ended.ending is Ending.prompt_too_long and not ended.is_scored and ended.num_replaced == 0
    assert list(ended.segments) == [] and long.made == []
    assert "task 1, sample 0, attempt 1: the prompt has" in caplog.text
    assert rollout_metrics([[good, ended]])["ending/prompt_too_long"] == 0.5


def test_the_clock_is_not_a_wrong_answer(tokenizer: Tokenizer) -> None:
    (trajectory,) = play([WorldTask(make=SlowWorld)], tokenizer, max_seconds=0.1, max_replacements=0)
    assert trajectory.ending is Ending.max_seconds and not trajectory.is_scored
    assert "reward" not in rollout_metrics([[trajectory]])


def test_an_error_of_ours_is_not_hidden_and_closes_the_environments(tokenizer: Tokenizer) -> None:
    task = InlineWorldTask(make=World)

    def broken(turn: int) -> Message:
        if turn:
            raise ZeroDivisionError("in the generation")
        return Message(role=Role.assistant, tool_calls=CALL.tool_calls)

    with pytest.raises(ZeroDivisionError, match="in the generation"):
        play([task], tokenizer, script=broken)
    assert [world.is_closed for world in task.made] == [True]  # type: ignore[attr-defined]


class _RaisingTask(WorldTask):
    @property
    def num_calls(self) -> int:
        raise KeyError("no such row")


class _TextTask(WorldTask):
    num_calls = "3"


class _RaisingProgress(World):
    @property
    def progress(self) -> Any:
        raise ValueError("not yet")


def test_a_number_of_calls_that_cannot_be_read_ends_its_trajectory_alone(tokenizer: Tokenizer) -> None:
    tasks = [WorldTask(make=World), _RaisingTask(make=World), _TextTask(make=World)]
    endings = [trajectory.ending for trajectory in play(tasks, tokenizer)]
    assert endings == [Ending.answered, Ending.environment_failed, Ending.environment_failed]


def test_progress_that_cannot_be_asked_leaves_the_grade(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    (trajectory,) = play([WorldTask(make=_RaisingProgress)], tokenizer)
    assert (trajectory.ending, trajectory.progress) == (Ending.answered, None)
    assert "progress is unknown: progress: ValueError: not yet" in caplog.text

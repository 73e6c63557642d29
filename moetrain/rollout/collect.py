"""Runs episodes on one `Generation` and returns their trajectories.

Decoding and environments run concurrently: a sequence whose tool is working is idle, and the others continue.
"""

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self

from moetrain.chat.context import ContextPolicy
from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.protocol import Generation
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode
from moetrain.rollout.process_state import ProcessState
from moetrain.rollout.reactor import Reactor, run_inline
from moetrain.rollout.types import REPLACED, Trajectory
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Task, TaskFamily

_END_LIMIT_S = 10.0
"""Longest time that leaving a collector waits for environments to stop and close."""


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One trajectory to collect.

    stream: seeds its sampling and its environment, so that its randomness depends on (stream, position) and not on
    other trajectories.
    """

    task_index: int
    task: Task
    sample: int
    stream: int


def collect(
    requests: Sequence[RolloutRequest],
    *,
    generation: Generation,
    family: TaskFamily,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    declare_tools: bool = False,
    policy: ContextPolicy | None = None,
    on_finished: Callable[[RolloutRequest, Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Return one trajectory per request, in the order of the requests."""
    finished: dict[int, Trajectory] = {}
    numbers = {id(request): number for number, request in enumerate(requests)}

    def keep(request: RolloutRequest, trajectory: Trajectory) -> None:
        finished[numbers[id(request)]] = trajectory
        if on_finished is not None:
            on_finished(request, trajectory)

    with Collector(
        generation=generation,
        family=family,
        tokenizer=tokenizer,
        config=config,
        declare_tools=declare_tools,
        policy=policy,
        on_finished=keep,
    ) as collector:
        collector.submit(requests)
        collector.run(lambda: len(finished) == len(requests))
    return [finished[number] for number in range(len(requests))]


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One attempt at a request. number: number of earlier attempts."""

    request: RolloutRequest
    number: int = 0

    def next(self) -> "_Attempt":
        return _Attempt(request=self.request, number=self.number + 1)

    def episode(self, *, config: RolloutConfig, tokenizer: Tokenizer, policy: ContextPolicy | None) -> Episode:
        request = self.request
        stream = seed_of(request.stream, "attempt", self.number) if self.number else request.stream
        name = f"task {request.task_index}, sample {request.sample}, attempt {self.number + 1}"
        return Episode(request.task, name=name, stream=stream, config=config, tokenizer=tokenizer, policy=policy)

    def trajectory(self, episode: Episode) -> Trajectory:
        request = self.request
        return episode.trajectory(task=request.task_index, sample=request.sample, num_replaced=self.number)


class Collector:
    """Collects the trajectories of submitted requests. Between two calls of `run`, episodes keep their place.

    A trajectory that ended because its environment failed or because of `max_seconds` is replaced by a new attempt with
    its own streams, at most `config.max_replacements` times. The last attempt counts, whatever its ending. An attempt
    that the environment of another trajectory blocked begins again, and is not counted.
    """

    def __init__(
        self,
        *,
        generation: Generation,
        family: TaskFamily,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        on_finished: Callable[[RolloutRequest, Trajectory], None],
        declare_tools: bool = False,
        policy: ContextPolicy | None = None,
    ) -> None:
        """Prepare the collection; `on_finished` is called with each trajectory that ends."""
        self._generation = generation
        self._family = family
        self._tokenizer = tokenizer
        self._config = config
        self._declare_tools = declare_tools
        self._policy = policy
        self._on_finished = on_finished
        self._reactor = Reactor(
            end_limit_s=min(config.environment_deadline_s, _END_LIMIT_S),
            stuck_s=config.environment_deadline_s,
            on_stuck=Episode.abandon,
        )
        self._waiting: deque[_Attempt] = deque()
        self._episodes: dict[int, tuple[_Attempt, Episode]] = {}  # the unfinished ones
        self._ready: deque[Episode] = deque()
        self._speakers: dict[int, Episode] = {}  # by the id of the sequence that is decoded

    def __enter__(self) -> Self:
        """Return this collector."""
        self._process = ProcessState()
        self._reactor.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what the environments of the unfinished episodes do, and close them."""
        self._reactor.cancel()
        for _, episode in self._episodes.values():
            self._run(episode, episode.close())
        self._reactor.__exit__(*error)
        self._process.restore()

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Add requests, which begin in their order as soon as there is a slot."""
        self._waiting += [_Attempt(request=request) for request in requests]

    def run(self, is_enough: Callable[[], bool]) -> None:
        """Continue until `is_enough()`, or until no request is left."""
        while not is_enough() and (self._waiting or self._episodes):
            while self._waiting and len(self._episodes) < self._config.num_slots:
                self._begin(self._waiting.popleft())
            ended = self._advance()
            self._process.repair()
            for attempt, episode in ended:
                if episode.was_disturbed:
                    self._waiting.appendleft(attempt)  # it begins again, and no attempt is counted
                elif episode.ending in REPLACED and attempt.number < self._config.max_replacements:
                    self._waiting.appendleft(attempt.next())
                else:
                    self._on_finished(attempt.request, attempt.trajectory(episode))

    def _begin(self, attempt: _Attempt) -> None:
        """Start an episode by making its environment and its prompt."""
        episode = attempt.episode(config=self._config, tokenizer=self._tokenizer, policy=self._policy)
        self._episodes[id(episode)] = (attempt, episode)
        self._run(episode, episode.begin(self._family, declare_tools=self._declare_tools))

    def _advance(self) -> list[tuple[_Attempt, Episode]]:
        """Take at most one decoding step and process the results of environments; return the episodes that ended.

        Waits for an environment only when there is nothing to decode.
        """
        ended = self._process_ready()
        if self._generation.is_busy:
            for sequence in self._generation.step():
                episode = self._speakers.pop(id(sequence))
                self._run(episode, episode.respond())
            ended += self._process_ready()
        return ended

    def _run(self, episode: Episode, coroutine: Coroutine[Any, Any, None]) -> None:
        if episode.is_inline:
            run_inline(coroutine)
            self._ready.append(episode)
        else:
            self._reactor.start(coroutine, tag=episode)

    def _process_ready(self) -> list[tuple[_Attempt, Episode]]:
        """Continue the episodes whose environment has finished its work; return the episodes that ended."""
        wait = not self._generation.is_busy and not self._ready
        ready = [*self._ready, *self._reactor.finished(wait_for_one=wait)]
        self._ready.clear()
        ended = []
        for episode in ready:
            if episode.is_finished:
                ended.append(self._episodes.pop(id(episode)))
                episode.leave(self._generation)
            else:
                episode.continue_in(self._generation)
                self._speakers[id(episode.sequence)] = episode
        return ended

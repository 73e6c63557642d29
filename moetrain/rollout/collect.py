"""Runs episodes on one `Generation` and returns their trajectories in the order of the requests.

Decoding and environments run concurrently: a sequence whose tool is working is idle, and the others continue.
"""

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.chat.context import ContextPolicy
from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.protocol import Generation
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode
from moetrain.rollout.types import REPLACED, Trajectory
from moetrain.rollout.world import Reactor, run_inline
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Task, TaskFamily


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
    """Return one trajectory per request, in the order of the requests.

    A trajectory that ended because its environment failed or because of `max_seconds` is replaced by a new attempt with
    its own streams, at most `config.max_replacements` times. The last attempt is returned, whatever its ending.
    """
    finished: dict[int, Trajectory] = {}
    with Reactor() as reactor:
        running = _RunningEpisodes(generation=generation, reactor=reactor)
        waiting = deque(_Attempt(position=position, request=request) for position, request in enumerate(requests))
        try:
            while waiting or running.episodes:
                while waiting and len(running.episodes) < config.num_slots:
                    attempt = waiting.popleft()
                    episode = attempt.episode(config=config, tokenizer=tokenizer, policy=policy)
                    running.begin(attempt, episode, family=family, declare_tools=declare_tools)
                for attempt, episode in running.advance():
                    if episode.ending in REPLACED and attempt.number < config.max_replacements:
                        waiting.appendleft(attempt.next())
                        continue
                    trajectory = finished[attempt.position] = attempt.trajectory(episode)
                    if on_finished is not None:
                        on_finished(attempt.request, trajectory)
        finally:
            running.close()
    return [finished[position] for position in range(len(requests))]


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One attempt at a request. number: number of earlier attempts."""

    position: int
    request: RolloutRequest
    number: int = 0

    def next(self) -> "_Attempt":
        return _Attempt(position=self.position, request=self.request, number=self.number + 1)

    def episode(self, *, config: RolloutConfig, tokenizer: Tokenizer, policy: ContextPolicy | None) -> Episode:
        request = self.request
        stream = seed_of(request.stream, "attempt", self.number) if self.number else request.stream
        name = f"task {request.task_index}, sample {request.sample}, attempt {self.number + 1}"
        return Episode(request.task, name=name, stream=stream, config=config, tokenizer=tokenizer, policy=policy)

    def trajectory(self, episode: Episode) -> Trajectory:
        request = self.request
        return episode.trajectory(task=request.task_index, sample=request.sample, num_replaced=self.number)


class _RunningEpisodes:
    """The unfinished episodes. Each waits either for decoding or for its environment."""

    def __init__(self, *, generation: Generation, reactor: Reactor) -> None:
        self.episodes: dict[int, tuple[_Attempt, Episode]] = {}
        self._generation = generation
        self._reactor = reactor
        self._ready: deque[Episode] = deque()
        self._speakers: dict[int, Episode] = {}  # by the id of the sequence that is decoded

    def begin(self, attempt: _Attempt, episode: Episode, *, family: TaskFamily, declare_tools: bool) -> None:
        """Start an episode by making its environment and its prompt."""
        self.episodes[id(episode)] = (attempt, episode)
        self._run(episode, episode.begin(family, declare_tools=declare_tools))

    def advance(self) -> list[tuple[_Attempt, Episode]]:
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

    def close(self) -> None:
        """Close the environments of the unfinished episodes."""
        for _, episode in self.episodes.values():
            self._run(episode, episode.close())

    def _run(self, episode: Episode, coroutine: Coroutine[Any, Any, None]) -> None:
        if episode.is_inline:
            run_inline(coroutine)
            self._ready.append(episode)
        else:
            self._reactor.start(coroutine, tag=episode)

    def _process_ready(self) -> list[tuple[_Attempt, Episode]]:
        """Continue the episodes whose environment has finished its work; return the episodes that ended."""
        wait = not self._generation.is_busy and not self._ready
        ready = [*self._ready, *self._reactor.finished(wait=wait)]
        self._ready.clear()
        ended = []
        for episode in ready:
            if episode.is_finished:
                ended.append(self.episodes.pop(id(episode)))
                episode.leave(self._generation)
            else:
                episode.continue_in(self._generation)
                self._speakers[id(episode.sequence)] = episode
        return ended

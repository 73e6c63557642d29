"""Runs episodes to their end on one generation engine and returns their trajectories in the order asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moetrain.data.tokenizer import Tokenizer
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.engine import Sequence as TokenSequence
from moetrain.inference.weights import InferenceWeights
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode, prompt_tokens
from moetrain.rollout.types import Trajectory
from moetrain.runtime import seed_of
from moetrain.tasks.protocol import Task, TaskFamily


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One trajectory to collect. `stream` seeds its sampling and its environment: what is random in it is a function of
    (stream, position), never of the other trajectories."""

    task_index: int
    task: Task
    sample: int
    stream: int


def collect(
    requests: Sequence[RolloutRequest],
    *,
    weights: InferenceWeights,
    family: TaskFamily,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    declare_tools: bool = False,
    version: int = 0,
    on_finished: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Return one trajectory a request, in the order of the requests."""
    engine = GenerationEngine(weights, num_slots=min(config.num_slots, len(requests)), max_tokens=config.max_tokens)
    episodes: dict[int, tuple[int, Episode]] = {}
    for position, request in enumerate(requests):
        prompt = prompt_tokens(request.task, family, tokenizer=tokenizer, declare_tools=declare_tools)
        sequence = TokenSequence(tokens=prompt, stream=request.stream, temperature=config.temperature)
        environment = request.task.environment(seed_of(request.stream, "environment"))
        episode = Episode(request.task, environment, sequence, config=config, tokenizer=tokenizer)
        episodes[id(sequence)] = (position, episode)
        engine.add(sequence)
    finished: dict[int, Trajectory] = {}
    while engine.has_work:
        for sequence in engine.step():
            position, episode = episodes[id(sequence)]
            episode.on_token()
            if episode.is_finished:
                engine.remove(sequence)
                request = requests[position]
                finished[position] = episode.finish(task=request.task_index, sample=request.sample, version=version)
                if on_finished is not None:
                    on_finished(finished[position])
    return [finished[position] for position in range(len(requests))]

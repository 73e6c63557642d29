"""The episodes of `bench rollout`: which tokens are given, and how many are generated in each turn.

They come from the trajectories of a trained model, or from the demonstrations of the task family.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

from moetrain.bench.engines.protocol import Episode, Turn
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.tool_schema import declaration
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import ConfigError
from moetrain.inference.protocol import Generation
from moetrain.rollout.collect import RolloutRequest, collect
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.making import make_task
from moetrain.runtime import seed_of
from moetrain.tasks.dialogues import RL_FIRST_TASK, demonstration
from moetrain.tasks.protocol import Split, TaskFamily
from moetrain.tasks.registry import demonstrator_of


def episode_of(tokens: Sequence[int], is_new: Sequence[bool]) -> Episode:
    """Return the episode of a sequence. is_new: per token, whether it is to be generated. Given tokens at the end are
    left out."""
    turns: Episode = []
    given: list[int] = []
    for kind, group in groupby(zip(tokens, is_new, strict=True), key=lambda item: item[1]):
        run = [token for token, _ in group]
        if kind:
            turns.append(Turn(given=given, num_new=len(run)))
        else:
            given = run
    return turns


def _places(num_episodes: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Yield (task, sample) of each episode, in the order of RL."""
    for number in range(num_episodes):
        yield RL_FIRST_TASK + number // group_size, number % group_size


def demonstrated_episodes(
    family: TaskFamily,
    tokenizer: Tokenizer,
    *,
    num_episodes: int,
    group_size: int,
    max_tokens: int,
    seed: int,
    declare_tools: bool,
) -> list[Episode]:
    """Return demonstrations of RL's first tasks, cut after their last whole turn within `max_tokens` tokens.

    Raises ConfigError when the prompt and the first turn of one do not fit.
    """
    demonstrator = demonstrator_of(family)
    declared = declaration(family.tools) if declare_tools else ""
    episodes = []
    for index, sample in _places(num_episodes, group_size):
        task = family.task(Split.train, index)
        messages, _ = demonstration(demonstrator, task, stream=seed_of(seed, "bench/rollout", index, sample))
        tokens, is_target = pieces_to_tokens(
            tokenizer.template.conversation_pieces(messages, declared),
            encode=tokenizer.encode,
            special_ids=tokenizer.special_ids,
        )
        episode = _cut(episode_of(tokens, is_target), max_tokens=max_tokens)
        if not episode:
            raise ConfigError(
                f"rollout.max_tokens is {max_tokens}: the first turn of task {index} ends after that; give more"
            )
        episodes.append(episode)
    return episodes


def _cut(episode: Episode, *, max_tokens: int) -> Episode:
    kept: Episode = []
    num_tokens = 0
    for turn in episode:
        num_tokens += len(turn.given) + turn.num_new
        if num_tokens > max_tokens:
            break
        kept.append(turn)
    return kept


def collected_episodes(
    family: TaskFamily,
    tokenizer: Tokenizer,
    *,
    generation: Generation,
    config: RolloutConfig,
    num_episodes: int,
    group_size: int,
    seed: int,
    declare_tools: bool,
) -> list[Episode]:
    """Return trajectories on the first RL training tasks, sampled by `generation`.

    Raises ConfigError when none could begin.
    """
    requests = [
        RolloutRequest(
            task_index=index,
            task=make_task(partial(family.task, Split.train, index), limit_s=config.environment_deadline_s),
            sample=sample,
            stream=seed_of(seed, "bench/rollout", index, sample),
        )
        for index, sample in _places(num_episodes, group_size)
    ]
    trajectories = collect(
        requests,
        generation=generation,
        family=family,
        tokenizer=tokenizer,
        config=config,
        declare_tools=declare_tools,
    )
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    if not segments:
        raise ConfigError(f"none of {num_episodes} episodes could begin: {trajectories[0].grade.reason}")
    return [episode_of(segment.tokens, segment.is_sampled) for segment in segments]

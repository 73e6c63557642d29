"""The model as an agent in an environment, at a terminal: the task, its turns, the results of its calls, its grade."""

import asyncio

from moetrain.chat.context import ContextPolicy
from moetrain.chat.messages import Role
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import RolloutError, described
from moetrain.inference.protocol import Generation
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode
from moetrain.rollout.types import Ending, Trajectory
from moetrain.tasks.protocol import Task, TaskFamily
from moetrain.terminal.player import Interrupts, TurnEnd, play_turn
from moetrain.terminal.screen import Screen


def act(
    task: Task,
    family: TaskFamily,
    *,
    generation: Generation,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    stream: int,
    declare_tools: bool,
    policy: ContextPolicy | None = None,
    screen: Screen,
) -> Trajectory | None:
    """Return the trajectory of the model in a new environment, which is shown as it happens; None after Ctrl-C."""
    try:
        prompt = list(task.prompt)
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything
        raise RolloutError(f"the prompt of the task cannot be made: {described(error)}") from error
    for message in prompt:
        screen.say("user", message.content)
    episode = Episode(task, name="the task", stream=stream, config=config, tokenizer=tokenizer, policy=policy)
    interrupts = Interrupts()
    with asyncio.Runner() as runner:
        runner.run(episode.begin(family, declare_tools=declare_tools))
        while not episode.is_finished:
            if episode.has_begun:
                for message in episode.given:
                    screen.say("result" if message.role is Role.tool else "user", message.content)
            elif episode.num_segments > 1:
                screen.say("note", f"context {episode.num_segments} begins")
            episode.continue_in(generation)
            end = play_turn(generation, episode.sequence, tokenizer=tokenizer, screen=screen, interrupts=interrupts)
            if end is TurnEnd.interrupted:
                runner.run(episode.close())
                screen.say("note", "interrupted: the task is not graded")
                return None
            runner.run(episode.respond())
    trajectory = episode.trajectory(task=0, sample=0, num_replaced=0)
    screen.say("note", _verdict(trajectory))
    return trajectory


def _verdict(trajectory: Trajectory) -> str:
    """Return the grade in one line."""
    counts = f"{trajectory.num_calls} calls, {trajectory.num_errors} of them errors, {trajectory.num_sampled} tokens"
    if trajectory.ending is not Ending.answered:
        return f"no answer: {trajectory.ending.value} ({trajectory.grade.reason}); {counts}"
    verdict = "solved" if trajectory.grade.success else "not solved"
    return f"{verdict}: reward {trajectory.reward:g} ({trajectory.grade.reason}); {counts}"

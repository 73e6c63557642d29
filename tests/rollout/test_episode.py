import json

import pytest

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.template import SPECIAL_TOKENS, pieces_to_text, turn_pieces
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.errors import ToolError
from moetrain.inference.engine import Sequence
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode, prompt_tokens
from moetrain.rollout.types import Ending, Trajectory
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily, DatabaseTask
from moetrain.tasks.protocol import Grade, Observation, Split


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["step retry table column value functions get find 0123456789 letters and words " * 3] * 4
    return train_tokenizer(texts, vocab_size=len(SPECIAL_TOKENS) + 256 + 10)


def _begin(tokenizer: Tokenizer, **limits: int) -> tuple[DatabaseTask, Episode]:
    family = DatabaseFamily(TaskConfig(tool_failure=0.0), 0)
    task = family.task(Split.train, 1)
    sequence = Sequence(tokens=prompt_tokens(task, family, tokenizer=tokenizer, declare_tools=False), stream=0)
    config = RolloutConfig(**{"max_tokens": 4000, "max_turn_tokens": 500, **limits})
    return task, Episode(task, task.environment(0), sequence, config=config, tokenizer=tokenizer)


def _say(episode: Episode, message: Message, tokenizer: Tokenizer) -> None:
    for piece in turn_pieces(message):
        ids = [tokenizer.special_ids[piece.text]] if piece.is_special else tokenizer.encode(piece.text)
        for token in ids:
            episode.sequence.tokens.append(token)
            episode.sequence.logprobs.append(-1.0)
            episode.sequence.is_sampled.append(True)
            episode.on_token()
            if episode.is_finished:
                return


def _solve(task: DatabaseTask, episode: Episode, tokenizer: Tokenizer) -> Trajectory:
    value: str | int = task.program.start
    for number, step in enumerate(task.program.steps):
        call = ToolCall(
            name=step.kind.value, arguments=step.arguments(value), id=f"functions.{step.kind.value}:{number}"
        )
        _say(episode, Message(role=Role.assistant, reasoning=f"step {number}", tool_calls=[call]), tokenizer)
        text = tokenizer.decode(episode.sequence.tokens)
        result = json.loads(text.split("\n")[-1].split("<|im_end|>")[0])
        value = value if step.kind.value == "update" else result
    _say(episode, Message(role=Role.assistant, reasoning="done", content=json.dumps(value)), tokenizer)
    return episode.finish(task=1, sample=0, version=0)


def test_a_right_trajectory_is_graded_right_and_its_columns_line_up(tokenizer: Tokenizer) -> None:
    task, episode = _begin(tokenizer)
    trajectory = _solve(task, episode, tokenizer)
    assert trajectory.grade.success and trajectory.ending is Ending.answered
    assert trajectory.num_calls == task.num_calls and trajectory.num_errors == 0
    (segment,) = trajectory.segments
    assert len(segment.tokens) == len(segment.is_sampled) == len(segment.logprobs) == len(segment.versions)
    assert all(
        logprob == (-1.0 if sampled else 0.0)
        for logprob, sampled in zip(segment.logprobs, segment.is_sampled, strict=True)
    )


def test_what_the_model_said_is_never_rendered_again(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer)
    odd = ToolCall(name="get", arguments='{ "table" : 1 }', id="functions.get:0")
    message = Message(role=Role.assistant, reasoning="x", tool_calls=[odd])
    start = len(episode.sequence.tokens)
    _say(episode, message, tokenizer)
    said = [t for t, sampled in zip(episode.sequence.tokens, episode.sequence.is_sampled, strict=True) if sampled]
    assert tokenizer.decode(said) == pieces_to_text(turn_pieces(message))
    assert episode.sequence.tokens[start : start + len(said)] == said


def test_a_bad_call_becomes_an_observation(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer)
    call = ToolCall(name="fly", arguments="{}", id="functions.fly:0")
    _say(episode, Message(role=Role.assistant, tool_calls=[call]), tokenizer)
    assert not episode.is_finished
    assert "error: no tool fly" in tokenizer.decode(episode.sequence.tokens)


@pytest.mark.parametrize(
    ("limits", "ending"),
    [
        ({"max_turn_tokens": 5}, Ending.turn_too_long),
        ({"max_turns": 1}, Ending.max_turns),
        ({"max_repeats": 1}, Ending.stalled),
        ({"max_tokens": 300, "max_turn_tokens": 299}, Ending.max_tokens),
    ],
)
def test_a_limit_ends_the_trajectory_and_is_recorded(
    tokenizer: Tokenizer, limits: dict[str, int], ending: Ending
) -> None:
    _, episode = _begin(tokenizer, **limits)
    call = ToolCall(name="get", arguments="{}", id="functions.get:0")
    for _ in range(20):
        if not episode.is_finished:
            _say(episode, Message(role=Role.assistant, tool_calls=[call]), tokenizer)
    trajectory = episode.finish(task=0, sample=0, version=0)
    assert trajectory.ending is ending and not trajectory.grade.success and trajectory.reward == 0.0


class BrokenEnvironment:
    """A user's environment with a mistake in it."""

    def call(self, name: str, arguments: str) -> Observation:
        if name == "refuse":
            raise ToolError("not now")
        raise KeyError(name)

    def grade(self, answer: str) -> Grade:
        raise ZeroDivisionError

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("calls", [True, False])
def test_an_environment_that_fails_ends_its_trajectory_and_no_more(tokenizer: Tokenizer, calls: bool) -> None:
    task, _ = _begin(tokenizer)
    sequence = Sequence(tokens=[1, 2, 3], stream=0)
    config = RolloutConfig(max_tokens=4000, max_turn_tokens=500)
    episode = Episode(task, BrokenEnvironment(), sequence, config=config, tokenizer=tokenizer)
    call = ToolCall(name="get", arguments="{}", id="functions.get:0")
    _say(episode, Message(role=Role.assistant, content="1", tool_calls=[call] if calls else []), tokenizer)
    trajectory = episode.finish(task=0, sample=0, version=0)
    assert trajectory.ending is Ending.environment_failed and trajectory.reward == 0.0
    assert trajectory.grade.reason.startswith("KeyError" if calls else "ZeroDivisionError")


def test_a_tool_error_of_an_environment_is_an_observation(tokenizer: Tokenizer) -> None:
    task, _ = _begin(tokenizer)
    sequence = Sequence(tokens=[1, 2, 3], stream=0)
    config = RolloutConfig(max_tokens=4000, max_turn_tokens=500)
    episode = Episode(task, BrokenEnvironment(), sequence, config=config, tokenizer=tokenizer)
    call = ToolCall(name="refuse", arguments="{}", id="functions.refuse:0")
    _say(episode, Message(role=Role.assistant, tool_calls=[call]), tokenizer)
    assert not episode.is_finished
    assert "error: not now" in tokenizer.decode(episode.sequence.tokens)


def test_a_turn_whose_markers_do_not_nest_ends_the_trajectory(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer)
    for name in ("</think>", "<|im_end|>"):
        episode.sequence.tokens.append(tokenizer.special_ids[name])
        episode.sequence.logprobs.append(0.0)
        episode.sequence.is_sampled.append(True)
        episode.on_token()
    assert episode.finish(task=0, sample=0, version=0).ending is Ending.invalid_turn


def test_a_call_whose_id_has_another_form_is_an_error_that_names_the_form(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer)
    call = ToolCall(name="get", arguments="{}", id="call_a1B2")
    _say(episode, Message(role=Role.assistant, tool_calls=[call]), tokenizer)
    text = tokenizer.decode(episode.sequence.tokens)
    assert "## Return of call_a1B2\nerror: 'call_a1B2' is no id of a call: write functions.NAME:N" in text
    assert not episode.is_finished


@pytest.mark.parametrize("key", ["table", "id", "column"])
def test_a_lone_surrogate_in_a_call_ends_no_trajectory(key: str, tokenizer: Tokenizer) -> None:
    task, episode = _begin(tokenizer)
    step = task.program.steps[0]
    arguments = json.loads(step.arguments(task.program.start)) | {key: "\ud83d"}
    name = step.kind.value
    call = ToolCall(name=name, arguments=json.dumps(arguments), id=f"functions.{name}:0")
    assert "\\ud83d" in call.arguments
    _say(episode, Message(role=Role.assistant, tool_calls=[call]), tokenizer)
    assert not episode.is_finished
    assert f"## Return of functions.{name}:0\nerror" in tokenizer.decode(episode.sequence.tokens)

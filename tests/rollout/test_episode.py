import json

import pytest

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import pieces_to_text, pieces_to_tokens
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.tokenizer import Tokenizer
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode
from moetrain.rollout.reactor import run_inline
from moetrain.rollout.types import Ending, Trajectory
from moetrain.tasks.config import TaskConfig
from moetrain.tasks.database.family import DatabaseFamily, DatabaseTask
from moetrain.tasks.protocol import Split
from tests.rollout.scripted import words_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return words_tokenizer()


def _begin(tokenizer: Tokenizer, **limits: int) -> tuple[DatabaseTask, Episode]:
    family = DatabaseFamily(TaskConfig(tool_failure=0.0), 0)
    task = family.task(Split.train, 1)
    config = RolloutConfig(**{"max_tokens": 4000, "max_turn_tokens": 500, **limits})
    episode = Episode(task, name="task 1", stream=0, config=config, tokenizer=tokenizer)
    run_inline(episode.begin(family, declare_tools=False))
    episode.sequence.give([], version=0)
    episode.has_begun = True
    return task, episode


def _say(episode: Episode, message: Message, tokenizer: Tokenizer) -> None:
    pieces = KIMI_K2.turn_pieces(message)
    _take(episode, pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)[0])


def _take(episode: Episode, tokens: list[int]) -> None:
    """Let the model say tokens, up to the end of its turn."""
    sequence = episode.sequence
    for token in tokens:
        if not sequence.is_idle:
            sequence.take(token, logprob=-1.0, version=0)
    run_inline(episode.respond())
    if not episode.is_finished:
        sequence.give(episode.observation, version=0)
        sequence.limit, sequence.is_idle = episode.limit, False


def _finish(episode: Episode) -> Trajectory:
    return episode.trajectory(task=1, sample=0, num_replaced=0)


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
    return _finish(episode)


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
    assert tokenizer.decode(said) == pieces_to_text(KIMI_K2.turn_pieces(message))
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
        ({"max_tokens": 1100, "max_turn_tokens": 299}, Ending.max_tokens),
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
    trajectory = _finish(episode)
    assert trajectory.ending is ending and not trajectory.grade.success and trajectory.reward == 0.0


def test_a_turn_whose_markers_do_not_nest_ends_the_trajectory(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer)
    _take(episode, [tokenizer.special_ids[name] for name in ("</think>", "<|im_end|>")])
    assert _finish(episode).ending is Ending.invalid_turn


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


def test_a_thought_over_its_limit_ends_the_trajectory_and_one_within_it_goes_on(tokenizer: Tokenizer) -> None:
    call = ToolCall(name="get", arguments="{}", id="functions.get:0")
    message = Message(role=Role.assistant, reasoning="one two three four", tool_calls=[call])
    pieces = pieces_to_tokens(KIMI_K2.turn_pieces(message), encode=tokenizer.encode, special_ids=tokenizer.special_ids)[
        0
    ]
    length = pieces.index(tokenizer.special_ids["</think>"]) - 1
    for limit, ending in ((length, None), (length - 1, Ending.thought_too_long)):
        _, episode = _begin(tokenizer, max_think_tokens=limit)
        assert episode.limit == len(episode.sequence.tokens) + limit + 2
        _take(episode, pieces[: limit + 2])
        if ending is None:
            assert not episode.is_finished and episode.observation == []
            _take(episode, pieces[limit + 2 :])
            assert not episode.is_finished and episode.observation
        else:
            assert episode.is_finished and episode.ending is ending


def test_a_trajectory_ends_at_its_number_of_sampled_tokens(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer, max_sampled_tokens=60, max_repeats=100)
    call = ToolCall(name="get", arguments="{}", id="functions.get:0")
    num_turns = 0
    while not episode.is_finished:
        _say(episode, Message(role=Role.assistant, tool_calls=[call]), tokenizer)
        num_turns += 1
    assert episode.ending is Ending.max_sampled_tokens and num_turns > 1
    assert _finish(episode).num_sampled == 60


def test_a_turn_is_cut_off_at_the_number_of_sampled_tokens(tokenizer: Tokenizer) -> None:
    _, episode = _begin(tokenizer, max_sampled_tokens=10)
    _say(episode, Message(role=Role.assistant, content="word " * 40), tokenizer)
    assert episode.ending is Ending.max_sampled_tokens and _finish(episode).num_sampled == 10

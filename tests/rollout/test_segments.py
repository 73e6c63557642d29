"""A trajectory under a context policy has the contexts that demonstrations of the same policy have."""

from collections.abc import Iterator

import pytest

from moetrain.chat.context import NOTE_REQUEST, ContextKind, ContextPolicy
from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.rollout.config import RolloutConfig
from moetrain.rollout.episode import Episode
from moetrain.rollout.reactor import run_inline
from moetrain.rollout.types import Ending, Trajectory
from moetrain.tasks.config import LedgerConfig, TaskConfig
from moetrain.tasks.ledger.family import LedgerFamily
from moetrain.tasks.protocol import Split
from moetrain.tasks.segments import segments
from tests.rollout.scripted import words_tokenizer

FAMILY = LedgerFamily(TaskConfig(name="ledger", tool_failure=0.0, ledger=LedgerConfig(misspell=0.0)), 0)
POLICIES = [
    ContextPolicy(kind=ContextKind.notes, min_calls=1, max_calls=5),
    ContextPolicy(kind=ContextKind.discard, min_calls=2, max_calls=4, keep=1),
    ContextPolicy(kind=ContextKind.hide_results, min_calls=3, max_calls=6, keep=1),
    ContextPolicy(),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return words_tokenizer()


def _episode(tokenizer: Tokenizer, policy: ContextPolicy, **limits: int) -> Episode:
    config = RolloutConfig(**{"max_tokens": 20_000, "max_turn_tokens": 500, "max_turns": 1000, **limits})
    task = FAMILY.task_of_length(Split.train, 1, num_calls=30)
    episode = Episode(task, name="task 1", stream=7, config=config, tokenizer=tokenizer, policy=policy)
    run_inline(episode.begin(FAMILY, declare_tools=False))
    return episode


def _play(episode: Episode, turns: Iterator[list[int]]) -> Trajectory:
    """Let the model say the turns one after another, until the trajectory ends."""
    while not episode.is_finished:
        sequence = episode.sequence
        sequence.give(episode.observation if episode.has_begun else [], version=0)
        episode.has_begun = True
        sequence.limit, sequence.is_idle = episode.limit, False
        for token in next(turns):
            sequence.take(token, logprob=-1.0, version=0)
        run_inline(episode.respond())
    return episode.trajectory(task=1, sample=0, num_replaced=0)


def _turns(tokens: list[int], is_target: list[bool]) -> Iterator[list[int]]:
    run: list[int] = []
    for token, sampled in zip(tokens, is_target, strict=True):
        if sampled:
            run.append(token)
        elif run:
            yield run
            run = []
    if run:
        yield run


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind.value)
def test_a_rollout_has_the_segments_of_a_demonstration(policy: ContextPolicy, tokenizer: Tokenizer) -> None:
    task = FAMILY.task_of_length(Split.train, 1, num_calls=30)
    messages, _ = FAMILY.demonstrate(task, 0, perfect=True)
    shown = list(segments(messages, policy=policy, stream=7, tokenizer=tokenizer))
    turns = (turn for tokens, is_target in shown for turn in _turns(tokens, is_target))
    trajectory = _play(_episode(tokenizer, policy), turns)
    assert trajectory.grade.success and trajectory.progress == 1.0 and trajectory.num_calls == 30
    assert [(segment.tokens, segment.is_sampled) for segment in trajectory.segments] == shown
    assert (len(shown) > 4) == (policy.kind is not ContextKind.full)


def test_a_segment_ends_early_where_the_next_turn_might_not_fit(tokenizer: Tokenizer) -> None:
    policy = ContextPolicy(kind=ContextKind.notes, min_calls=1000, max_calls=1000)
    episode = _episode(tokenizer, policy, max_tokens=2000, max_turn_tokens=300, max_output_tokens=200, max_repeats=50)
    call = ToolCall(name="get", arguments='{"table":"orders","id":"x","column":"text"}', id="functions.get:0")
    turn, note = (
        pieces_to_tokens(KIMI_K2.turn_pieces(message), encode=tokenizer.encode, special_ids=tokenizer.special_ids)[0]
        for message in (
            Message(role=Role.assistant, tool_calls=[call]),
            Message(role=Role.assistant, content="next x"),
        )
    )

    def turns() -> Iterator[list[int]]:
        while True:
            asked = tokenizer.decode(episode.sequence.tokens).count(NOTE_REQUEST)
            yield note if asked else turn

    trajectory = _play(episode, turns())
    assert trajectory.ending is Ending.stalled and len(trajectory.segments) > 2 and trajectory.num_calls == 50
    assert all(500 < len(segment.tokens) <= 2000 for segment in trajectory.segments[:-1])


def test_a_note_that_calls_a_tool_ends_the_trajectory(tokenizer: Tokenizer) -> None:
    policy = ContextPolicy(kind=ContextKind.notes, min_calls=1, max_calls=1)
    call = ToolCall(name="get", arguments="{}", id="functions.get:0")
    turn, _ = pieces_to_tokens(
        KIMI_K2.turn_pieces(Message(role=Role.assistant, tool_calls=[call])),
        encode=tokenizer.encode,
        special_ids=tokenizer.special_ids,
    )
    trajectory = _play(_episode(tokenizer, policy), iter([turn, turn]))
    assert trajectory.ending is Ending.invalid_turn and trajectory.grade.reason == "a note calls a tool"


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        ([Message(role=Role.assistant, content="7")], "a turn has none: let the demonstrator reason"),
        (
            [Message(role=Role.user, content="and now?"), Message(role=Role.assistant, reasoning="so", content="7")],
            "keeps the first question only, and a demonstration has a later one: give full or hide_results",
        ),
    ],
)
def test_a_demonstration_that_notes_cannot_divide_is_refused(
    later: list[Message], reason: str, tokenizer: Tokenizer
) -> None:
    call = ToolCall(name="get", arguments="{}", id="functions.get:0")
    messages = [
        Message(role=Role.user, content="what is it?"),
        Message(role=Role.assistant, reasoning="look", tool_calls=[call]),
        Message(role=Role.tool, name="get", tool_call_id=call.id, content="7"),
        *later,
    ]
    notes = ContextPolicy(kind=ContextKind.notes, min_calls=1, max_calls=1)
    with pytest.raises(DataError, match=reason):
        list(segments(messages, policy=notes, stream=0, tokenizer=tokenizer))
    whole = list(segments(messages, policy=ContextPolicy(), stream=0, tokenizer=tokenizer))
    assert len(whole) == 1


@pytest.mark.parametrize("kind", ContextKind)
def test_a_conversation_without_turns_is_one_segment(kind: ContextKind, tokenizer: Tokenizer) -> None:
    messages = [Message(role=Role.user, content="hello")]
    assert len(list(segments(messages, policy=ContextPolicy(kind=kind), stream=0, tokenizer=tokenizer))) == 1

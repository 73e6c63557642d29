"""Under each chat template a rollout has the tokens that a demonstration of the same conversation trains on."""

from dataclasses import replace

import pytest

from moetrain.chat.context import ContextKind, ContextPolicy
from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.registry import template_named, template_names
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.rollout.types import Ending
from moetrain.tasks.segments import segments
from tests.rollout.scripted import ANSWER, CALL, World, WorldTask, play, script_of


@pytest.fixture(scope="module", params=template_names())
def tokenizer(request) -> Tokenizer:
    return train_tokenizer(["look around, done"], vocab_size=280, template=template_named(request.param))


@pytest.mark.parametrize("turn", [ANSWER, Message(role=Role.assistant, content="yes")])
def test_a_rollout_has_the_tokens_of_its_demonstration(tokenizer: Tokenizer, turn: Message) -> None:
    call = ToolCall(name="look", arguments='{"at":2}', id="functions.look:1")
    both = replace(CALL, tool_calls=[*CALL.tool_calls, call])
    (trajectory,) = play([WorldTask(make=World)], tokenizer, script=script_of(both, turn))
    assert trajectory.ending is Ending.answered and trajectory.num_calls == 2 and trajectory.num_errors == 0
    results = [
        Message(role=Role.tool, name="look", tool_call_id=f"functions.look:{number}", content="a stone")
        for number in range(2)
    ]
    messages = [*WorldTask(make=World).prompt, both, *results, turn]
    ((tokens, is_target),) = segments(messages, policy=ContextPolicy(), stream=0, tokenizer=tokenizer)
    (segment,) = trajectory.segments
    length = len(segment.tokens)
    assert (segment.tokens, segment.is_sampled) == (tokens[:length], is_target[:length])
    assert tokenizer.decode(tokens[length:]).strip() == "" and not any(is_target[length:])


def test_a_call_that_cannot_be_read_becomes_an_error_that_shows_the_form(tokenizer: Tokenizer) -> None:
    bad = replace(CALL, tool_calls=[ToolCall(name="", arguments="[1", id="look")])
    (trajectory,) = play([WorldTask(make=World)], tokenizer, script=script_of(bad, ANSWER))
    assert trajectory.ending is Ending.answered and trajectory.num_errors == 1
    assert "error: " in tokenizer.decode(trajectory.segments[0].tokens)


@pytest.mark.parametrize("kind", [ContextKind.hide_results, ContextKind.discard, ContextKind.notes])
def test_segments_of_demonstrations_are_those_of_rollouts(tokenizer: Tokenizer, kind: ContextKind) -> None:
    turns = [
        replace(CALL, tool_calls=[replace(CALL.tool_calls[0], id=f"functions.look:{number}")]) for number in range(4)
    ]
    messages = [*WorldTask(make=World).prompt]
    for turn in turns:
        identity = turn.tool_calls[0].id
        messages += [turn, Message(role=Role.tool, name="look", tool_call_id=identity, content="a stone")]
    policy = ContextPolicy(kind=kind, min_calls=2, max_calls=2, keep=1)
    found = list(segments([*messages, ANSWER], policy=policy, stream=0, tokenizer=tokenizer))
    assert len(found) == 3
    for tokens, _ in found:
        text = tokenizer.decode(tokens)
        assert text.count("what is there?") == 1 and text.endswith(tokenizer.decode([tokenizer.turn_end_id]))

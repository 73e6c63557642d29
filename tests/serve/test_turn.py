"""Turns read token by token: the same as `parse_turn` where markers nest, and readable where they do not."""

import random
from collections.abc import Sequence

import pytest

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.templates.kimi_k2 import (
    CALL_ARGUMENT,
    CALL_BEGIN,
    CALL_END,
    IM_USER,
    KIMI_K2,
    SECTION_BEGIN,
    SECTION_END,
    THINK_BEGIN,
    THINK_END,
)
from moetrain.data.tokenizer import Tokenizer
from moetrain.serve.turn import Arguments, CallBegin, CallEnd, Content, Event, Reasoning, StopStrings, TurnReader
from tests.even_task import even_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return even_tokenizer()


def _read(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[TurnReader, list[Event]]:
    reader = TurnReader(tokenizer)
    events = [event for token in tokens for event in reader.push(token)]
    return reader, [*events, *reader.finish()]


def _message(events: Sequence[Event]) -> Message:
    message = Message(role=Role.assistant)
    for event in events:
        if isinstance(event, Reasoning):
            message.reasoning += event.text
        elif isinstance(event, Content):
            message.content += event.text
        elif isinstance(event, CallBegin):
            assert event.number == len(message.tool_calls)
            identity = call_id(event.name, event.number)
            message.tool_calls.append(ToolCall(name=event.name, arguments="", id=identity))
        elif isinstance(event, Arguments):
            message.tool_calls[event.number].arguments += event.text
        elif isinstance(event, CallEnd):
            assert event.number == len(message.tool_calls) - 1
    return message


def _text(stream: random.Random) -> str:
    return "".join(stream.choice(["a", " b", "é", "北", "🙂", "\n", "{", '"']) for _ in range(stream.randrange(12)))


def test_a_turn_read_by_tokens_is_the_turn_parsed_as_a_whole(tokenizer: Tokenizer) -> None:
    stream = random.Random(2)
    for _ in range(60):
        calls = [
            ToolCall(name=stream.choice(["look", "a.b-c"]), arguments="{}" + _text(stream), id="")
            for _ in range(stream.randrange(3))
        ]
        for number, call in enumerate(calls):
            call.id = call_id(call.name, number)
        turn = Message(role=Role.assistant, reasoning=_text(stream), content=_text(stream), tool_calls=calls)
        tokens, _ = pieces_to_tokens(
            KIMI_K2.turn_pieces(turn), encode=tokenizer.encode, special_ids=tokenizer.special_ids
        )
        parsed = KIMI_K2.parse_turn(
            tokens, decode=tokenizer.decode, special_names=tokenizer.special_names, first_index=0
        )
        reader, events = _read(tokenizer, tokens[:-1])
        assert _message(events) == parsed and reader.num_stray == 0
        assert reader.num_reasoning == len(tokenizer.encode(turn.reasoning))


def test_any_bytes_decode_as_they_do_together(tokenizer: Tokenizer) -> None:
    stream = random.Random(3)
    ordinary = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_names]
    for _ in range(60):
        tokens = stream.choices(ordinary, k=20)
        _, events = _read(tokenizer, tokens)
        assert _message(events).content == tokenizer.decode(tokens)


def test_markers_in_a_wrong_place_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    def tokens(*parts: str) -> list[int]:
        markers = tokenizer.special_ids
        return [token for part in parts for token in ([markers[part]] if part in markers else tokenizer.encode(part))]

    # The released Kimi K2 Thinking may call without ending its reasoning.
    call = (CALL_BEGIN, "functions.look:7", CALL_ARGUMENT, CALL_END, SECTION_END)
    reader, events = _read(tokenizer, tokens(THINK_BEGIN, "hm", SECTION_BEGIN, *call))
    turn = _message(events)
    assert (turn.reasoning, turn.content, reader.num_stray) == ("hm", "", 0)
    assert [(c.name, c.arguments) for c in turn.tool_calls] == [("look", "{}")]
    reader, events = _read(tokenizer, tokens("a", THINK_END, "b", CALL_END, IM_USER, "c"))
    assert _message(events).content == "abc" and reader.num_stray == 3
    reader, events = _read(
        tokenizer, tokens(SECTION_BEGIN, "x", CALL_BEGIN, "look at: it", CALL_ARGUMENT, "{", CALL_END, SECTION_END, "y")
    )
    assert _message(events).tool_calls[0].name == "look_at_it" and reader.num_stray == 3
    _, events = _read(tokenizer, tokens(SECTION_BEGIN, CALL_BEGIN, "functions.look:0", CALL_ARGUMENT, '{"at"'))
    assert not any(isinstance(event, CallEnd) for event in events)


def test_stop_strings_are_found_however_the_text_is_split() -> None:
    stream = random.Random(4)
    for _ in range(400):
        text = "".join(stream.choice("ab.") for _ in range(stream.randrange(20)))
        stops = ["".join(stream.choice("ab.") for _ in range(stream.randrange(1, 5))) for _ in range(3)]
        filter_, found, rest = StopStrings(stops), "", text
        while rest:
            size = stream.randrange(1, 4)
            found += filter_.push(rest[:size])
            rest = rest[size:]
        found += filter_.finish()
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert filter_.is_found == bool(ends)
        assert found == (text[: min(ends)[1]] if ends else text)

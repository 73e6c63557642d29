"""Constrained turns of a model with random weights: all parse, and all calls and answers match their schemas."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from moetrain.chat.grammar import Calls, turn_grammar
from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import pieces_to_tokens
from moetrain.chat.registry import template_named, template_names
from moetrain.chat.templates.kimi_k2 import (
    CALL_ARGUMENT,
    CALL_END,
    IM_END,
    KIMI_K2,
    SECTION_BEGIN,
    SECTION_END,
    THINK_END,
)
from moetrain.chat.tool_schema import ToolSpec
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.errors import ConfigError
from moetrain.inference.build import build_model
from moetrain.inference.engine import GenerationEngine
from moetrain.inference.guided import Guide
from moetrain.inference.protocol import Model, Sequence
from moetrain.inference.sampling import Sampling
from moetrain.model.transformer import Transformer, initialize
from moetrain.quant.config import QuantConfig
from moetrain.tools.call import parse_arguments
from tests.even_task import MODEL, even_tokenizer

LOOK = ToolSpec(
    name="look",
    description="",
    parameters={
        "type": "object",
        "properties": {"at": {"type": "integer", "minimum": 0, "maximum": 99}, "how": {"enum": ["up", "down"]}},
        "required": ["at"],
        "additionalProperties": False,
    },
)
STOP = ToolSpec(name="stop-it", description="", parameters={"type": "object", "additionalProperties": False})
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def parts() -> tuple[Tokenizer, Model, Guide]:
    tokenizer = even_tokenizer()
    model = Transformer(MODEL, compute_dtype=torch.float32)
    initialize(model, 1)
    weights = build_model(model.state_dict(), config=MODEL, quant=QuantConfig(), library=None, dtype=torch.float32)
    return tokenizer, weights, Guide(tokenizer, end_id=tokenizer.special_ids[IM_END])


def _turns(parts: tuple[Tokenizer, Model, Guide], grammar: str, *, number: int = 12) -> list[Sequence]:
    """Return finished turns under `grammar`. A bias towards markers and closing characters keeps them short."""
    tokenizer, weights, guide = parts
    markers = (THINK_END, SECTION_BEGIN, SECTION_END, CALL_ARGUMENT, CALL_END, IM_END)
    likely = [tokenizer.special_ids[name] for name in markers] + [tokenizer.encode(text)[0] for text in ('"', "{", "}")]
    sampling = Sampling(logit_bias=tuple((token, 4.0) for token in likely))
    engine = GenerationEngine(weights, num_slots=number, max_tokens=100)
    sequences = [
        Sequence(
            tokens=[tokenizer.bos_id],
            stream=stream,
            limit=100,
            stop_ids=frozenset(tokenizer.end_ids),
            sampling=sampling,
            constraint=guide.constraint(grammar),
        )
        for stream in range(number)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.is_busy:
        engine.step()
    return [sequence for sequence in sequences if sequence.tokens[-1] in sequence.stop_ids]


def _parsed(tokenizer: Tokenizer, sequence: Sequence) -> Message:
    return KIMI_K2.parse_turn(
        sequence.tokens[1:], decode=tokenizer.decode, special_names=tokenizer.special_names, first_index=0
    )


@pytest.mark.parametrize("calls", list(Calls))
@pytest.mark.parametrize("schema", [None, ANSWER])
@pytest.mark.parametrize("one_call", [False, True])
def test_every_finished_turn_parses_and_matches_its_schemas(
    parts: tuple[Tokenizer, Model, Guide], calls: Calls, schema: dict[str, Any] | None, one_call: bool
) -> None:
    tokenizer = parts[0]
    specs = {spec.name: spec for spec in (LOOK, STOP)}
    grammar = turn_grammar(
        [LOOK, STOP], template=KIMI_K2, special_ids=tokenizer.special_ids, calls=calls, schema=schema, one_call=one_call
    )
    finished = _turns(parts, grammar)
    assert len(finished) >= 6
    found: Counter[str] = Counter()
    for sequence in finished:
        turn = _parsed(tokenizer, sequence)
        assert turn.role is Role.assistant
        for call in turn.tool_calls:
            parse_arguments(specs[call.name], call.arguments)
            found["calls"] += 1
        if one_call:
            assert len(turn.tool_calls) <= 1
        if calls is Calls.required:
            assert turn.tool_calls and not turn.content
        if calls is Calls.none:
            assert not turn.tool_calls
        if schema is not None and not turn.tool_calls:
            answer = json.loads(turn.content)
            assert isinstance(answer["ok"], bool) and 0 <= answer["n"] <= 9
            found["answers"] += 1
    assert calls is Calls.none or found["calls"]
    assert schema is None or calls is Calls.required or found["answers"]


def test_a_turn_may_begin_after_its_reasoning_and_the_free_logprob_is_recorded(
    parts: tuple[Tokenizer, Model, Guide],
) -> None:
    tokenizer = parts[0]
    grammar = turn_grammar(
        [STOP], template=KIMI_K2, special_ids=tokenizer.special_ids, calls=Calls.required, thinks=False
    )
    for sequence in _turns(parts, grammar, number=4):
        assert tokenizer.special_names[sequence.tokens[1]] == SECTION_BEGIN
        assert sequence.logprobs[1] == 0.0 and sequence.free_logprobs[1] < -1
        assert sequence.free_logprobs.keys() == set(range(1, len(sequence.tokens)))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"not": {"type": "string"}}, r'Unimplemented keys: \["not"\]'),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"$ref": "http://example.org/schema"}, "not present in a registry"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_with_its_reason(
    parts: tuple[Tokenizer, Model, Guide], schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        parts[2].constraint(turn_grammar([], template=KIMI_K2, special_ids=parts[0].special_ids, schema=schema))


def test_a_constraint_that_met_a_wrong_token_ends_the_sequence_and_says_why(
    parts: tuple[Tokenizer, Model, Guide],
) -> None:
    tokenizer, _, guide = parts
    constraint = guide.constraint(turn_grammar([STOP], template=KIMI_K2, special_ids=tokenizer.special_ids))
    assert not constraint.problem
    constraint.advance(tokenizer.special_ids[IM_END])
    assert constraint.allowed().nonzero()[0].tolist() == [tokenizer.special_ids[IM_END]]
    assert constraint.problem


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("content", ["yes", ""])
@pytest.mark.parametrize("calls", [Calls.auto, Calls.required])
def test_the_grammar_of_each_template_allows_its_own_turns(name: str, content: str, calls: Calls) -> None:
    if content and calls is Calls.required:
        return
    row = template_named(name)
    tokenizer = train_tokenizer(["look stop-it yes"], vocab_size=280, template=row)
    guide = Guide(tokenizer, end_id=tokenizer.turn_end_id)
    called = [
        ToolCall(name="look", arguments='{"at": 7}', id="functions.look:0"),
        ToolCall(name="stop-it", arguments="{}", id="functions.stop-it:1"),
    ]
    turn = Message(role=Role.assistant, reasoning="r", content=content, tool_calls=called)
    begun = len(row.prefill(thinks=True, after=Role.user))
    pieces = row.turn_pieces(turn, Role.user)[begun:]
    tokens, _ = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
    for one_call in (False, True):
        grammar = turn_grammar(
            [LOOK, STOP], template=row, special_ids=tokenizer.special_ids, calls=calls, one_call=one_call
        )
        constraint = guide.constraint(grammar)
        allowed = []
        for token in tokens:
            allowed.append(bool(constraint.allowed()[token]))
            constraint.advance(token)
        assert all(allowed) != one_call  # two calls are one too many

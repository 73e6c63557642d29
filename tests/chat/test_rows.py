"""What each chat template of the registry promises: its Jinja gives the same text, and turns survive tokens."""

import json
import random
import re
from typing import Any

import jinja2
import pytest

from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import Piece, pieces_to_text, pieces_to_tokens
from moetrain.chat.records import read_conversation, read_declaration
from moetrain.chat.registry import AUTO, recognised, register, template_named, template_names
from moetrain.chat.template import ChatTemplate
from moetrain.data.tokenizer import Tokenizer, train_tokenizer
from moetrain.errors import ConfigError, DataError
from moetrain.serve.turn import Arguments, CallBegin, Content, Reasoning, TurnReader
from tests.chat.test_jinja import Draw, template

ROWS = [template_named(name) for name in template_names()]
TOOL = {
    "type": "function",
    "function": {"name": "get", "description": "gets", "parameters": {"type": "object", "properties": {"é": {}}}},
}


def tokenizer_of(row: ChatTemplate) -> Tokenizer:
    return train_tokenizer(["a plain text"], vocab_size=280, template=row)


def by_name(row: ChatTemplate) -> str:
    return row.name


def ours(row: ChatTemplate, messages: list[Any], tools: Any) -> str:
    read = read_conversation(messages)
    pieces = row.conversation_pieces(read, read_declaration(tools))
    return pieces_to_text([*pieces, *row.generation_prompt(read[-1].role)])


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_the_jinja_template_of_a_row_gives_its_text_or_raises(row: ChatTemplate) -> None:
    jinja = template(row.jinja)
    num_equal = num_with_results = 0
    for seed in range(400):
        draw = Draw(seed, 0.02)
        messages, tools = [*draw.conversation(), {"role": "assistant", "content": "A"}], draw.tools()
        if not row.has_names:
            messages = [{key: value for key, value in item.items() if key != "name"} for item in messages]
        if seed % 2:
            messages.append({"role": "user", "content": "Q"})
        try:
            expected = ours(row, messages, tools)
            rendered = jinja.render(messages=messages, tools=tools, add_generation_prompt=True)
        except (DataError, jinja2.exceptions.TemplateError):
            continue
        assert rendered == expected, messages
        num_equal += 1
        num_with_results += any(item["role"] == "tool" for item in messages)
    assert num_equal > 50 and num_with_results > 2


def draw_turn(stream: random.Random) -> Message:
    texts = ["", "a", "é\n", "\n\nb", "{'x'}\n\n", "北京 🙂"]
    calls = [
        ToolCall(name=stream.choice(["look", "a.b-c"]), arguments=json.dumps({"x": stream.choice(texts)}), id="")
        for _ in range(stream.randrange(3))
    ]
    for number, call in enumerate(calls):
        call.id = f"functions.{call.name}:{number}"
    reasoning, content = stream.choice(texts), stream.choice(texts)
    return Message(role=Role.assistant, reasoning=reasoning, content=content, tool_calls=calls)


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_turns_survive_tokens_as_a_whole_and_one_by_one(row: ChatTemplate) -> None:
    tokenizer, stream = tokenizer_of(row), random.Random(4)
    for _ in range(80):
        turn = draw_turn(stream)
        pieces = row.turn_pieces(turn, stream.choice([None, Role.user, Role.tool]))
        tokens, is_sampled = pieces_to_tokens(pieces, encode=tokenizer.encode, special_ids=tokenizer.special_ids)
        assert all(is_sampled) and tokens[-1] == tokenizer.turn_end_id
        parsed = row.parse_turn(tokens, decode=tokenizer.decode, special_names=tokenizer.special_names, first_index=0)
        assert parsed == turn
        reader = TurnReader(tokenizer)
        events = [event for token in tokens[:-1] for event in reader.push(token)] + list(reader.finish())
        assert reader.num_stray == 0
        assert "".join(event.text for event in events if isinstance(event, Reasoning)) == turn.reasoning
        assert "".join(event.text for event in events if isinstance(event, Content)) == turn.content
        assert [event.name for event in events if isinstance(event, CallBegin)] == [c.name for c in turn.tool_calls]
        for number, call in enumerate(turn.tool_calls):
            texts = [event.text for event in events if isinstance(event, Arguments) and event.number == number]
            assert "".join(texts) == call.arguments


@pytest.mark.parametrize("row", ROWS, ids=by_name)
@pytest.mark.parametrize("thinks", [True, False])
def test_a_server_begins_a_turn_as_the_template_writes_it(row: ChatTemplate, thinks: bool) -> None:
    tokenizer = tokenizer_of(row)
    ids = tokenizer.special_ids
    begun = row.prefill(thinks=thinks, after=Role.user)
    turn = row.turn_pieces(Message(role=Role.assistant, reasoning="r", content="yes"), Role.user)
    rest = turn[len(begun) : -1] if thinks else [Piece(text="yes")]
    reader = TurnReader(tokenizer, prefilled=pieces_to_tokens(begun, encode=tokenizer.encode, special_ids=ids)[0])
    tokens, _ = pieces_to_tokens(rest, encode=tokenizer.encode, special_ids=ids)
    events = [event for token in tokens for event in reader.push(token)] + list(reader.finish())
    assert "".join(event.text for event in events if isinstance(event, Content)) == "yes"
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == "r" * thinks
    assert reader.num_stray == 0 and (thinks or begun)


CALLS = [
    {"id": "x", "function": {"name": "get", "arguments": {"a": 1}}},
    {"id": "y", "function": {"name": "find", "arguments": '{"b":2}'}},
]
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "y", "content": "two"},
    {"role": "tool", "tool_call_id": "x", "content": "one"},
    {"role": "assistant", "content": "A"},
]
RENDERED = {
    "deepseek_v3": (
        "<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{"b":2}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜>"
        "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>two<｜tool▁output▁end｜>"
        "<｜tool▁outputs▁end｜>A<｜end▁of▁sentence｜>"
    ),
    "deepseek_v31": (
        "<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜></think><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>get<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>find<｜tool▁sep｜>{"b":2}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜><｜tool▁output▁begin｜>two<｜tool▁output▁end｜>"
        "A<｜end▁of▁sentence｜>"
    ),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find", "arguments": {"b":2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_conversation_reads_as_the_released_templates_write_it(name: str) -> None:
    row = template_named(name)
    messages = read_conversation(MESSAGES)
    assert pieces_to_text(row.conversation_pieces(messages)) == RENDERED[name]
    learned = [piece for piece in row.conversation_pieces(messages) if piece.is_sampled]
    assert pieces_to_text(learned).count(row.syntax.end) == 2 and not any("one" in piece.text for piece in learned)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.has_ids], ids=by_name)
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([*MESSAGES[:4], MESSAGES[5]], "a turn needs one result for each of its calls .2., and has 1"),
        ([*MESSAGES[1:], {"role": "system", "content": "late"}], "a place for system messages at the beginning only"),
        ([{**MESSAGES[1], "name": "Ann"}], "has no place for the name 'Ann' of a message of the role user"),
    ],
)
def test_what_a_template_cannot_render_is_refused(row: ChatTemplate, messages: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        row.conversation_pieces(read_conversation(messages))


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_tools_are_declared_before_the_first_question(row: ChatTemplate) -> None:
    text = pieces_to_text(row.conversation_pieces(read_conversation(MESSAGES[1:2]), read_declaration([TOOL])))
    declared, question = text.index("gets"), re.search(r"\bQ\b", text)
    assert question and declared < question.start()


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_a_tokenizers_own_template_is_recognised(row: ChatTemplate, tmp_path) -> None:
    tokenizer = tokenizer_of(row)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.template is row and loaded.digest == tokenizer.digest and loaded.end_ids == tokenizer.end_ids
    others = {loaded.with_template(other).digest for other in ROWS if other is not row}
    assert len(others) == len(ROWS) - 1 and loaded.digest not in others
    assert recognised(row.special_tokens, jinja=row.jinja) is row
    loaded.check_chat()
    text = "".join(row.special_tokens)
    assert not set(loaded.encode(text)) & set(loaded.special_names) and loaded.decode(loaded.encode(text)) == text


def test_a_released_jinja_template_tells_deepseek_v3_from_v31() -> None:
    tokens = template_named("deepseek_v3").special_tokens
    for jinja, name in [("{{ '\\n```json\\n' }}", "deepseek_v3"), ("{{ '<｜tool▁sep｜>' }}", "deepseek_v31")]:
        found = recognised(tokens, jinja=jinja)
        assert found is not None and found.name == name
    assert recognised(["<|endoftext|>"]) is None


def test_another_form_of_a_template_is_named_in_the_log(tmp_path, caplog) -> None:
    tokenizer_of(template_named("chatml")).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>{{ messages }}")
    caplog.set_level("INFO")
    assert Tokenizer.load(tmp_path).template.name == "chatml"
    assert f"{tmp_path}: its chat template is a form of chatml, which is used" in caplog.text


def test_an_unknown_template_and_a_name_that_is_taken_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.tokenizer.template is llama: give auto or one of chatml, deepseek_v3"):
        template_named("llama")
    with pytest.raises(ConfigError, match="kimi_k2 is registered already"):
        register(template_named(AUTO))

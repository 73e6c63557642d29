import json
import re
import time

import pytest

from moetrain.chat.messages import Role
from moetrain.chat.records import read_conversation, read_declaration, read_messages, with_outer_objects
from moetrain.errors import DataError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def call(name: str, arguments: object = "{}", **rest: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **rest}


def calls(*calls: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(content: str, **rest: object) -> dict[str, object]:
    return {"role": "tool", "content": content, **rest}


def test_ids_are_numbered_over_the_conversation_and_results_follow_their_call() -> None:
    messages = read_messages(
        [
            USER,
            calls(call("get", id="call_a1"), call("find", id="call_b2")),
            result("found", tool_call_id="call_b2"),
            result("got", tool_call_id="call_a1"),
            calls(call("get", id="call_a1")),
            result("again", tool_call_id="call_a1"),
            ANSWER,
        ]
    )
    assert [c.id for m in messages for c in m.tool_calls] == ["functions.get:0", "functions.find:1", "functions.get:2"]
    assert [m.tool_call_id for m in messages if m.role is Role.tool] == [
        "functions.find:1",
        "functions.get:0",
        "functions.get:2",
    ]


def test_results_without_ids_belong_to_the_calls_in_order_or_by_name() -> None:
    two = calls(call("get"), call("get"))
    in_order = read_messages([USER, two, result("1", name="get"), result("2", name="get"), ANSWER])
    assert [m.tool_call_id for m in in_order[2:4]] == ["functions.get:0", "functions.get:1"]
    by_name = read_messages([calls(call("get"), call("find")), result("1", name="find"), result("2", name="get")])
    assert [m.tool_call_id for m in by_name[1:]] == ["functions.find:1", "functions.get:0"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([calls(call("get"), call("get")), result("1"), ANSWER], "fewer tool results without ids than"),
        ([calls(call("get"), call("get")), result("1"), calls(call("get"))], "fewer tool results without ids than"),
        ([calls(call("get")), result("1"), result("2")], "no call of the turn before matches"),
        ([calls(call("get")), result("1", name="find")], "no call of the turn before matches"),
        (
            [calls(call("get", id="a")), result("1", tool_call_id="a", name="find")],
            "'a' has the name 'find', and its call has 'get'",
        ),
        ([calls(call("get", id="x")), result("1", tool_call_id="y")], "tool_call_id is 'y': no call"),
        ([calls(call("get", id="x"), call("get", id="x"))], "two calls of one turn have the same id"),
        ([result("1", tool_call_id="x"), ANSWER], "message 0: tool_call_id is 'x'"),
    ],
)
def test_results_whose_call_is_not_clear_are_refused(messages: list[dict[str, object]], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        read_messages(messages)


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": None}])
@pytest.mark.parametrize("on", [{}, {"weight": 1}, {"train": True}, {"weight": None}])
def test_turns_that_are_switched_off_are_not_learned(off: dict[str, object], on: dict[str, object]) -> None:
    messages = read_messages([USER, {**ANSWER, **off}, {**USER, **off}, {**ANSWER, **on}])
    assert [message.is_learned for message in messages[1::2]] == [False, True]


def test_the_older_forms_of_openai_and_sharegpt_are_read() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "read", "arguments": '{"a": 1}'}}
    messages = read_messages([USER, old, {"role": "function", "name": "read", "content": "21"}, ANSWER])
    assert messages[1].tool_calls[0].id == messages[2].tool_call_id == "functions.read:0"
    assert messages[1].tool_calls[0].arguments == '{"a": 1}'
    sharegpt = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    chat = [{"role": "developer", "content": "S"}, USER, ANSWER]
    assert read_messages(sharegpt) == read_messages(chat)


def test_calls_and_results_of_sharegpt_are_read() -> None:
    calls = '[{"name": "get", "arguments": {"a": 1}}, {"name": "find", "arguments": "{}"}]'
    messages = read_messages(
        [
            *({"from": "human", "value": "Q"}, {"from": "function_call", "value": calls}),
            *({"from": "observation", "value": "1"}, {"from": "observation", "value": "2"}),
            {"from": "gpt", "value": "A"},
        ]
    )
    assert [call.id for call in messages[1].tool_calls] == ["functions.get:0", "functions.find:1"]
    assert [message.tool_call_id for message in messages[2:4]] == ["functions.get:0", "functions.find:1"]
    assert [call.arguments for call in messages[1].tool_calls] == ['{"a": 1}', "{}"]
    one = json.dumps(json.loads(calls)[0])
    hermes = [
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": f"<think>\nR\n</think>\nwait\n<tool_call>\n{one}\n</tool_call>\n"},
        {"from": "tool", "value": "<tool_response>\n1\n</tool_response>"},
        {"from": "gpt", "value": "the tag <tool_call> begins a call"},
    ]
    found = read_messages(hermes)
    assert (found[1].reasoning, found[1].content, found[1].tool_calls[0].arguments) == ("R", "wait", '{"a": 1}')
    assert (found[2].content, found[2].tool_call_id) == ("1", "functions.get:0")
    assert found[3].content == "the tag <tool_call> begins a call" and not found[3].tool_calls
    bare = {"name": "get", "description": "d", "parameters": {}}
    declared = read_declaration(with_outer_objects(json.dumps([bare])))
    assert declared == read_declaration([{"type": "function", "function": bare}])


@pytest.mark.parametrize(
    "content",
    [
        "<think>\nR\n</think>\n\nA",
        [{"type": "thinking", "thinking": "R", "signature": "x"}, {"type": "text", "text": "A"}],
        [{"type": "reasoning", "text": "R"}, {"type": "output_text", "text": "A"}],
    ],
)
def test_reasoning_is_read_from_the_content(content: object) -> None:
    (message,) = read_messages([{"role": "assistant", "content": content}])
    assert (message.reasoning, message.content) == ("R", "A")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(key: str) -> None:
    assert read_messages([{**ANSWER, key: "R"}])[0].reasoning == "R"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**ANSWER, "contnet": "x"}, "the message has the unknown key 'contnet'; did you mean content?"),
        ({**ANSWER, "zzz": "x"}, "unknown key 'zzz'; known are role, content, name"),
        ({**ANSWER, "weight": 0.5}, "weight is 0.5: give 0 or 1"),
        ({**ANSWER, "train": "no"}, "train is 'no': give 0 or 1"),
        ({**ANSWER, "weight": 0, "train": True}, "give one of the two"),
        ({**USER, "train": True}, "only assistant messages are learned"),
        ({**ANSWER, "refusal": "no"}, "refusal holds str 'no', which is not supported"),
        ({**ANSWER, "content": None}, "an assistant message is empty"),
        ({**ANSWER, "content": ""}, "an assistant message is empty"),
        ({**ANSWER, "content": "<think>r</think>A", "thinking": "r"}, "content begins with <think> and reasoning_con"),
        ({**ANSWER, "content": "<think>r"}, "content begins with <think> without </think>: give reasoning_content"),
        ({**ANSWER, "reasoning": "a", "thinking": "b"}, "hold different texts"),
        ({**USER, "tool_calls": [call("f")]}, "has calls or reasoning: only assistant messages"),
        ({**ANSWER, "tool_call_id": "x"}, "only tool results may have one"),
        ({**calls(call("f")), "function_call": {"name": "f"}}, "tool_calls and function_call: give one"),
        (calls(call("f", "{'city': Oslo")), "function.arguments of f holds str"),
        (calls(call("f", "[1]")), "function.arguments of f holds str '[1]'"),
        (calls(call("f", [])), "function.arguments of f holds list"),
        (calls(call("f", '{"a": NaN}')), "(NaN is no JSON): give an object, or its JSON text"),
        (calls(call("f", '{"a": 1, "a": 2}')), "(the key 'a' is there twice in one object): give an object"),
        (calls(call("f", '{"a": [-Infinity]}')), "function.arguments of f holds str"),
        (calls(call("f", '{"a": 1e999}')), "function.arguments of f holds str"),
        (calls(call("f", {"a": float("nan")})), "function.arguments of f hold NaN or an infinity"),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"a": NaN}}'}, "give JSON with name"),
        (calls(call("f", index=0)), "a tool call has the unknown key 'index'"),
        (calls({"function": {"name": "f", "args": {}}}), "function of a tool call has the unknown key 'args'"),
        (calls(call("f") | {"type": "custom"}), "type of a tool call is 'custom'"),
        (calls({"name": "f", "arguments": {}}), "give function.name"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}, "a part of content has the unknown"),
        (
            {"from": "function_call", "value": "{}"},
            "a function_call or <tool_call> holds str '{}': give JSON",
        ),
        ({"from": "robot", "value": "x"}, "from is 'robot': give one of system, human, user"),
        ({**ANSWER, "content": [{"type": "thinking", "thinking": "a"}], "reasoning": "b"}, "hold different texts"),
        ({"from": "gpt", "value": "A", "content": "B"}, "the message has the unknown key 'content'"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused_with_its_number(message: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match="message 1: .*" + re.escape(said)):
        read_messages([USER, message, ANSWER])


def test_declarations_are_read_from_a_list_or_its_json_text() -> None:
    one = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    text = '[{"type":"function","function":{"name":"f","parameters":{"type":"object"}}}]'
    assert read_declaration(one) == read_declaration(text.replace(",", ", ")) == text
    assert read_declaration(None) == read_declaration([]) == read_declaration("") == ""


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("[", "tools holds text that is not JSON"),
        ({"f": 1}, "give a list of declarations"),
        ('[{"name": "f", "parameters": {"maximum": NaN}}]', "NaN is no JSON; give a list of declarations"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"maximum": float("inf")}}}], "hold NaN or an"),
        ([{"name": "f", "parameters": {}}], "a declaration in tools is dict"),
        ([{"type": "function", "function": {"name": "f", "parametres": {}}}], "did you mean parameters?"),
        ([{"type": "function", "fn": 1, "function": {"name": "f"}}], "has the unknown key 'fn'"),
    ],
)
def test_declarations_of_another_form_are_refused(tools: object, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        read_declaration(tools)


def test_results_of_many_calls_are_matched_in_any_order() -> None:
    """6,000 calls take a tenth of a second; looking each result up among all calls took four seconds."""
    number = 6000
    calls = [{"id": f"c{index}", "function": {"name": "f", "arguments": "{}"}} for index in range(number)]
    results = [{"role": "tool", "content": "r", "tool_call_id": f"c{index}"} for index in reversed(range(number))]
    start = time.monotonic()
    messages = read_conversation([{"role": "assistant", "tool_calls": calls}, *results])
    assert time.monotonic() - start < 2
    assert [message.tool_call_id for message in messages[1:]] == [f"functions.f:{i}" for i in reversed(range(number))]


def test_results_without_ids_are_matched_by_name_in_order() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "content": "x", "name": name} for name in ("g", "f", "f")]
    messages = read_conversation([{"role": "assistant", "tool_calls": calls}, *results])
    assert [message.tool_call_id for message in messages[1:]] == ["functions.g:1", "functions.f:0", "functions.f:2"]
    with pytest.raises(DataError, match="no call of the turn before matches; calls without a result are f"):
        read_conversation([{"role": "assistant", "tool_calls": calls}, *results[:2], results[0]])

"""The exported Jinja template against our own rendering, on conversations drawn at random with odd parts."""

import json
import random
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

from moetrain.chat.pieces import pieces_to_text
from moetrain.chat.records import read_declaration, read_messages
from moetrain.chat.templates.kimi_k2 import KIMI_K2
from moetrain.data.config import MIN_VOCAB_SIZE
from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import DataError

NUM_DRAWS = 600
NAMES = ["get", "send-mail", "a.b"]
TEXTS = ["", "x", " two words\n", "{{ x }} {% y %}", "é 漢 <b>&'\"", "<|im_end|>", "<think>r</think>a", "  "]
IDS = ["call_a1", "functions.get:0", "functions.get:7", "x"]
CONTENTS = [*TEXTS, None, [], [{"type": "text", "text": "p"}, {"type": "text", "text": "q\n"}]]
ODD_CONTENTS = [["p"], [{"type": "image_url", "image_url": "u"}], {"type": "text", "text": "p"}, 5, False, [None]]
ARGUMENTS = ["{}", '{"a": 1}', ' {"b":"é"} ', {"a": 1, "b": ["é", None, "<'>"]}, {"a": None}, {}, None, ""]
ODD_ARGUMENTS = [5, [], ["a"], False, "{'a': 1}", "[1]"]


def template(jinja: str = KIMI_K2.jinja) -> jinja2.Template:
    """Return the template as transformers compiles it."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(jinja)


def ours(messages: list[Any], tools: Any) -> str:
    declared = read_declaration(tools)
    return pieces_to_text(
        [*KIMI_K2.conversation_pieces(read_messages(messages), declared), *KIMI_K2.generation_prompt()]
    )


class Draw:
    """Conversations from one seeded stream; a part is odd with the probability `oddness`."""

    def __init__(self, seed: int, oddness: float) -> None:
        self._stream = random.Random(seed)
        self._oddness = oddness

    def _pick(self, usual: list[Any], odd: list[Any]) -> Any:
        return self._stream.choice(odd if self._stream.random() < self._oddness else usual)

    def _optional(self, item: dict[str, Any], key: str, usual: list[Any], odd: list[Any]) -> None:
        if self._stream.random() < 0.5:
            item[key] = self._pick(usual, odd)

    def _call(self, number: int) -> dict[str, Any]:
        function = {"name": self._pick(NAMES, ["a:b", None, 5]), "arguments": self._pick(ARGUMENTS, ODD_ARGUMENTS)}
        if self._stream.random() < 0.1:
            del function["arguments"]
        call = {"type": "function", "function": function, "id": self._pick([f"id{number}"], [*IDS, None, "", 5])}
        return {"function": {"name": "get"}} if self._stream.random() < self._oddness / 2 else call

    def conversation(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        ids: list[Any] = []
        for _ in range(self._stream.randint(1, 6)):
            if ids and self._stream.random() < 0.9:
                item = {"role": "tool", "tool_call_id": self._pick([ids.pop(0)], [None, "", *IDS])}
                item["content"] = self._pick(CONTENTS, ODD_CONTENTS)
            else:
                role = self._stream.choice(["user", "system", "assistant", "assistant", "assistant"])
                item = {"role": role, "content": self._pick(["answer", *CONTENTS], ODD_CONTENTS)}
            self._optional(item, "name", ["Ann", None, ""], [5])
            if item["role"] == "assistant":
                self._optional(item, "reasoning_content", [*TEXTS[:5], None], [5, ["r"]])
                self._optional(item, "tool_calls", [[self._call(len(messages) + i) for i in range(2)], [], None], ["c"])
                if isinstance(item.get("tool_calls"), list):
                    ids = [call.get("id") for call in item["tool_calls"]] or ids
            if self._stream.random() < self._oddness:
                item |= self._stream.choice(
                    [
                        *({"role": role} for role in ("developer", "robot", "tool", None)),
                        *({"tool_calls": [self._call(0)]}, {"reasoning": "r"}, {"tool_call_id": "x"}),
                        *({"function_call": {"name": "get", "arguments": "{}"}}, {"refusal": "no"}, {"weight": 0}),
                    ]
                )
            messages.append(item)
        return messages

    def tools(self) -> Any:
        parameters = {"type": "object", "properties": {"é": {"type": "string", "default": None}}}
        one = {"type": "function", "function": {"name": "get", "description": "<d>", "parameters": parameters}}
        other = {"type": "function", "function": {"name": "set", "parameters": parameters}}
        return self._pick([None, [], [one], [one, other]], [json.dumps([one]), one, [one, one]])


@pytest.mark.parametrize("oddness", [0.02, 0.2])
def test_the_exported_template_gives_our_text_or_raises(oddness: float) -> None:
    jinja = template()
    num_equal = num_raised = 0
    for seed in range(NUM_DRAWS):
        draw = Draw(seed, oddness)
        messages, tools = [*draw.conversation(), {"role": "assistant", "content": "A"}], draw.tools()
        try:
            expected = ours(messages, tools)
        except DataError:
            continue
        try:
            rendered = jinja.render(messages=messages, tools=tools, add_generation_prompt=True)
        except jinja2.exceptions.TemplateError:
            num_raised += 1
            continue
        assert rendered == expected, messages
        num_equal += 1
    assert num_equal > NUM_DRAWS / 10 and num_equal > 2 * num_raised


USER = {"role": "user", "content": "Q"}
CALL = {"id": "x", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": {"text": "x"}}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "x", "tool_calls": [CALL]}],
        [{"role": "tool", "content": "x"}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "y", "content": "x"}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": []}}]}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f:1", "arguments": {}}}]}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "x", "name": "f", "arguments": {}}]}],
        [USER, {"role": "assistant", "function_call": {"name": "f"}}],
        [USER, {"role": "assistant", "content": "<think>r</think>x"}],
        [USER, {"role": "assistant", "content": "x", "reasoning_content": 5}],
    ],
)
def test_the_exported_template_raises_where_our_text_would_differ(messages: list[Any]) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError):
        template().render(messages=messages)


def test_transformers_renders_an_exported_conversation_as_we_do(tmp_path) -> None:
    import transformers

    train_tokenizer(["text"], vocab_size=MIN_VOCAB_SIZE).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    num_equal = 0
    for seed in range(60):
        draw = Draw(seed, 0)
        messages, tools = [*draw.conversation(), {"role": "assistant", "content": "A"}], draw.tools()
        try:
            expected = ours(messages, tools)
        except DataError:
            continue
        options = {"tools": tools, "add_generation_prompt": True, "tokenize": False}
        if any(item.get("role") == "assistant" and item.get("content") == "<think>r</think>a" for item in messages):
            continue  # the Jinja template refuses it
        assert theirs.apply_chat_template(messages, **options) == expected
        num_equal += 1
    assert num_equal > 10

"""ChatML with the tool format of Hermes, which Qwen and many others use.

Tools stand in the system message as JSON, one a line. A call is a JSON object between `<tool_call>` markers; results of
a turn stand together in one message of the user, in the order of their calls. Reasoning stands in `<think>` before the
answer; a turn without reasoning has no `<think>`. There is no system message of its own.

Departures from the templates of single releases: the reasoning of every turn stays, and no message is trimmed.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from moetrain.chat.jinja import ARGUMENTS, CALL_NAME_CHECK, CALLS_CHECK, REASONING, SYSTEM, TEXT, quoted
from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.pieces import Piece, sampled, special
from moetrain.chat.template import ChatTemplate, TurnSyntax, check_no_system, split_system
from moetrain.chat.tool_schema import ToolSpec

START, END = "<|im_start|>", "<|im_end|>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
RESULT_BEGIN, RESULT_END = "<tool_response>", "</tool_response>"
_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within ",
    f"{CALL_BEGIN}{CALL_END}",
    " XML tags:\n",
    CALL_BEGIN,
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
    CALL_END,
)
_CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)

_JINJA = (
    TEXT
    + """\
{%- set state = namespace(ids=[], reasoning='', system='', in_results=false, begun=false) -%}
"""
    + SYSTEM
    + """\
{%- if state.system or tools -%}
{{- '<|im_start|>system\\n' ~ state.system -}}
{%- if tools -%}
{{- ('\\n\\n' if state.system else '') ~ BEFORE -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- AFTER -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if state.in_results and message.role != 'tool' -%}
{%- if state.ids -%}{{- raise_exception('a call has no result') -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- set state.in_results = false -%}
{%- endif -%}
{%- if message.role == 'user' -%}
{%- set state.ids = [] -%}
{{- '<|im_start|>user\\n' ~ text(message.content) ~ '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if not state.ids or not message.tool_call_id or message.tool_call_id != state.ids[0] -%}
{{- raise_exception('results must follow the turn of their calls in their order, each with its tool_call_id') -}}
{%- endif -%}
{%- set state.ids = state.ids[1:] -%}
{{- '' if state.in_results else '<|im_start|>user' -}}
{%- set state.in_results = true -%}
{{- '\\n<tool_response>\\n' ~ text(message.content) ~ '\\n</tool_response>' -}}
{%- elif message.role == 'assistant' -%}
{%- set state.ids = [] -%}
"""
    + REASONING
    + """\
{{- '<|im_start|>assistant\\n' -}}
{{- '<think>\\n' ~ state.reasoning ~ '\\n</think>\\n\\n' if state.reasoning else '' -}}
{{- text(message.content) -}}
{%- if message.tool_calls -%}
"""
    + CALLS_CHECK
    + """\
{%- for call in message.tool_calls -%}
"""
    + CALL_NAME_CHECK
    + """\
{%- if call.id in state.ids -%}{{- raise_exception('two calls of a turn have the same id') -}}{%- endif -%}
{%- set state.ids = state.ids + [call.id] -%}
{{- '\\n' if not loop.first or text(message.content) else '' -}}
{{- '<tool_call>\\n{"name": ' -}}{{- call.function.name | tojson -}}{{- ', "arguments": ' -}}
"""
    + ARGUMENTS
    + """\
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if state.in_results -%}
{%- if state.ids -%}{{- raise_exception('a call has no result') -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"""
)


def _json(text: str) -> Any:
    """Return the value of a JSON text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class ChatML(ChatTemplate):
    """ChatML with Hermes's tool format."""

    name = "chatml"
    syntax = TurnSyntax(
        end=END,
        think_begin=THINK_BEGIN,
        think_end=THINK_END,
        call_begin=CALL_BEGIN,
        call_end=CALL_END,
        think_pad="\n",
        answer_pad="\n\n",
        call_pad="\n",
        between_calls="\n",
    )
    speakers = {START: "", RESULT_BEGIN: "result"}
    header_end = "\n"
    other_markers = (START, RESULT_BEGIN, RESULT_END)
    role_names = {}
    jinja = _JINJA.replace("BEFORE", quoted(_BEFORE_TOOLS)).replace("AFTER", quoted("".join(_AFTER_TOOLS)))
    has_names = False
    has_ids = False

    def fits(self, tokens: Collection[str], *, jinja: str) -> bool:
        """Return whether the tokenizer has the token `<|im_start|>`."""
        return START in tokens

    def opening_pieces(self, messages: Sequence[Message], declaration: str) -> list[Piece]:
        """Return one system message with the declaration of the tools, and the other messages."""
        system, rest = split_system(messages, template=self.name)
        if not system and not declaration:
            return self._after_newline(rest)
        pieces = [special(START)]
        if declaration:
            tools = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in json.loads(declaration))
            head, *tail = _AFTER_TOOLS
            text = "system\n" + (f"{system}\n\n" if system else "") + _BEFORE_TOOLS + tools + head
            pieces.append(Piece(text=text))
            for part in tail:
                markers = re.split(r"(</?tool_call>)", part)
                pieces += [Piece(text=text, is_special=number % 2 == 1) for number, text in enumerate(markers) if text]
        else:
            pieces.append(Piece(text=f"system\n{system}"))
        return [*pieces, special(END), Piece(text="\n"), *self._after_newline(rest)]

    def given_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the newline that follows a turn, one message with all results, and the other messages."""
        check_no_system(messages, template=self.name)
        return [Piece(text="\n"), *self._after_newline(messages)]

    def _after_newline(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        results = [message for message in messages if message.role is Role.tool]
        if results:
            pieces += [special(START), Piece(text="user")]
            for message in results:
                pieces += [Piece(text="\n"), special(RESULT_BEGIN), Piece(text=f"\n{message.content}\n")]
                pieces.append(special(RESULT_END))
            pieces += [special(END), Piece(text="\n")]
        for message in messages:
            if message.role is Role.user:
                pieces += [special(START), Piece(text=f"user\n{message.content}"), special(END), Piece(text="\n")]
        return pieces

    def generation_prompt(self, after: Role | None = None, *, name: str = "") -> list[Piece]:
        """Return the beginning of the assistant's message."""
        return [special(START), Piece(text="assistant\n")]

    def turn_pieces(self, message: Message, after: Role | None = None) -> list[Piece]:
        """Return reasoning, answer and calls, up to `<|im_end|>`."""
        pieces: list[Piece] = []
        content = message.content
        if message.reasoning:
            pieces += [special(THINK_BEGIN), Piece(text=f"\n{message.reasoning}\n"), special(THINK_END)]
            content = f"\n\n{content}"
        if message.content and message.tool_calls:
            content += "\n"
        pieces.append(Piece(text=content))
        for number, call in enumerate(message.tool_calls):
            body = f'\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments}}}\n'
            pieces += [Piece(text="\n" if number else ""), special(CALL_BEGIN), Piece(text=body), special(CALL_END)]
        return sampled([*pieces, special(END)], is_sampled=message.is_learned)

    def prefill(self, *, thinks: bool, after: Role | None = None) -> list[Piece]:
        """Return nothing, or empty reasoning."""
        if thinks:
            return []
        return [special(THINK_BEGIN), Piece(text="\n\n"), special(THINK_END), Piece(text="\n\n")]

    def read_call(self, header: str, body: str, *, index: int) -> ToolCall:
        """Return the call in a JSON object with name and arguments."""
        found, given, name, arguments = _json(body), None, None, body
        if isinstance(found, dict):
            name, given = found.get("name"), found.get("arguments", {})
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        head = _CALL_HEAD.match(body)
        rest = body[head.end() :].rstrip() if head else ""
        # Arguments stay as they are written, also when they are not JSON.
        if head and rest.endswith("}") and (found is None or (isinstance(given, dict) and _json(rest[:-1]) == given)):
            name, arguments = _json(head[1]), rest[:-1].rstrip()
        name = name if isinstance(name, str) else ""
        return ToolCall(name=name, arguments=arguments, id=call_id(name, index) if name else f"call:{index}")

    def complaint(self, call: ToolCall) -> str:
        """Return the form of a call."""
        return f"error: {call.arguments[:40]!r} is no call: write a JSON object with name and arguments"

    def call_grammar(self, tool: ToolSpec, *, token: Callable[[str], str]) -> str:
        """Return a JSON object with the name, and arguments that match the schema."""
        head = f'\n{{"name": {json.dumps(tool.name)}, "arguments": '
        return f"{json.dumps(head)} %json {json.dumps(tool.parameters)} {json.dumps('}' + chr(10))}"


TEMPLATES: tuple[ChatTemplate, ...] = (ChatML(),)

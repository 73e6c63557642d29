"""The chat template of the released Kimi K2 Thinking.

It keeps the reasoning of every turn, and has no system message of its own. A conversation begins with its first role
marker and has no `[BOS]`. The id of a call is `functions.NAME:N`, where N counts the calls of the conversation.
"""

import json
from collections.abc import Callable, Collection, Sequence

from moetrain.chat.jinja import ARGUMENTS, CALL_NAME_CHECK, CALLS_CHECK, MESSAGE_CHECKS, REASONING, TEXT, TOOLS_CHECK
from moetrain.chat.messages import Message, Role, ToolCall
from moetrain.chat.pieces import Piece, sampled, special
from moetrain.chat.template import ChatTemplate, TurnSyntax, name_in
from moetrain.chat.tool_schema import ToolSpec

IM_END, IM_USER, IM_ASSISTANT, IM_SYSTEM, IM_MIDDLE = (
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
)
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGUMENT, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
_JINJA = (
    TEXT
    + """{%- set state = namespace(count=0, ids=[], reasoning='', id='') -%}
{%- if tools -%}
"""
    + TOOLS_CHECK
    + """<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
"""
    + MESSAGE_CHECKS
    + """{%- if message.role == 'system' -%}
<|im_system|>{{ message.name or 'system' }}<|im_middle|>{{ text(message.content) }}<|im_end|>
{%- elif message.role == 'user' -%}
<|im_user|>{{ message.name or 'user' }}<|im_middle|>{{ text(message.content) }}<|im_end|>
{%- elif message.role == 'tool' -%}
{%- set state.id = '' -%}
{%- for pair in state.ids -%}
{%- if message.tool_call_id and pair[0] == message.tool_call_id -%}{%- set state.id = pair[1] -%}{%- endif -%}
{%- endfor -%}
{%- if not state.id -%}
{{ raise_exception('the tool_call_id of a tool result must be the id of a call of the last turn with calls') }}
{%- endif -%}
<|im_system|>{{ message.name or 'tool' }}<|im_middle|>## Return of {{ state.id }}
{{ text(message.content) }}<|im_end|>
{%- else -%}
"""
    + REASONING
    + """<|im_assistant|>{{ message.name or 'assistant' }}<|im_middle|><think>{{ state.reasoning }}</think>
{{- text(message.content) }}
{%- if message.tool_calls -%}
"""
    + CALLS_CHECK
    + """{%- set state.ids = [] -%}
<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
"""
    + CALL_NAME_CHECK
    + """{%- set state.id = 'functions.' ~ call.function.name ~ ':' ~ state.count -%}
{%- set state.count = state.count + 1 -%}
{%- set state.ids = state.ids + [[call.id, state.id]] -%}
<|tool_call_begin|>{{ state.id }}<|tool_call_argument_begin|>
"""
    + ARGUMENTS
    + """<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""
)


class KimiK2(ChatTemplate):
    """Kimi K2 Thinking."""

    name = "kimi_k2"
    syntax = TurnSyntax(
        end=IM_END,
        think_begin=THINK_BEGIN,
        think_end=THINK_END,
        section_begin=SECTION_BEGIN,
        section_end=SECTION_END,
        call_begin=CALL_BEGIN,
        call_argument=CALL_ARGUMENT,
        call_end=CALL_END,
        streams_arguments=True,
        always_thinks=True,
    )
    speakers = {IM_USER: "question", IM_SYSTEM: "result", IM_ASSISTANT: "assistant"}
    header_end = IM_MIDDLE
    other_markers = (IM_USER, IM_ASSISTANT, IM_SYSTEM, IM_MIDDLE)
    role_names = {}
    jinja = _JINJA
    has_names = True
    has_ids = True

    def fits(self, tokens: Collection[str], *, jinja: str) -> bool:
        """Return whether the tokenizer has the token `<|im_middle|>`."""
        return IM_MIDDLE in tokens

    def opening_pieces(self, messages: Sequence[Message], declaration: str) -> list[Piece]:
        """Return the declaration of the tools, which is the first message, and the messages."""
        declared = (
            [*_header(IM_SYSTEM, "tool_declare"), Piece(text=declaration), special(IM_END)] if declaration else []
        )
        return [*declared, *self.given_pieces(messages)]

    def given_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the messages, each with its role marker and the name of its speaker."""
        return [piece for message in messages for piece in _given(message)]

    def generation_prompt(self, after: Role | None = None, *, name: str = "") -> list[Piece]:
        """Return the assistant's marker and name."""
        return _header(IM_ASSISTANT, name or Role.assistant.value)

    def turn_pieces(self, message: Message, after: Role | None = None) -> list[Piece]:
        """Return the pieces from `<think>` to `<|im_end|>`."""
        pieces = [special(THINK_BEGIN), Piece(text=message.reasoning), special(THINK_END), Piece(text=message.content)]
        if message.tool_calls:
            pieces.append(special(SECTION_BEGIN))
            for call in message.tool_calls:
                pieces += [special(CALL_BEGIN), Piece(text=call.id), special(CALL_ARGUMENT)]
                pieces += [Piece(text=call.arguments), special(CALL_END)]
            pieces.append(special(SECTION_END))
        return sampled([*pieces, special(IM_END)], is_sampled=message.is_learned)

    def prefill(self, *, thinks: bool, after: Role | None = None) -> list[Piece]:
        """Return nothing, or empty reasoning."""
        return [] if thinks else [special(THINK_BEGIN), special(THINK_END)]

    def read_call(self, header: str, body: str, *, index: int) -> ToolCall:
        """Return the call with the id in its header; without one its id is `call:N`."""
        identity = header.strip()
        return ToolCall(name=name_in(identity), arguments=body, id=identity or f"call:{index}")

    def complaint(self, call: ToolCall) -> str:
        """Return the form of an id."""
        return f"error: {call.id!r} is no id of a call: write functions.NAME:N, the tool's name and a number"

    def call_grammar(self, tool: ToolSpec, *, token: Callable[[str], str]) -> str:
        """Return the id with any number of up to four digits, then arguments that match the schema."""
        prefix, schema = json.dumps(f"functions.{tool.name}:"), json.dumps(tool.parameters)
        return f"{prefix} /[0-9]{{1,4}}/ {token(CALL_ARGUMENT)} %json {schema}"


def _header(marker: str, name: str) -> list[Piece]:
    return [special(marker), Piece(text=name), special(IM_MIDDLE)]


def _given(message: Message) -> list[Piece]:
    content = message.content
    if message.role is Role.tool:
        content = f"## Return of {message.tool_call_id}\n{content}"
    marker = IM_USER if message.role is Role.user else IM_SYSTEM
    return [*_header(marker, message.name or message.role.value), Piece(text=content), special(IM_END)]


KIMI_K2 = KimiK2()
TEMPLATES: tuple[ChatTemplate, ...] = (KIMI_K2,)

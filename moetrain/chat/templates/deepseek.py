"""The chat templates of DeepSeek: `deepseek_v3` for V3 and R1, `deepseek_v31` for V3.1, with their tool formats.

A conversation begins with `<｜begin▁of▁sentence｜>` and the system message, without a marker. A turn after tool results
has no marker of the assistant. V3 and R1 write a call as its type, its name and fenced JSON; V3.1 as name and JSON. The
released templates declare no tools: here they stand after the system message, as the model card of V3.1 says.

Departures: the reasoning of every turn stays; R1 writes `<think>` itself; V3.1 begins a turn without reasoning with
`</think>`, which the model writes. A server writes what the released template of V3.1 gives (`prefill`).
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from moetrain.chat.jinja import ARGUMENTS, CALL_NAME_CHECK, CALLS_CHECK, REASONING, SYSTEM, TEXT, quoted
from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.pieces import BOS, EOS, PAD, Piece, sampled, special
from moetrain.chat.template import ChatTemplate, TurnSyntax, check_no_system, split_system
from moetrain.chat.tool_schema import ToolSpec

BEGIN, END, PADDING = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
_OTHER_FORM = "｜DSML｜"
_MARKERS = re.compile("(<｜[^｜]*｜>)")
_FENCE, _FENCE_END = "\n```json\n", "\n```"


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Where V3 and V3.1 differ: text before a name, between name and arguments, and after them, and so on."""

    name: str
    call_head: tuple[str, ...]
    name_end: tuple[str, ...]
    call_tail: str
    between_calls: str
    between_results: str
    results: tuple[str, str]
    chaining: str


_V3 = _Form(
    name="deepseek_v3",
    call_head=("function", SEP),
    name_end=("\n```json\n",),
    call_tail="\n```",
    between_calls="\n",
    between_results="\n",
    results=(OUTPUTS_BEGIN, OUTPUTS_END),
    chaining="separate them by one newline",
)
_V31 = _Form(
    name="deepseek_v31",
    call_head=(),
    name_end=(SEP,),
    call_tail="",
    between_calls="",
    between_results="",
    results=("", ""),
    chaining="chain them directly without separators or spaces",
)

_JINJA = (
    TEXT
    + """\
{%- set state = namespace(ids=[], reasoning='', system='', in_results=false, begun=false, after='') -%}
"""
    + SYSTEM
    + """\
{{- '<｜begin▁of▁sentence｜>' ~ state.system -}}
{%- if tools -%}
{{- ('\\n\\n' if state.system else '') ~ '## Tools\\nYou have access to the following tools:\\n' -}}
{%- for tool in tools -%}
{{- '\\n### ' ~ tool.function.name ~ '\\nDescription: ' ~ (tool.function.description or '') ~ '\\n\\nParameters: ' -}}
{{- (tool.function.parameters or {}) | tojson -}}{{- '\\n' -}}
{%- endfor -%}
{{- USAGE -}}
{%- endif -%}
{%- for message in messages -%}
{%- if state.in_results and message.role != 'tool' -%}
{%- if state.ids -%}{{- raise_exception('a call has no result') -}}{%- endif -%}
{{- RESULTS_END -}}
{%- set state.in_results = false -%}
{%- endif -%}
{%- if message.role == 'user' -%}
{%- set state.ids = [] -%}
{{- '<｜User｜>' ~ text(message.content) -}}
{%- elif message.role == 'tool' -%}
{%- if not state.ids or not message.tool_call_id or message.tool_call_id != state.ids[0] -%}
{{- raise_exception('results must follow the turn of their calls in their order, each with its tool_call_id') -}}
{%- endif -%}
{%- set state.ids = state.ids[1:] -%}
{{- BETWEEN_RESULTS if state.in_results else RESULTS_BEGIN -}}
{%- set state.in_results = true -%}
{{- '<｜tool▁output▁begin｜>' ~ text(message.content) ~ '<｜tool▁output▁end｜>' -}}
{%- elif message.role == 'assistant' -%}
{%- set state.ids = [] -%}
"""
    + REASONING
    + """\
{{- '' if state.after == 'tool' else '<｜Assistant｜>' -}}
{%- if state.reasoning -%}{{- '<think>' ~ THINK_PAD ~ state.reasoning ~ THINK_PAD ~ '</think>' ~ ANSWER_PAD -}}
{%- elif state.after != 'tool' -%}{{- NO_REASONING -}}
{%- endif -%}
{{- text(message.content) -}}
{%- if message.tool_calls -%}
"""
    + CALLS_CHECK
    + """\
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message.tool_calls -%}
"""
    + CALL_NAME_CHECK
    + """\
{%- if call.id in state.ids -%}{{- raise_exception('two calls of a turn have the same id') -}}{%- endif -%}
{%- set state.ids = state.ids + [call.id] -%}
{{- '' if loop.first else BETWEEN_CALLS -}}
{{- '<｜tool▁call▁begin｜>' ~ CALL_HEAD ~ call.function.name ~ NAME_END -}}
"""
    + ARGUMENTS
    + """\
{{- CALL_TAIL ~ '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- set state.after = message.role -%}
{%- endfor -%}
{%- if state.in_results -%}
{%- if state.ids -%}{{- raise_exception('a call has no result') -}}{%- endif -%}
{{- RESULTS_END -}}
{%- endif -%}
{{- '<｜Assistant｜>' if add_generation_prompt and state.after != 'tool' else '' -}}"""
)


def _usage(form: _Form) -> str:
    head, end = "".join(form.call_head), "".join(form.name_end)
    example = f"{CALL_BEGIN}{head}tool_call_name{end}tool_call_arguments{form.call_tail}{CALL_END}"
    return (
        "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS_BEGIN}{example}{{additional_tool_calls}}{CALLS_END}\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        f"- For multiple tool calls, {form.chaining}"
    )


class DeepSeek(ChatTemplate):
    """The template of V3 and R1, or of V3.1."""

    speakers = {
        **{BEGIN: "system", USER: "question", ASSISTANT: "assistant"},
        **{OUTPUT_BEGIN: "result", OUTPUT_END: "assistant"},  # no marker begins the turn after results
    }
    header_end = ""
    other_markers = (BEGIN, USER, ASSISTANT, OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END)
    role_names = {BOS: BEGIN, EOS: END, PAD: PADDING}
    has_names = False
    has_ids = False

    def __init__(self, form: _Form) -> None:
        self.name = form.name
        self._form = form
        self._is_v31 = is_v31 = form is _V31
        self.syntax = TurnSyntax(
            end=END,
            think_begin=THINK_BEGIN,
            think_end=THINK_END,
            section_begin=CALLS_BEGIN,
            section_end=CALLS_END,
            call_begin=CALL_BEGIN,
            call_argument=SEP,
            call_end=CALL_END,
            streams_arguments=is_v31,
            think_pad="" if is_v31 else "\n",
            answer_pad="" if is_v31 else "\n\n",
            between_calls=form.between_calls,
            bare_think_end=is_v31,
        )
        values = {
            "USAGE": _usage(form),
            "RESULTS_BEGIN": form.results[0],
            "RESULTS_END": form.results[1],
            "BETWEEN_RESULTS": form.between_results,
            "THINK_PAD": self.syntax.think_pad,
            "ANSWER_PAD": self.syntax.answer_pad,
            "NO_REASONING": THINK_END if is_v31 else "",
            "BETWEEN_CALLS": form.between_calls,
            "CALL_HEAD": "".join(form.call_head),
            "NAME_END": "".join(form.name_end),
            "CALL_TAIL": form.call_tail,
        }
        self.jinja = _JINJA
        for place, text in values.items():
            self.jinja = self.jinja.replace(place, quoted(text))

    def fits(self, tokens: Collection[str], *, jinja: str) -> bool:
        """Return whether the tokenizer has the token `<｜User｜>`; V3's Jinja template has fences, V3.1's has none.

        V3.2 and V4 have another form of calls and the marker `｜DSML｜`.
        """
        if _OTHER_FORM in tokens:
            return False
        is_v3 = "```json" in jinja if jinja else THINK_BEGIN not in tokens
        return USER in tokens and is_v3 is not self._is_v31

    def opening_pieces(self, messages: Sequence[Message], declaration: str) -> list[Piece]:
        """Return the beginning of the sequence, the system messages with the tools, and the other messages."""
        system, rest = split_system(messages, template=self.name)
        if declaration:
            system += "\n\n" if system else ""
            system += "## Tools\nYou have access to the following tools:\n"
            for tool in json.loads(declaration):
                function = tool["function"]
                parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
                system += f"\n### {function['name']}\nDescription: {function.get('description') or ''}\n\n"
                system += f"Parameters: {parameters}\n"
        pieces = [special(BEGIN)]
        usage = _MARKERS.split(_usage(self._form)) if declaration else [""]
        pieces.append(Piece(text=system + usage[0]))
        pieces += [Piece(text=part, is_special=place % 2 == 0) for place, part in enumerate(usage[1:]) if part]
        return [*pieces, *self.given_pieces(rest)]

    def given_pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the results and the messages of the user."""
        check_no_system(messages, template=self.name)
        results = [message for message in messages if message.role is Role.tool]
        begin, end = self._form.results
        pieces = [special(begin)] if results and begin else []
        for number, message in enumerate(results):
            if number and self._form.between_results:
                pieces.append(Piece(text=self._form.between_results))
            pieces += [special(OUTPUT_BEGIN), Piece(text=message.content), special(OUTPUT_END)]
        pieces += [special(end)] if results and end else []
        for message in messages:
            if message.role is Role.user:
                pieces += [special(USER), Piece(text=message.content)]
        return pieces

    def generation_prompt(self, after: Role | None = None, *, name: str = "") -> list[Piece]:
        """Return the assistant's marker, or nothing after tool results."""
        return [] if after is Role.tool else [special(ASSISTANT)]

    def turn_pieces(self, message: Message, after: Role | None = None) -> list[Piece]:
        """Return reasoning, answer and calls, up to the end of the sentence."""
        pieces: list[Piece] = []
        content, pad = message.content, self.syntax.think_pad
        if message.reasoning:
            pieces += [special(THINK_BEGIN), Piece(text=f"{pad}{message.reasoning}{pad}"), special(THINK_END)]
            content = self.syntax.answer_pad + content
        elif self._is_v31 and after is not Role.tool:
            pieces.append(special(THINK_END))
        pieces.append(Piece(text=content))
        if message.tool_calls:
            pieces.append(special(CALLS_BEGIN))
            for number, call in enumerate(message.tool_calls):
                pieces += [Piece(text=self._form.between_calls if number else ""), special(CALL_BEGIN)]
                pieces += self._call_pieces(call)
                pieces.append(special(CALL_END))
            pieces.append(special(CALLS_END))
        return sampled([*pieces, special(END)], is_sampled=message.is_learned)

    def _call_pieces(self, call: ToolCall) -> list[Piece]:
        if self._is_v31:
            return [Piece(text=call.name), special(SEP), Piece(text=call.arguments)]
        head, sep = self._form.call_head
        body = f"{call.name}{self._form.name_end[0]}{call.arguments}{self._form.call_tail}"
        return [Piece(text=head), special(sep), Piece(text=body)]

    def prefill(self, *, thinks: bool, after: Role | None = None) -> list[Piece]:
        """Return `<think>` or `</think>` for V3.1, and nothing or empty reasoning for R1."""
        if self._is_v31:
            return [special(THINK_BEGIN)] if thinks else [special(THINK_END)] if after is not Role.tool else []
        if thinks:
            return []
        return [special(THINK_BEGIN), Piece(text="\n\n"), special(THINK_END), Piece(text="\n\n")]

    def read_call(self, header: str, body: str, *, index: int) -> ToolCall:
        """Return the call with the name in the header, or the name and the fenced JSON after the type."""
        name, arguments = header.strip(), body
        if not self._is_v31:
            head, fence, rest = body.partition(_FENCE)
            rest = rest.rstrip()
            is_call = fence and rest.endswith(_FENCE_END)
            name, arguments = (head.strip(), rest.removesuffix(_FENCE_END)) if is_call else ("", body)
        if not name or name != "".join(name.split()):
            return ToolCall(name="", arguments=arguments, id=f"call:{index}")
        return ToolCall(name=name, arguments=arguments, id=call_id(name, index))

    def complaint(self, call: ToolCall) -> str:
        """Return the form of a call."""
        form = "the tool's name, the separator and JSON" if self._is_v31 else "function, the name and JSON in a fence"
        return f"error: {call.arguments[:40]!r} is no call: write {form}"

    def call_grammar(self, tool: ToolSpec, *, token: Callable[[str], str]) -> str:
        """Return the name, and arguments that match the schema."""
        schema = json.dumps(tool.parameters)
        if self._is_v31:
            return f"{json.dumps(tool.name)} {token(SEP)} %json {schema}"
        name = json.dumps(tool.name + self._form.name_end[0])
        return f'"function" {token(SEP)} {name} %json {schema} {json.dumps(self._form.call_tail)}'


TEMPLATES: tuple[ChatTemplate, ...] = (DeepSeek(_V3), DeepSeek(_V31))

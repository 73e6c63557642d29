"""The chat template of the released Kimi K2 Thinking: messages to pieces and tokens, and a turn's tokens back.

Not a Jinja engine: training renders pieces, so that every token is known to be a marker, text that was given, or text
that the model is to produce. `JINJA` says the same for other programs; a test holds the two together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.tool_schema import ToolSpec, declaration
from moetrain.errors import RolloutError

BOS, EOS, PAD, UNK = "[BOS]", "[EOS]", "[PAD]", "[UNK]"
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

SPECIAL_TOKENS: list[str] = [
    BOS,
    EOS,
    PAD,
    UNK,
    IM_END,
    IM_USER,
    IM_ASSISTANT,
    IM_SYSTEM,
    IM_MIDDLE,
    SECTION_BEGIN,
    SECTION_END,
    CALL_BEGIN,
    CALL_ARGUMENT,
    CALL_END,
    THINK_BEGIN,
    THINK_END,
]

JINJA = """{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}<|im_system|>system<|im_middle|>{{ message.content }}<|im_end|>
{%- elif message.role == 'user' -%}<|im_user|>user<|im_middle|>{{ message.content }}<|im_end|>
{%- elif message.role == 'tool' -%}
<|im_system|>{{ message.name or 'tool' }}<|im_middle|>## Return of {{ message.tool_call_id }}
{{ message.content }}<|im_end|>
{%- else -%}
<|im_assistant|>assistant<|im_middle|><think>{{ message.reasoning_content or '' }}</think>{{ message.content or '' }}
{%- if message.tool_calls -%}<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>
{%- if call.function.arguments is string -%}{{ call.function.arguments }}
{%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>{%- endif -%}<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""
"""The same template for programs that read `chat_template.jinja`. It keeps the reasoning of every turn."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of text or one special token; `is_sampled` tells what a model produces from what it is given."""

    text: str
    is_special: bool = False
    is_sampled: bool = False


def _special(token: str, is_sampled: bool = False) -> Piece:
    return Piece(text=token, is_special=True, is_sampled=is_sampled)


def declare_pieces(tools: Sequence[ToolSpec]) -> list[Piece]:
    """Return the message that declares tools; it comes first."""
    head = [_special(IM_SYSTEM), Piece(text="tool_declare"), _special(IM_MIDDLE)]
    return [*head, Piece(text=declaration(tools)), _special(IM_END)]


def generation_prompt() -> list[Piece]:
    """Return what precedes a model's turn."""
    return [_special(IM_ASSISTANT), Piece(text="assistant"), _special(IM_MIDDLE)]


def turn_pieces(message: Message) -> list[Piece]:
    """Return what a model produces in its turn, `<think>` to `<|im_end|>`; all of it is sampled."""
    pieces = [_special(THINK_BEGIN), Piece(text=message.reasoning), _special(THINK_END), Piece(text=message.content)]
    if message.tool_calls:
        pieces.append(_special(SECTION_BEGIN))
        for call in message.tool_calls:
            pieces += [_special(CALL_BEGIN), Piece(text=call.id), _special(CALL_ARGUMENT)]
            pieces += [Piece(text=call.arguments), _special(CALL_END)]
        pieces.append(_special(SECTION_END))
    pieces.append(_special(IM_END))
    return [Piece(text=p.text, is_special=p.is_special, is_sampled=True) for p in pieces if p.text]


def message_pieces(message: Message) -> list[Piece]:
    """Return one message as pieces."""
    if message.role is Role.assistant:
        return [*generation_prompt(), *turn_pieces(message)]
    if message.role is Role.user:
        return [
            _special(IM_USER),
            Piece(text="user"),
            _special(IM_MIDDLE),
            Piece(text=message.content),
            _special(IM_END),
        ]
    name, content = "system", message.content
    if message.role is Role.tool:
        name, content = message.name or "tool", f"## Return of {message.tool_call_id}\n{message.content}"
    return [_special(IM_SYSTEM), Piece(text=name), _special(IM_MIDDLE), Piece(text=content), _special(IM_END)]


def conversation_pieces(messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[Piece]:
    """Return a conversation as pieces, tools declared first when there are any."""
    pieces = declare_pieces(tools) if tools else []
    for message in messages:
        pieces += message_pieces(message)
    return pieces


def pieces_to_text(pieces: Sequence[Piece]) -> str:
    """Return the text of `pieces`, special tokens spelt out."""
    return "".join(piece.text for piece in pieces)


def pieces_to_tokens(
    pieces: Sequence[Piece], *, encode: Callable[[str], list[int]], special_ids: Mapping[str, int]
) -> tuple[list[int], list[bool]]:
    """Return token ids and, for each, whether a model produces it. Text never becomes a special token."""
    tokens: list[int] = []
    is_sampled: list[bool] = []
    for piece in pieces:
        ids = [special_ids[piece.text]] if piece.is_special else encode(piece.text)
        tokens += ids
        is_sampled += [piece.is_sampled] * len(ids)
    return tokens, is_sampled


def parse_turn(
    tokens: Sequence[int], *, decode: Callable[[Sequence[int]], str], special_names: Mapping[int, str], first_index: int
) -> Message:
    """Return the message that a model's turn says, `<|im_end|>` excluded or included.

    `first_index` is the number of calls before this turn; it is what a missing or odd id is replaced by.
    Raises RolloutError when the markers do not nest: the turn then is an invalid call, for the caller to count.
    """
    parts = _split_at_specials(tokens, decode=decode, special_names=special_names)
    message = Message(role=Role.assistant)
    where = "content"
    header = ""
    for text, special in parts:
        if where == "think":
            message.reasoning += text
        elif where == "content":
            message.content += text
        elif where == "header":
            header += text
        elif where == "arguments" and special == CALL_END:
            message.tool_calls.append(_call(header, text, index=first_index + len(message.tool_calls)))
        elif text.strip():
            raise RolloutError(f"a tool call section holds stray text {text[:40]!r}")
        where = _next_place(where, special)
        if special == CALL_BEGIN:
            header = ""
    if where != "end":
        raise RolloutError(f"the turn ends inside its {where}")
    return message


_PLACES: dict[tuple[str, str], str] = {
    ("content", THINK_BEGIN): "think",
    ("think", THINK_END): "content",
    ("content", SECTION_BEGIN): "section",
    ("section", CALL_BEGIN): "header",
    ("header", CALL_ARGUMENT): "arguments",
    ("arguments", CALL_END): "section",
    ("section", SECTION_END): "closed",
    ("content", IM_END): "end",
    ("closed", IM_END): "end",
}


def _next_place(where: str, special: str) -> str:
    if not special:
        return "end" if where in ("content", "closed") else where
    try:
        return _PLACES[where, special]
    except KeyError:
        raise RolloutError(f"{special} cannot follow inside {where}") from None


def _split_at_specials(
    tokens: Sequence[int], *, decode: Callable[[Sequence[int]], str], special_names: Mapping[int, str]
) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    run: list[int] = []
    for token in tokens:
        if token in special_names:
            parts.append((decode(run), special_names[token]))
            run = []
        else:
            run.append(token)
    if run or not parts or parts[-1][1] != IM_END:
        parts.append((decode(run), ""))
    return parts


def _call(header: str, arguments: str, *, index: int) -> ToolCall:
    name = header.strip().removeprefix("functions.").partition(":")[0]
    return ToolCall(name=name, arguments=arguments, id=header.strip() or call_id(name, index))

"""The chat template of the released Kimi K2 Thinking: renders messages as pieces and tokens, and parses turns.

Training renders pieces instead of running a Jinja engine, so that each token is known to be a marker, given text, or
text that the model produces. `chat/jinja.py` contains the same template for other programs.

A conversation begins with its first role marker and has no `[BOS]`, as in the released template. This holds for
training documents, demonstrations, rollouts, `generate` and the exported template. Plain text begins with `[BOS]`:
`with_bos` decides which of the two a document is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.tool_schema import ToolSpec, declaration
from moetrain.errors import DataError, RolloutError

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


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of text or one special token. is_sampled: whether the model produces it; otherwise it is given."""

    text: str
    is_special: bool = False
    is_sampled: bool = False


def _special(token: str, is_sampled: bool = False) -> Piece:
    return Piece(text=token, is_special=True, is_sampled=is_sampled)


def with_bos(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of a document with `[BOS]` in front, unless they already begin with a special token."""
    if pieces and pieces[0].is_special:
        return list(pieces)
    return [_special(BOS), *pieces]


def declare_pieces(tools: str) -> list[Piece]:
    """Return the message that declares tools, given as compact JSON text. It is the first message of a conversation."""
    return [*_header(IM_SYSTEM, "tool_declare"), Piece(text=tools), _special(IM_END)]


def _header(marker: str, name: str) -> list[Piece]:
    return [_special(marker), Piece(text=name), _special(IM_MIDDLE)]


def generation_prompt() -> list[Piece]:
    """Return the pieces that precede a model's turn."""
    return _header(IM_ASSISTANT, Role.assistant.value)


def turn_pieces(message: Message) -> list[Piece]:
    """Return the pieces that a model produces in its turn, from `<think>` to `<|im_end|>`.

    They are marked as sampled when the message is learned.
    """
    pieces = [_special(THINK_BEGIN), Piece(text=message.reasoning), _special(THINK_END), Piece(text=message.content)]
    if message.tool_calls:
        pieces.append(_special(SECTION_BEGIN))
        for call in message.tool_calls:
            pieces += [_special(CALL_BEGIN), Piece(text=call.id), _special(CALL_ARGUMENT)]
            pieces += [Piece(text=call.arguments), _special(CALL_END)]
        pieces.append(_special(SECTION_END))
    pieces.append(_special(IM_END))
    return [Piece(text=p.text, is_special=p.is_special, is_sampled=message.is_learned) for p in pieces if p.text]


def message_pieces(message: Message) -> list[Piece]:
    """Return one message as pieces."""
    name = message.name or message.role.value
    if message.role is Role.assistant:
        return [*_header(IM_ASSISTANT, name), *turn_pieces(message)]
    content = message.content
    if message.role is Role.tool:
        content = f"## Return of {message.tool_call_id}\n{content}"
    marker = IM_USER if message.role is Role.user else IM_SYSTEM
    return [*_header(marker, name), Piece(text=content), _special(IM_END)]


def conversation_pieces(messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[Piece]:
    """Return a conversation as pieces, after the declaration of its tools, if any.

    Raises DataError when the ids of calls are not `functions.NAME:N` with N from 0, or when a result has the id of no
    earlier call. The exported template would write other ids.
    """
    _check_ids(messages)
    pieces = declare_pieces(declaration(tools)) if tools else []
    for message in messages:
        pieces += message_pieces(message)
    return pieces


def _check_ids(messages: Sequence[Message]) -> None:
    known: list[str] = []
    for message in messages:
        for call in message.tool_calls:
            if call.id != call_id(call.name, len(known)):
                raise DataError(f"the id of a call is {call.id!r}: give {call_id(call.name, len(known))!r}")
            known.append(call.id)
        if message.role is Role.tool and message.tool_call_id not in known:
            raise DataError(f"tool_call_id is {message.tool_call_id!r}: give the id of an earlier call")


def pieces_to_text(pieces: Sequence[Piece]) -> str:
    """Return the text of `pieces`, with the names of special tokens."""
    return "".join(piece.text for piece in pieces)


def pieces_to_tokens(
    pieces: Sequence[Piece], *, encode: Callable[[str], list[int]], special_ids: Mapping[str, int]
) -> tuple[list[int], list[bool]]:
    """Return token ids and, for each id, whether the model produces it. Text never becomes a special token."""
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
    """Return the message of a model's turn from its tokens, with or without the final `<|im_end|>`.

    A call whose id is not of the form `functions.NAME:N` has an empty name and keeps its id. A missing id becomes
    `call:N`, where N counts from `first_index`, the number of calls before this turn. Raises RolloutError when the
    markers do not nest.
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


_CALL_ID = re.compile(r"functions\.(?P<name>[^:\s]+):[0-9]+")


def _call(header: str, arguments: str, *, index: int) -> ToolCall:
    identity = header.strip()
    match = _CALL_ID.fullmatch(identity)
    return ToolCall(name=match["name"] if match else "", arguments=arguments, id=identity or f"call:{index}")

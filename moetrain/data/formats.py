"""What a record of a data set becomes: a document of pieces, some spelt as text, some special tokens.

A plugin adds a format of its own: `register_format("alpaca", function)`, where the function takes a record and the
name of its column and returns text, or pieces when a part is not to be learned or a special token is wanted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.chat.messages import Message, Role, ToolCall, call_id
from moetrain.chat.template import EOS, IM_END, IM_MIDDLE, IM_SYSTEM, Piece, conversation_pieces, pieces_to_text
from moetrain.errors import ConfigError, DataError

Record = Mapping[str, Any]
Format = Callable[[Record, str], str | Sequence[Piece]]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document before tokenization. `key` decides on which side of the train/validation split it falls."""

    key: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """Return the text, special tokens spelt out."""
        return pieces_to_text(self.pieces)


def text_document(text: str, *, key: str | None = None) -> Document:
    """Return a document that is all text and ends with `[EOS]`; its key is the text itself unless one is given."""
    pieces = (Piece(text=text, is_sampled=True), Piece(text=EOS, is_special=True, is_sampled=True))
    return Document(key=key or text, pieces=pieces)


def register_format(name: str, function: Format) -> None:
    """Make `function` what `data.sources.*.format=name` means. Raises ConfigError when the name is taken."""
    if name in _FORMATS:
        raise ConfigError(f"the data format {name} is registered already: choose another name")
    _FORMATS[name] = function


def format_named(name: str) -> Format:
    """Return a registered format. Raises ConfigError that lists those there are."""
    if name not in _FORMATS:
        known = ", ".join(sorted(_FORMATS))
        raise ConfigError(f"data.sources.*.format is {name}: known are {known}; a plugin can register more")
    return _FORMATS[name]


def document_of(record: Record, *, column: str, format: Format, where: str) -> Document:
    """Return the record as a document; a DataError begins with `where`, the file and line."""
    if column not in record:
        raise DataError(f"{where} has no column {column}: it has {', '.join(map(str, record))}")
    try:
        result = format(record, column)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # of a plugin's format
        said = " ".join(str(error).split())
        raise DataError(f"{where} does not fit its format: {type(error).__name__}: {said}") from error
    if isinstance(result, str):
        return _spelt(text_document(result), where=where)
    if not any(piece.is_sampled for piece in result):
        raise DataError(f"{where} has nothing to learn: no part of it is sampled, such as an assistant's turn")
    return _spelt(Document(key=pieces_to_text(result), pieces=tuple(result)), where=where)


def _spelt(document: Document, *, where: str) -> Document:
    """Return the document; DataError when it holds half of a surrogate pair, as JSON may."""
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(document.text[error.start])
        raise DataError(f"{where} holds U+{half:04X}, half of a character, which UTF-8 cannot spell") from error
    return document


def _text(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"column {column} holds {type(value).__name__} {str(value)[:40]!r} where text is wanted")
    return value


def _messages(record: Record, column: str) -> list[Piece]:
    """Return a conversation in the chat-completions form; a column `tools` is declared first."""
    value = record[column]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"column {column} holds {str(value)[:40]!r} where a list of messages is wanted")
    messages: list[Message] = []
    num_calls = 0
    for item in value:
        message = _message(item, num_calls=num_calls)
        num_calls += len(message.tool_calls)
        messages.append(message)
    return [*_declared(record.get("tools")), *conversation_pieces(messages)]


def _declared(tools: object) -> list[Piece]:
    if not tools:
        return []
    text = json.dumps(tools, separators=(",", ":"), ensure_ascii=False) if not isinstance(tools, str) else tools
    head = [Piece(text=IM_SYSTEM, is_special=True), Piece(text="tool_declare"), Piece(text=IM_MIDDLE, is_special=True)]
    return [*head, Piece(text=text), Piece(text=IM_END, is_special=True)]


def _message(item: Mapping[str, Any], *, num_calls: int) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in list(Role):
        raise DataError(f"a message has the role {role!r}: known are {', '.join(Role)}")
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"tool_calls holds {_shown(calls)}: give a list of calls")
    return Message(
        role=Role(role),
        content=_content(item.get("content")),
        reasoning=_string(item, "reasoning_content"),
        tool_calls=[_call(call, index=num_calls + offset) for offset, call in enumerate(calls)],
        tool_call_id=_string(item, "tool_call_id"),
        name=_string(item, "name"),
    )


def _content(value: object) -> str:
    """Return the text of a message: a string, null, or a list of parts of type text, which are put together."""
    parts = value if isinstance(value, list) else [] if value is None else [{"type": "text", "text": value}]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"content holds {_shown(value)}: give text, or a list of parts of type text")
    return "".join(map(str, texts))


def _string(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{key} holds {_shown(value)}: give text")
    return value or ""


def _shown(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _call(call: Any, *, index: int) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise DataError(f"a tool call is {str(call)[:60]!r}: it needs function.name and function.arguments")
    name, arguments = function["name"], function.get("arguments") or {}
    if not isinstance(name, str) or not name or ":" in name:
        raise DataError(f"function.name is {_shown(name)}: give a name without a colon, which ends it in a call's id")
    if not isinstance(arguments, str | Mapping):
        raise DataError(f"function.arguments of {name} holds {_shown(arguments)}: give an object, or its JSON text")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name=name, arguments=arguments, id=_string(call, "id") or call_id(name, index))


_FORMATS: dict[str, Format] = {"text": _text, "messages": _messages}

"""Formats: functions that turn a record of a data set into a document of pieces (text or special tokens).

A plugin adds a format with `register_format("alpaca", function)`. The function takes a record and the name of its
column. It returns text, or pieces when a part is not to be learned or a special token is needed.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.chat.records import UnknownKeyError, check_keys, read_declaration, read_messages
from moetrain.chat.template import EOS, Piece, conversation_pieces, declare_pieces, pieces_to_text
from moetrain.errors import ConfigError, DataError

Record = Mapping[str, Any]
Format = Callable[[Record, str], str | Sequence[Piece]]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document before tokenization. The hash of `key` decides whether it is for training or validation."""

    key: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """Return the text, with the names of special tokens."""
        return pieces_to_text(self.pieces)


def text_document(text: str, *, key: str | None = None) -> Document:
    """Return a document of text that ends with `[EOS]`; its key is the text unless one is given."""
    pieces = (Piece(text=text, is_sampled=True), Piece(text=EOS, is_special=True, is_sampled=True))
    return Document(key=key or text, pieces=pieces)


def register_format(name: str, function: Format) -> None:
    """Register `function` as `data.sources.*.format=name`. Raises ConfigError when the name is taken."""
    if name in _FORMATS:
        raise ConfigError(f"the data format {name} is registered already: choose another name")
    _FORMATS[name] = function


def format_named(name: str) -> Format:
    """Return a registered format. Raises ConfigError that lists the registered ones."""
    if name not in _FORMATS:
        names = ", ".join(sorted(_FORMATS))
        raise ConfigError(f"data.sources.*.format is {name}: give one of {names}, or register it in a plugin")
    return _FORMATS[name]


def document_of(
    record: Record, *, column: str, format: Format, where: object, ignore: Collection[str] = ()
) -> Document:
    """Return the record as a document.

    ignore: keys that are removed from the record and from the messages in its column. where: prints as the file and
    line, with which a DataError begins.
    """
    if column not in record:
        raise DataError(f"{where} has no column {column}: it has {', '.join(map(str, record))}")
    try:
        result = format(_without(record, ignore, column=column), column)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # raised by a plugin's format
        reason = " ".join(str(error).split())
        raise DataError(f"{where} does not fit its format: {type(error).__name__}: {reason}") from error
    if isinstance(result, str):
        return _encodable(text_document(result), where=where)
    return _encodable(Document(key=pieces_to_text(result), pieces=tuple(result)), where=where)


def _without(record: Record, ignore: Collection[str], *, column: str) -> Record:
    """Return the record without the ignored keys, both in the record and in the messages in its column."""
    if not ignore:
        return record
    filtered = {key: value for key, value in record.items() if key not in ignore}
    if isinstance(filtered.get(column), list):
        filtered[column] = [
            {key: value for key, value in item.items() if key not in ignore} if isinstance(item, Mapping) else item
            for item in filtered[column]
        ]
    return filtered


def _encodable(document: Document, *, where: object) -> Document:
    """Return the document. Raises DataError when it contains a lone surrogate, which a JSON escape can produce."""
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(document.text[error.start])
        raise DataError(
            f"{where} holds U+{half:04X}, half of a surrogate pair, which UTF-8 cannot encode: remove it"
        ) from error
    return document


def _text(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"column {column} holds {type(value).__name__} {str(value)[:40]!r} where text is expected")
    return value


def _messages(record: Record, column: str) -> list[Piece]:
    """Return a conversation in the chat-completions form, after the declaration of the tools in the column `tools`."""
    try:
        check_keys(record, (column, "tools", "parallel_tool_calls"), place="the record")
        declared = read_declaration(record.get("tools"))
        messages = read_messages(record[column])
    except UnknownKeyError as error:
        cure = "data.sources.NAME.ignore=[KEY] removes a key from records and messages"
        raise DataError(f"{error} ({cure})") from None
    return [*(declare_pieces(declared) if declared else []), *conversation_pieces(messages)]


_FORMATS: dict[str, Format] = {"text": _text, "messages": _messages}
